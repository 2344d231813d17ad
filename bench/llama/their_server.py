"""`python -m bench.llama.their_server KEY=VALUE ...`: llama.cpp's server out of the wheel, until a signal."""

import signal
import sys

import xllamacpp


def parameters(settings: dict[str, str]) -> "xllamacpp.CommonParams":
    """Flash attention, a unified KV cache, one thread for the model: as meshserve has them."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {"llama"} if isinstance(params.model_alias, (set, frozenset)) else "llama"
    params.n_parallel, params.n_ctx = int(settings["slots"]), int(settings["cells"])
    params.port, params.kv_unified, params.warmup = int(settings["port"]), True, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    kind = {"q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}[settings["kv"]]
    params.cache_type_k = params.cache_type_v = kind
    if "batch" in settings:
        params.n_batch = params.n_ubatch = int(settings["batch"])
    return params


def main() -> None:
    """Serve."""
    server = xllamacpp.Server(parameters(dict(argument.split("=", 1) for argument in sys.argv[1:])))
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()

"""llama.cpp's C API, called through ctypes.

The wheel `xllamacpp` exports llama.cpp's C API from one shared object and brings no declarations; those below are for one version of
the wheel, since llama.cpp changes its structs from build to build. `llama-cpp-python`, where it is installed instead, brings both.
Nothing is imported or loaded before :func:`load_library`.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from meshserve.errors import StartupFailed

XLLAMACPP_VERSION = "2026.10.11549"
_INSTALL = f"install it with: pip install 'xllamacpp=={XLLAMACPP_VERSION}'"
_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # else a failed assertion of llama.cpp starts a debugger on this process
    "OMP_WAIT_POLICY": "passive",  # else idle compute threads spin, and take the cores of the event loop
}
# llama.cpp calls what is routine information and news of little use warnings; each of its errors becomes an error of ours as well
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
_LOG_ERROR, _LOG_CONTINUES = 4, 5
_logger = logging.getLogger(__name__)

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
AbortCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)


class ModelParams(ctypes.Structure):
    """`struct llama_model_params` of the pinned build."""

    _fields_ = [  # noqa: RUF012  # ctypes reads the list once
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    ]


class ContextParams(ctypes.Structure):
    """`struct llama_context_params` of the pinned build."""

    _fields_ = [  # noqa: RUF012
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, c_int32) for name in ("attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("moe_cache_size", c_size_t),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """`struct llama_batch`: the tokens of one step."""

    _fields_ = [  # noqa: RUF012
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# What llama.cpp documents for its defaults. A field read at a wrong offset shows another value.
MODEL_DEFAULTS: dict[str, object] = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0, "tensor_split": None, "kv_overrides": None,
    "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False, "load_mtp": False,
}  # fmt: skip
CONTEXT_DEFAULTS: dict[str, object] = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0, "n_outputs_max_per_seq": 1,
    "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None, "type_k": 1, "type_v": 1,
    "moe_cache_size": 0, "abort_callback": None, "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True,
    "swa_full": True, "kv_unified": False, "samplers": None, "n_samplers": 0, "ctx_other": None,
}  # fmt: skip

_BYTES = POINTER(c_uint8)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_layer": (c_int32, [c_void_p]),
    "llama_model_n_params": (c_uint64, [c_void_p]),
    "llama_model_n_swa": (c_int32, [c_void_p]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_is_recurrent": (c_bool, [c_void_p]),
    "llama_model_is_hybrid": (c_bool, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_has_decoder": (c_bool, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_ctx_seq": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_set_abort_callback": (None, [c_void_p, AbortCallback, c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, _BYTES, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, _BYTES, c_size_t, c_int32]),
}


@dataclass(slots=True)
class Library:
    """llama.cpp, loaded. `functions` has its functions under their C names."""

    functions: Any
    batch_type: type[Any]
    distribution: str
    """The Python distribution that brought the library, with its version: `xllamacpp 2026.10.11549`."""
    path: Path
    build: str
    """Equal for two peers exactly if their libraries are the same file of the same distribution."""
    processor_class: str
    """Backends and instruction sets that the library uses here. Between classes, blocks are accepted and logits differ a little."""
    first_error: str = ""
    """The first error line that llama.cpp logged since :meth:`take_error`: the only place where it says why it refused something."""
    _line: str = ""
    _level: int = logging.DEBUG
    _callbacks: list[Any] = field(default_factory=list)

    def take_error(self) -> str:
        """Why llama.cpp refused something since the last call; for the message of an error of ours."""
        line, self.first_error = self.first_error, ""
        return line.strip().rstrip(".") or "llama.cpp gives no reason"

    def route_log(self) -> None:
        """Send llama.cpp's log lines to Python's logging. They come from any thread that calls llama.cpp."""
        callback = LogCallback(self._on_log)
        self._callbacks.append(callback)  # as long as the library: it is called until the process ends
        self.functions.llama_log_set(callback, None)

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        if level != _LOG_CONTINUES:
            self._line, self._level = "", level
        self._line += text.decode("utf-8", "replace")
        if self._line.endswith("\n"):
            line, self._line = self._line.strip(), ""
            if self._level == _LOG_ERROR and line:
                self.first_error = self.first_error or line
            _logger.log(_LOG_LEVELS.get(self._level, logging.DEBUG), "%s", line)


@functools.cache
def load_library() -> Library:
    """Load llama.cpp, once in a process. Raises StartupFailed with a line that says what to do."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    library = _load_xllamacpp() or _load_llama_cpp_python()
    if library is None:
        raise StartupFailed(f"llama.cpp is not installed: {_INSTALL}")
    _check_defaults("llama_model_default_params", library, MODEL_DEFAULTS)
    _check_defaults("llama_context_default_params", library, CONTEXT_DEFAULTS)
    library.route_log()
    library.functions.llama_backend_init()
    library.processor_class = _processor_class(library.functions.llama_print_system_info().decode())
    return library


def _load_xllamacpp() -> Library | None:
    """The shared object is loaded as it is: the package around it imports a server, which nobody needs here."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        return None
    version = importlib.metadata.version("xllamacpp")
    if version != XLLAMACPP_VERSION:
        raise StartupFailed(f"xllamacpp {version} is installed, and this meshserve works with {XLLAMACPP_VERSION} only: {_INSTALL}")
    path = next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so"), None)
    if path is None:
        raise StartupFailed(f"xllamacpp {version} has no library for this system in {found.submodule_search_locations[0]}: {_INSTALL}")
    try:
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise StartupFailed(f"{path} cannot be loaded ({error}): {_INSTALL}") from error
    return _describe(handle, Batch, "xllamacpp", path)


def _load_llama_cpp_python() -> Library | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        module = importlib.import_module("llama_cpp.llama_cpp")
        missing = [name for name in _FUNCTIONS if not hasattr(module, name)]
        path = Path(module._lib._name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise StartupFailed(f"llama-cpp-python cannot be loaded ({error}): install it again, or {_INSTALL}") from error
    if missing:
        raise StartupFailed(f"llama-cpp-python is too old, it lacks {missing[0]}: upgrade it, or {_INSTALL}")
    return _describe(module, module.llama_batch, "llama-cpp-python", path)


def _describe(functions: Any, batch_type: type[Any], name: str, path: Path) -> Library:
    version = importlib.metadata.version(name)
    digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    return Library(functions, batch_type, f"{name} {version}", path, f"{name}-{version}-{digest[:16]}", "")


def _check_defaults(name: str, library: Library, expected: dict[str, object]) -> None:
    """Declarations of another build than the library's mean anything from a crash to other settings without a word."""
    params = getattr(library.functions, name)()
    declared = {found[0] for found in params._fields_}
    is_ours = isinstance(params, (ModelParams, ContextParams))
    for key, value in expected.items():
        if key in declared and bool(found := getattr(params, key)) | bool(value) and found != value:
            raise StartupFailed(f"{library.distribution} has other defaults than declared ({key} is {found}, not {value}): {_INSTALL}")
        if key not in declared and (is_ours or key in ("flash_attn_type", "swa_full", "kv_unified")):
            raise StartupFailed(f"{library.distribution} has no parameter {key}: {_INSTALL}")


def _processor_class(system_info: str) -> str:
    """`x86_64 CPU AVX2 FMA ...`, of `CPU : AVX2 = 1 | FMA = 1 | ... |`."""
    words = system_info.replace("=", " ").replace("|", " ").replace(":", " ").split()
    return " ".join([platform.machine(), *(word for word in words if word not in ("0", "1", "OPENMP"))])

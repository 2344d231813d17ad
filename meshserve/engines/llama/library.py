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
import mmap
import os
import platform
import re
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
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
# Below its own words: it warns of the usual, and each of its errors becomes an error of ours, in one line that says what to do.
_LOG_LEVELS = {3: logging.INFO, 4: logging.INFO}
_LOG_ERROR = 4
_logger = logging.getLogger(__name__)

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
AbortCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)


# The structs of the pinned build: kinds, and fields with llama.cpp's documented default where it is not 0, false or null. A field that is
# read at a wrong offset shows another value.
_MODEL_PARAMS = """
p devices tensor_buft_overrides | i n_gpu_layers=-1 split_mode=1 load_mode=-1 lazy_mode=1 main_gpu
p tensor_split progress_callback progress_callback_user_data kv_overrides
b vocab_only check_tensors use_extra_bufts=1 no_host no_alloc load_mtp"""
_CONTEXT_PARAMS = """
u n_ctx=512 n_batch=2048 n_ubatch=512 n_seq_max=1 n_rs_seq n_outputs_max n_outputs_max_per_seq=1
i n_threads=4 n_threads_batch=4 ctx_type rope_scaling_type=-1 pooling_type=-1 attention_type=-1 flash_attn_type=-1
f rope_freq_base rope_freq_scale yarn_ext_factor=-1 yarn_attn_factor=-1 yarn_beta_fast=-1 yarn_beta_slow=-1
u yarn_orig_ctx | f defrag_thold=-1 | p cb_eval cb_eval_user_data | i type_k=1 type_v=1 | z moe_cache_size
p abort_callback abort_callback_data | b embeddings offload_kqv=1 no_perf=1 op_offload=1 swa_full=1 kv_unified
p samplers | z n_samplers | p ctx_other"""
_KINDS = {"p": c_void_p, "i": c_int32, "u": c_uint32, "f": c_float, "b": c_bool, "z": c_size_t}
# What is set here, and must be as declared with the declarations of llama-cpp-python, too, whose version may be any.
_USED = (
    *("vocab_only", "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch"),
    *("flash_attn_type", "type_k", "type_v", "swa_full", "kv_unified"),
)


def _fields_of(declared: str) -> list[tuple[str, Any, float]]:
    """Name, type and default of each field."""
    groups = [group.split() for group in declared.replace("|", "\n").strip().splitlines()]
    pairs = [(_KINDS[kind], *field.partition("=")) for kind, *fields in groups for field in fields]
    return [(name, kind, float(default or 0)) for kind, name, _, default in pairs]


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = tuple((name, kind) for name, kind, _ in _fields_of(_MODEL_PARAMS))


class ContextParams(ctypes.Structure):
    """`struct llama_context_params`."""

    _fields_ = tuple((name, kind) for name, kind, _ in _fields_of(_CONTEXT_PARAMS))


class Batch(ctypes.Structure):
    """`struct llama_batch`: the tokens of one step."""

    _fields_ = (
        *(("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32))),
        *(("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8))),
    )


_BYTES = POINTER(c_uint8)
# result, arguments, the functions that have them
_SIGNATURES: tuple[tuple[Any, list[Any], str], ...] = (
    (None, [], "llama_backend_init"),
    (None, [LogCallback, c_void_p], "llama_log_set"),
    (c_char_p, [], "llama_print_system_info"),
    (ModelParams, [], "llama_model_default_params"),
    (ContextParams, [], "llama_context_default_params"),
    (c_void_p, [c_char_p, ModelParams], "llama_model_load_from_file"),
    (c_void_p, [c_void_p, ContextParams], "llama_init_from_model"),
    (None, [c_void_p], "llama_model_free llama_free"),
    (c_void_p, [c_void_p], "llama_model_get_vocab llama_get_memory"),
    (c_bool, [c_void_p], "llama_model_is_recurrent llama_model_is_hybrid llama_model_has_encoder llama_model_has_decoder"),
    (c_int32, [c_void_p], "llama_model_n_swa llama_vocab_n_tokens"),
    (c_bool, [c_void_p, c_int32], "llama_vocab_is_eog llama_vocab_is_control"),
    (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t], "llama_model_meta_val_str"),
    (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool], "llama_tokenize"),
    (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool], "llama_token_to_piece"),
    (c_uint32, [c_void_p], "llama_n_ctx llama_n_ctx_seq llama_n_batch llama_n_seq_max"),
    (None, [c_void_p, AbortCallback, c_void_p], "llama_set_abort_callback"),
    (None, [c_void_p, c_bool], "llama_memory_clear"),
    (None, [c_void_p, c_int32, c_int32, c_int32, c_int32], "llama_memory_seq_cp"),
    (c_bool, [c_void_p, c_int32, c_int32, c_int32], "llama_memory_seq_rm"),
    (c_int32, [c_void_p, Batch], "llama_decode"),
    (POINTER(c_float), [c_void_p, c_int32], "llama_get_logits_ith"),
    (c_size_t, [c_void_p, c_int32], "llama_state_seq_get_size"),
    (c_size_t, [c_void_p, _BYTES, c_size_t, c_int32], "llama_state_seq_get_data llama_state_seq_set_data"),
)


@dataclass(slots=True)
class Library:
    """llama.cpp, loaded. `functions` has its functions under their C names."""

    functions: Any
    batch_type: type[Any]
    distribution: str
    """What brought the library, and its version: `xllamacpp 2026.10.11549`."""
    build: str
    """Equal for two peers exactly if their libraries are the same file of the same distribution."""
    processor_class: str = ""
    """Backends and instruction sets in use. Peers of two classes accept each other's blocks, and their logits differ a little."""
    _first_error: str = ""
    _on_log: Any = None

    def take_error(self) -> str:
        """The first error that llama.cpp logged since the last call, for an error of ours: nothing else says why it refused something."""
        line, self._first_error = self._first_error, ""
        return line.rstrip(".") or "llama.cpp gives no reason"

    def route_log(self) -> None:
        """Send llama.cpp's log to Python's logging. Its lines come from any thread that calls llama.cpp. Called again before a model is
        loaded: another user of the library in this process may have taken the log.
        """
        if self._on_log is None:
            self._on_log = LogCallback(self._log_line)  # kept, since llama.cpp calls it until the process ends
        self.functions.llama_log_set(self._on_log, None)

    def _log_line(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == _LOG_ERROR and not self._first_error:
            self._first_error = line
        if line:
            _logger.log(_LOG_LEVELS.get(level, logging.DEBUG), "%s", line)


@functools.cache
def load_library() -> Library:
    """Load llama.cpp, once in a process. Raises StartupFailed with a line that says what to do."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    library = _load_xllamacpp() or _load_llama_cpp_python()
    if library is None:
        raise StartupFailed(f"llama.cpp is not installed: {_INSTALL}")
    check_defaults(library, library.functions.llama_model_default_params(), library.functions.llama_context_default_params())
    library.route_log()
    library.functions.llama_backend_init()
    words = re.split(r"[ =|:]+", library.functions.llama_print_system_info().decode())
    library.processor_class = " ".join([platform.machine(), *(word for word in words if word not in ("", "0", "1"))])
    return library


def _load_xllamacpp() -> Library | None:
    """Loads the shared object alone: the Python module in it starts a server's parts that nobody needs here."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        return None
    version = importlib.metadata.version("xllamacpp")
    if version != XLLAMACPP_VERSION:
        raise StartupFailed(f"xllamacpp {version} is installed, and this meshserve works with {XLLAMACPP_VERSION} only: {_INSTALL}")
    folder = Path(found.submodule_search_locations[0])
    try:
        path = next(folder.glob("xllamacpp*.so"))
        handle = ctypes.CDLL(str(path))
        for result, arguments, names in _SIGNATURES:
            for name in names.split():
                getattr(handle, name).restype, getattr(handle, name).argtypes = result, arguments
    except (StopIteration, OSError, AttributeError) as error:
        raise StartupFailed(f"the library in {folder} cannot be loaded ({error or 'there is none'}): {_INSTALL}") from error
    return Library(handle, Batch, f"xllamacpp {version}", f"xllamacpp-{version}-{_digest(path)}")


def _load_llama_cpp_python() -> Library | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        module = importlib.import_module("llama_cpp.llama_cpp")
        for name in " ".join(names for *_, names in _SIGNATURES).split():
            getattr(module, name)
        version, digest = importlib.metadata.version("llama-cpp-python"), _digest(Path(module._lib._name))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise StartupFailed(f"llama-cpp-python cannot be used ({error}): upgrade it, or {_INSTALL}") from error
    return Library(module, module.llama_batch, f"llama-cpp-python {version}", f"llama-cpp-python-{version}-{digest}")


def _digest(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # 100 MB that are loaded anyway
        return xxhash.xxh3_64_hexdigest(content)


def check_defaults(library: Library, model_params: Any, context_params: Any) -> None:
    """Compare defaults that the library returned with the documented ones. Raises StartupFailed if the declarations are another build's:
    anything can happen then, from a crash to other settings without a word.
    """
    for params, declared in ((model_params, _MODEL_PARAMS), (context_params, _CONTEXT_PARAMS)):
        is_ours = isinstance(params, (ModelParams, ContextParams))
        for name, _, default in _fields_of(declared):
            if (is_ours or name in _USED) and (getattr(params, name, float("nan")) or 0) != default:
                raise StartupFailed(f"{library.distribution} is not the build that was declared ({name} is not {default:g}): {_INSTALL}")

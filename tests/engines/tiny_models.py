"""Tiny models with random weights, one for each kind of KV cache: GGUF files of 1 to 6 MB, made in a fraction of a second.

llama.cpp itself says which tensors an architecture has, given its metadata; `gguf` writes the file. Weights are Q8_0 where llama.cpp
allows it, since results with F32 and F16 weights depend on the batch.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from meshserve.engines.llama.library import load_library

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
_CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_WORDS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)] + ["▁", "▁t", "▁th", "▁the", "he", "re", "in", "an", "er"]
EMBEDDING, VOCABULARY = 128, 512


_MATRICES = ("attn_", "ffn_", "token_embd", "output", "in_proj", "out_proj", "ssm_in", "ssm_out", "ssm_x", "ssm_dt")


@dataclass(frozen=True)
class TinyModel:
    """What an architecture needs beyond what all have."""

    architecture: str
    values: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 2


DENSE = TinyModel("llama")
MODELS = {
    "dense": DENSE,
    "moe": TinyModel("qwen3moe", {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}),
    "sliding-window": TinyModel("gemma3", {"attention.sliding_window": 80}, num_layers=6),
    "hybrid": TinyModel("lfm2", {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2]}),
    "recurrent": TinyModel(
        "mamba", {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * EMBEDDING, "ssm.state_size": 16, "ssm.time_step_rank": 32}
    ),
    "embedding": TinyModel("llama", {"attention.causal": False}),
}


def make_model(path: Path, model: TinyModel = DENSE, *, seed: int = 1, tensors_per_file: int = 0) -> Path:
    """Write the model's file, the same for the same seed. With `tensors_per_file`, several files; returns the first one's path."""
    bare = path.with_suffix(".bare")
    write_file(bare, model, {})
    random = np.random.default_rng(seed)
    tensors = {name: _weights(name, shape, random) for name, shape in sorted(_tensors_of(bare).items()) if _is_needed(name)}
    write_file(path, model, tensors, tensors_per_file)
    bare.unlink()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if tensors_per_file else path


def _is_needed(name: str) -> bool:
    """Not the tensors that llama.cpp also takes: biases and scales, and layers that few models of the architecture have."""
    return ("ssm_" in name and "scale" not in name) or (name.endswith(".weight") and not name.startswith(("rope_freqs", "dense_2")))


def _weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.abs(values)  # a state that decays
    return 1 + values * 0.1 if "norm" in name else values * 0.08 if len(shape) > 1 else values * 0.02


def write_file(path: Path, model: TinyModel, tensors: dict[str, np.ndarray[Any, Any]], tensors_per_file: int = 0) -> None:
    """Write metadata, vocabulary and these tensors; without tensors, a file for the vocabulary only."""
    writer = gguf.GGUFWriter(path, model.architecture, split_max_tensors=tensors_per_file)
    writer.add_name(f"tiny {model.architecture}")
    shared = {
        "context_length": 4096, "embedding_length": EMBEDDING, "block_count": model.num_layers, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32,
        "rope.dimension_count": 32, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": VOCABULARY,
    }  # fmt: skip
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
    }  # fmt: skip
    for key, value in {**shared, **model.values}.items():
        adders[type(value)](f"{model.architecture}.{key}", value)
    _write_vocabulary(writer)
    for name, values in tensors.items():
        _add_tensor(writer, name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any]) -> None:
    part = name.split(".")[-2]
    can_quantize = part.startswith(_MATRICES) and "norm" not in part and part != "ffn_gate_inp"
    if can_quantize and values.ndim > 1 and values.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """All bytes, so that any text has tokens, and some pieces that they merge into."""
    pieces = ["<unk>", *_CONTROL, *(f"<0x{value:02X}>" for value in range(256)), *_WORDS]
    pieces += [f"▁word{number}" for number in range(VOCABULARY - len(pieces))]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * len(_CONTROL) + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    # no two scores are equal: of overlapping pieces, a tokenizer.json could not say which of two equal ones comes first
    writer.add_token_scores([len(piece) - index / 1024 for index, piece in enumerate(pieces)])
    writer.add_token_types(kinds)
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors_of(bare: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that llama.cpp makes for this metadata."""
    handle = load_library().functions
    found: dict[str, tuple[int, ...]] = {}

    def on_tensor(tensor: int, _: object) -> None:
        sizes = (ctypes.c_int64 * 4).from_address(tensor + 16)  # `ne`, which follows the type and a pointer
        shape = list(reversed(sizes))
        while len(shape) > 1 and shape[0] == 1:
            shape.pop(0)
        found[name_of(tensor).decode()] = tuple(shape)

    class InitParams(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]  # ctypes reads the list once

    name_of = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(ctypes.cast(handle.ggml_get_name, ctypes.c_void_p).value or 0)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(on_tensor)
    handle.gguf_init_from_file.restype = handle.llama_model_init_from_user.restype = ctypes.c_void_p
    metadata = ctypes.c_void_p(handle.gguf_init_from_file(str(bare).encode(), InitParams(True, None)))
    model = handle.llama_model_init_from_user(metadata, callback, None, handle.llama_model_default_params())
    assert model, load_library().take_error()
    handle.llama_model_free(model)
    handle.gguf_free(metadata)
    return found

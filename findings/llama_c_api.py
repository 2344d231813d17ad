"""What the scripts named llama_* share: llama.cpp's C API as in the wheel xllamacpp 2026.10.11549, and small models of random weights.

Needs xllamacpp, gguf and numpy. The structs are those of this build only.
"""

import ctypes as c
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

F32, F16, Q8_0 = 0, 1, 8
WIDTH, VOCABULARY, WINDOW = 128, 512, 80
TEXT = [int(token) for token in np.random.default_rng(2).integers(0, VOCABULARY, 512)]


def struct(groups: str) -> type:
    """A C struct: each group names the kind of its fields, then the fields."""
    kinds = {"p": c.c_void_p, "i": c.c_int32, "u": c.c_uint32, "f": c.c_float, "b": c.c_bool, "z": c.c_size_t}
    fields = [(name, kinds[kind]) for kind, *names in map(str.split, groups.split("|")) for name in names]
    return type("Struct", (c.Structure,), {"_fields_": fields})


ModelParams = struct("p m1 m2 | i m3 m4 m5 m6 m7 | p m8 m9 ma mb | b vocab_only mc md me mf mg")
ContextParams = struct("""u n_ctx n_batch n_ubatch n_seq_max c1 c2 c3 | i n_threads n_threads_batch c4 c5 c6 c7 flash_attn | f c8 c9 ca cb
    cc cd | u ce | f cf | p cg ch | i type_k type_v | z ci | p cj ck | b cl cm cn co swa_full kv_unified | p cp | z cq | p cr""")
Batch = struct("i num_tokens | p tokens embeddings positions num_sequences sequences outputs")
library = c.CDLL(str(next(Path(find_spec("xllamacpp").origin).parent.glob("*.so"))))
silent = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda level, text, data: None)


def call(name: str, result: type | None, *arguments):
    """Call a C function. Plain integers are C ints; pointers and structs come as such."""
    function = library[name]
    function.restype = result
    return function(*arguments)


def load_model(path: str, *, vocab_only: bool = False) -> c.c_void_p:
    call("llama_log_set", None, silent, None)
    call("llama_backend_init", None)
    params = call("llama_model_default_params", ModelParams)
    params.vocab_only = vocab_only
    return c.c_void_p(call("llama_model_load_from_file", c.c_void_p, path.encode(), params))


class Context:
    """A context of 1,024 cells with flash attention, for one thread and up to four sequences."""

    def __init__(self, model: c.c_void_p, cache_type: int) -> None:
        params = call("llama_context_default_params", ContextParams)
        params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified, params.swa_full = 1024, 512, 4, True, True
        params.n_threads, params.n_threads_batch, params.flash_attn, params.type_k, params.type_v = 1, 1, 1, cache_type, cache_type
        self.pointer = c.c_void_p(call("llama_init_from_model", c.c_void_p, model, params))
        self.memory = c.c_void_p(call("llama_get_memory", c.c_void_p, self.pointer))

    def compute(self, first: int, tokens: list[int], sequence: int = 0) -> np.ndarray:
        """Compute tokens in one batch, the first one at this position. Returns the logits of the last one."""
        count, number = len(tokens), c.c_int32(sequence)
        arrays = ((c.c_int32 * count)(*tokens), (c.c_int32 * count)(*range(first, first + count)), (c.c_int32 * count)(*[1] * count),
                  (c.c_void_p * count)(*[c.addressof(number)] * count), (c.c_int8 * count)(*[0] * (count - 1), 1))  # fmt: skip
        token, position, ones, sequences, outputs = map(c.addressof, arrays)
        assert call("llama_decode", c.c_int32, self.pointer, Batch(count, token, None, position, ones, sequences, outputs)) == 0
        return np.ctypeslib.as_array(call("llama_get_logits_ith", c.POINTER(c.c_float), self.pointer, -1), (VOCABULARY,)).copy()

    def remove(self, sequence: int, first: int) -> bool:
        """Remove a sequence's cells from this position on."""
        return call("llama_memory_seq_rm", c.c_bool, self.memory, sequence, first, -1)

    def state(self, sequence: int = 0) -> bytes:
        content = c.create_string_buffer(call("llama_state_seq_get_size", c.c_size_t, self.pointer, sequence))
        size = call("llama_state_seq_get_data", c.c_size_t, self.pointer, content, c.c_size_t(len(content)), sequence)
        return content.raw[:size]

    def set_state(self, content: bytes, sequence: int = 0) -> bool:
        return call("llama_state_seq_set_data", c.c_size_t, self.pointer, content, c.c_size_t(len(content)), sequence) == len(content)


def write_model(path: str, architecture: str = "llama", num_layers: int = 2) -> None:
    """A model with random weights in Q8_0 and no vocabulary: "llama", or "gemma3", where five of six layers attend to a window only."""
    random, writer, kind = np.random.default_rng(1), gguf.GGUFWriter(path, architecture), gguf.GGMLQuantizationType.Q8_0
    sizes = {"context_length": 1024, "embedding_length": WIDTH, "block_count": num_layers, "feed_forward_length": 256}
    attention = {"head_count": 4, "head_count_kv": 2, "key_length": 32, "value_length": 32, "sliding_window": WINDOW}
    sizes |= {"vocab_size": VOCABULARY, "rope.dimension_count": 32}
    for name, value in (sizes | {f"attention.{name}": value for name, value in attention.items()}).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("none")
    in_layer = {"attn_q": (128, WIDTH), "attn_k": (64, WIDTH), "attn_v": (64, WIDTH), "attn_output": (WIDTH, 128), "attn_norm": WIDTH,
                "ffn_gate": (256, WIDTH), "ffn_up": (256, WIDTH), "ffn_down": (WIDTH, 256), "ffn_norm": WIDTH}  # fmt: skip
    if architecture == "gemma3":
        in_layer |= {"attn_q_norm": 32, "attn_k_norm": 32, "post_attention_norm": WIDTH, "post_ffw_norm": WIDTH}
    shapes = {f"blk.{layer}.{name}": shape for layer in range(num_layers) for name, shape in in_layer.items()}
    for name, shape in (shapes | {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": WIDTH}).items():
        if isinstance(shape, int):
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            values = gguf.quants.quantize(random.standard_normal(shape, np.float32) * np.float32(0.08), kind)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    save(writer)


def save(writer: gguf.GGUFWriter) -> None:
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()

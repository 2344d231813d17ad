"""What the command line and the model's file say about a llama engine, before the model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.engines.core.scheduler import StepLimits
from meshserve.engines.llama.context import MAX_CELLS
from meshserve.engines.llama.host import available_bytes, num_engine_threads
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers.directory import describe_files
from meshserve.engines.tokenizers.gguf import GgufFile, model_hash, read_gguf
from meshserve.engines.tokenizers.gguf_vocabulary import tokenizer_files
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.errors import StartupFailed, TokenizerFailed, UsageError
from meshserve.wire.card import ModelCard

BLOCK_TOKENS = 64
_MOST_CONTEXTS, _MEMORY_SHARE = 8, 4
"""The KV cache takes the lesser of so many full contexts, and of this part of the memory that is available."""
_BYTES_PER_VALUE = {"q8_0": 34 / 32, "f16": 2.0}
_BOUNDS = {"threads": (1, 512), "max_running": (1, 128), "slots": (2, 255), "context_length": (BLOCK_TOKENS, 1 << 24)}
"""Options and their bounds. `slots`: sequences that run, wait with their KV, or are kept as cached chains."""
FEATURES = ("logprobs", "penalties", "logit_bias", "json_schema", "regex", "tool_text")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """All that is known of the model and its KV cache before it is loaded."""

    path: Path
    card: ModelCard
    files: Mapping[str, bytes]
    vocab_size: int
    kv_type: str
    kv_bytes_per_token: int
    num_blocks: int
    num_slots: int
    num_threads: int
    limits: StepLimits
    block_size: int = BLOCK_TOKENS


def parse_options(options: EngineOptions) -> LlamaOptions:
    """Read the file's header. Raises UsageError for options that will not do, StartupFailed for a file that will not."""
    if not options.model:
        raise UsageError("the engine llama needs --model: a .gguf file, hf:ORG/REPO[:FILE or quantization], or smollm2")
    given = {name: _number(name, text) for name, text in options.options.items()}
    path, kv_type = Path(options.model), options.kv_type or "q8_0"
    gguf = read_gguf(path)
    bytes_per_token = _kv_bytes_per_token(gguf, kv_type)
    context_length = given.get("context_length") or gguf.context_length or 4096
    num_blocks = _num_blocks(options.kv_cache_tokens, context_length, bytes_per_token)
    files = _tokenizer_files(gguf)
    num_slots, max_running = given.get("slots", 63), given.get("max_running", 16)
    if num_slots < 2 * max_running:
        raise UsageError(f"the engine llama's option slots is at least twice max_running, {2 * max_running}, not {num_slots}")
    return LlamaOptions(
        path,
        _card(path, gguf, files, min(context_length, num_blocks * BLOCK_TOKENS)),
        {described.sha256: files[described.name] for described in describe_files(files)},
        len(gguf.metadata["tokenizer.ggml.tokens"]),
        kv_type,
        bytes_per_token,
        num_blocks,
        num_slots,
        given.get("threads") or num_engine_threads(),
        StepLimits(max_running, max_running + BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_TOKENS // 4, BLOCK_TOKENS),
    )


def _number(name: str, text: str) -> int:
    if name not in _BOUNDS:
        raise UsageError(f"the engine llama has no option {name!r}; it knows {', '.join(_BOUNDS)}")
    least, most = _BOUNDS[name]
    if not text.isdigit() or not least <= int(text) <= most:
        raise UsageError(f"the engine llama's option {name} is a whole number from {least} to {most}, not {text!r}")
    return int(text)


def _kv_bytes_per_token(gguf: GgufFile, kv_type: str) -> int:
    """Of the attention layers that the header tells of; what else a model keeps is small, or is one state a sequence."""
    width = gguf.number("attention.key_length") + gguf.number("attention.value_length")
    if not width and gguf.number("attention.head_count"):
        width = 2 * gguf.number("embedding_length") // gguf.number("attention.head_count")
    return max(1, round(sum(gguf.kv_heads) * width * _BYTES_PER_VALUE[kv_type]))


def _num_blocks(asked_tokens: int | None, context_length: int, bytes_per_token: int) -> int:
    if asked_tokens is not None:
        _check_asked(asked_tokens, bytes_per_token)
        return asked_tokens // BLOCK_TOKENS
    fitting = available_bytes() // _MEMORY_SHARE // bytes_per_token
    if fitting < 4 * BLOCK_TOKENS:
        raise StartupFailed(f"there is room for a KV cache of {fitting} tokens only: end other programs, or use a smaller model")
    return min(_MOST_CONTEXTS * context_length, fitting) // BLOCK_TOKENS


def _check_asked(num_tokens: int, bytes_per_token: int) -> None:
    """The library takes memory that the system then fails to give: the system would end this process, or another one."""
    if not 2 * BLOCK_TOKENS <= num_tokens <= MAX_CELLS:
        raise UsageError(f"--kv-cache-tokens is from {2 * BLOCK_TOKENS} to {MAX_CELLS} for a real model, not {num_tokens}")
    size_bytes, free_bytes = num_tokens * bytes_per_token, available_bytes()
    if size_bytes > free_bytes:
        raise StartupFailed(
            f"--kv-cache-tokens {num_tokens} take {size_bytes / 1e9:.1f} GB of memory, and {free_bytes / 1e9:.1f} GB are available:"
            f" lower it to {free_bytes // _MEMORY_SHARE // bytes_per_token} or less, or end other programs"
        )


def _tokenizer_files(gguf: GgufFile) -> dict[str, bytes]:
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        raise StartupFailed(f"{gguf.path} has no vocabulary: use a model that generates text")
    try:
        return tokenizer_files(gguf.metadata)
    except TokenizerFailed as error:
        raise StartupFailed(f"{gguf.path}: {error.message}") from error


def _card(path: Path, gguf: GgufFile, files: Mapping[str, bytes], context_length: int) -> ModelCard:
    settings = TextSettings.of_files(files)
    return ModelCard(
        model=path.stem,
        model_hash=model_hash(path),
        context_length=context_length,
        tokenizer="huggingface",
        chat_template="",
        sampling_defaults=settings.sampling_defaults,
        features=FEATURES,
        files=describe_files(files),
    )


def as_text(options: LlamaOptions) -> dict[str, Any]:
    """For the line at start that says how much memory and how many threads the engine takes."""
    tokens = options.num_blocks * options.block_size
    return {
        "model": options.card.model,
        "kv_cache_tokens": tokens,
        "kv_cache_mb": round(tokens * options.kv_bytes_per_token / 1e6),
        "kv_type": options.kv_type,
        "threads": options.num_threads,
    }

"""What the command line and the model's file say about a llama engine, before the model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshserve.engines.budget import claim_kv_cache
from meshserve.engines.claims import Claim
from meshserve.engines.core.scheduler import StepLimits
from meshserve.engines.llama.context import MAX_CELLS
from meshserve.engines.llama.slots import num_spare_cells
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers.directory import describe_files
from meshserve.engines.tokenizers.gguf import GgufFile, model_hash, read_gguf
from meshserve.engines.tokenizers.gguf_vocabulary import tokenizer_files
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.errors import StartupFailed, TokenizerFailed, UsageError
from meshserve.wire.card import ModelCard
from meshserve.wire.structs import replace

BLOCK_TOKENS = 64
_USUAL_CONTEXT = 4096
"""Of a model that does not say how long its context is."""
_USUAL_KV_TYPE = "q8_0"
_BYTES_PER_VALUE = {"q8_0": 34 / 32, "f16": 2.0}
_BOUNDS = {"threads": (1, 512), "max_running": (1, 128), "slots": (2, 254), "context_length": (BLOCK_TOKENS, 1 << 24)}
"""Options and their bounds. `slots`: sequences that run, wait with their KV, or are kept as cached chains."""
_MOST_DIGITS = 20
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
    asked_context_length: int
    """Tokens that a sequence could have in a larger KV cache."""
    block_size: int = BLOCK_TOKENS

    @property
    def num_cells(self) -> int:
        """Of llama.cpp's KV cache: those of the blocks, and the spare ones."""
        return self.num_blocks * self.block_size + num_spare_cells(self.num_blocks, self.block_size, self.limits.max_step_tokens)

    @property
    def kv_cache_bytes(self) -> int:
        """That all of them take."""
        return self.num_cells * self.kv_bytes_per_token


def parse_options(options: EngineOptions, claim: Claim) -> LlamaOptions:
    """Read the file's header, and claim memory and threads.

    Raises UsageError for options that will not do, StartupFailed for a file that will not; nothing is claimed then.
    """
    if not options.model:
        raise UsageError("the engine llama needs --model: a .gguf file, hf:ORG/REPO[:FILE or quantization], or smollm2")
    given = {name: _number(name, text) for name, text in options.options.items()}
    num_slots, max_running = given.get("slots", 63), given.get("max_running", 16)
    if num_slots < 2 * max_running:
        raise UsageError(f"the engine llama's option slots is at least twice max_running, {2 * max_running}, not {num_slots}")
    if (options.kv_cache_tokens or 0) > MAX_CELLS:
        raise UsageError(f"--kv-cache-tokens is at most {MAX_CELLS}, not {options.kv_cache_tokens}")
    path, kv_type = Path(options.model), options.kv_type or _USUAL_KV_TYPE
    gguf = read_gguf(path)
    files = _tokenizer_files(gguf)
    bytes_per_token = _kv_bytes_per_token(gguf, kv_type)
    card = _card(gguf, files, _context_length(gguf, given.get("context_length")))
    num_blocks, num_threads = claim_kv_cache(
        claim,
        context_length=card.context_length,
        bytes_per_token=bytes_per_token,
        block_size=BLOCK_TOKENS,
        asked_tokens=options.kv_cache_tokens,
        asked_threads=given.get("threads"),
    )
    return LlamaOptions(
        path,
        replace(card, context_length=min(card.context_length, num_blocks * BLOCK_TOKENS)),
        {described.sha256: files[described.name] for described in card.files},
        len(gguf.metadata["tokenizer.ggml.tokens"]),
        kv_type,
        bytes_per_token,
        num_blocks,
        num_slots,
        num_threads,
        StepLimits(max_running, max_running + BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_TOKENS // 2, BLOCK_TOKENS),
        card.context_length,
    )


def fair_share(path: Path, num_engines: int) -> tuple[int, int]:
    """Tokens of KV cache and threads for each of several engines that start together: what one alone would take, divided.

    Raises StartupFailed for a file that will not do.
    """
    gguf, claim = read_gguf(path), Claim()
    num_blocks, num_threads = claim_kv_cache(
        claim,
        context_length=_context_length(gguf, None),
        bytes_per_token=_kv_bytes_per_token(gguf, _USUAL_KV_TYPE),
        block_size=BLOCK_TOKENS,
    )
    claim.update(None)  # each of them claims its own part
    return max(2, num_blocks // num_engines) * BLOCK_TOKENS, max(1, num_threads // num_engines)


def _number(name: str, text: str) -> int:
    if name not in _BOUNDS:
        raise UsageError(f"the engine llama has no option {name!r}; it knows {', '.join(_BOUNDS)}")
    least, most = _BOUNDS[name]
    if not (text.isascii() and text.isdecimal()) or len(text) > _MOST_DIGITS or not least <= int(text) <= most:
        raise UsageError(f"the engine llama's option {name} is a whole number from {least} to {most}, not {text!r}")
    return int(text)


def _context_length(gguf: GgufFile, asked: int | None) -> int:
    own = gguf.context_length or _USUAL_CONTEXT
    if own < BLOCK_TOKENS:
        raise StartupFailed(f"{gguf.path} has a context of {own} tokens, and {BLOCK_TOKENS} are the least: use another model")
    if asked is not None and gguf.context_length and asked > own:
        raise UsageError(f"the engine llama's option context_length is at most the model's own, {own}, not {asked}")
    return asked or own


def _kv_bytes_per_token(gguf: GgufFile, kv_type: str) -> int:
    return max(1, round(gguf.kv_values_per_token() * _BYTES_PER_VALUE[kv_type]))


def _tokenizer_files(gguf: GgufFile) -> dict[str, bytes]:
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        raise StartupFailed(f"{gguf.path} has no vocabulary: use a model that generates text")
    try:
        return tokenizer_files(gguf.metadata)
    except TokenizerFailed as error:
        raise StartupFailed(f"{gguf.path}: {error.message}") from error


def _card(gguf: GgufFile, files: Mapping[str, bytes], context_length: int) -> ModelCard:
    settings = TextSettings.of_files(files)
    return ModelCard(
        model=gguf.path.stem,
        model_hash=model_hash(gguf.parts),
        context_length=context_length,
        tokenizer="huggingface",
        chat_template="",
        sampling_defaults=settings.sampling_defaults,
        features=FEATURES,
        files=describe_files(files),
    )


_ABOUT_TYPE = {
    "q8_0": "q8_0: half of f16, and exact after a handoff; prompts beyond 2,000 tokens go on at a third of f16's speed",
    "f16": "f16: twice q8_0, and faster with long prompts; the text can depend on how a prompt was cut and handed over",
}


def describe(options: LlamaOptions, name: str, refusal: str) -> str:
    """What the engine takes of its host, in one line for people; `refusal` says why its KV cannot be handed over, if so."""
    tokens = options.num_blocks * options.block_size
    size_mb = options.kv_cache_bytes / 1e6
    threads = f"{options.num_threads} thread{'s' if options.num_threads > 1 else ''}"
    handoff = f"its KV cannot be handed over: {refusal}" if refusal else "its KV can be handed over"
    if options.asked_context_length > tokens:
        handoff += f"; sequences end at {tokens:,} of {options.asked_context_length:,} tokens: raise --kv-cache-tokens for longer ones"
    return f"{name}: KV cache of {tokens:,} tokens, {size_mb:,.0f} MB ({_ABOUT_TYPE[options.kv_type]}), {threads}; {handoff}"

"""What `--engine-opt` may say to the dummy engine, and the timing of the hardware that it plays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xxhash

from meshserve.engines.dummy.script import TEMPLATE, Script, read_script
from meshserve.engines.dummy.vocabulary import OWN_VOCABULARY, VocabularyMap, map_vocabulary
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers import load_tokenizer
from meshserve.engines.tokenizers.directory import describe_files, read_directory
from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.errors import TokenizerFailed, UsageError
from meshserve.wire.card import ModelCard

_OUTPUT_VERSION = 2
"""Raise it with any change that makes other KV bytes or other tokens: peers of two versions must not share KV."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A step takes the prefill time of all its new prompt tokens together plus, if any sequence decodes, the decode time.

    With n new prompt tokens: `prefill_base_ms` + `prefill_ms_per_token` n + `prefill_ms_per_token2` n^2. At KV occupancy u
    (0 to 1): `decode_base_ms` + `decode_ms_by_occupancy` u + `decode_ms_by_occupancy2` u^2.
    """

    prefill_base_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_token2: float = 0.0
    decode_base_ms: float = 0.0
    decode_ms_by_occupancy: float = 0.0
    decode_ms_by_occupancy2: float = 0.0

    def step_s(self, num_prompt_tokens: int, num_decodes: int, occupancy: float) -> float:
        """Seconds of a step that computes so many prompt tokens and has so many sequences decoding."""
        milliseconds = 0.0
        if num_prompt_tokens:
            n = num_prompt_tokens
            milliseconds += self.prefill_base_ms + self.prefill_ms_per_token * n + self.prefill_ms_per_token2 * n * n
        if num_decodes:
            u = min(1.0, occupancy)
            milliseconds += self.decode_base_ms + self.decode_ms_by_occupancy * u + self.decode_ms_by_occupancy2 * u * u
        return milliseconds / 1000

    def with_options(self, step_ms: float, prefill_tokens_per_s: float) -> "Timing":
        """The same hardware with `step_ms` more a decode step and, unless it is 0, prefill at a constant rate instead."""
        timing = replace(self, decode_base_ms=self.decode_base_ms + step_ms)
        if not prefill_tokens_per_s:
            return timing
        return replace(timing, prefill_base_ms=0.0, prefill_ms_per_token=1000 / prefill_tokens_per_s, prefill_ms_per_token2=0.0)


PROFILES: dict[str, Timing] = {
    # measures the mesh, not the engine
    "instant": Timing(),
    # the default performance model of NVIDIA Dynamo's mocker, as the results of its offline replay show it
    "reference": Timing(16.50142, 0.01518344, 4.209989e-7, 5.74, 54.01, -25.74),
    # Llama-3.3-70B in fp8 on two H100 80G, from NVIDIA's published NIM performance tables (docs.nvidia.com/nim/benchmarking/llm/1.0.0/
    # performance, NIM 1.8.0, one request at a time): a line through the times to the first token at 500 and 5000 input tokens
    # (47.77 and 406.77 ms), and the time between tokens (18.58 ms). Flat in occupancy: the table's growth with load is mostly prefill
    "2xh100-llama3.3-70b": Timing(7.88, 0.079778, 0.0, 18.58),
}
"""By the name that the option `profile` takes."""


@dataclass(frozen=True, slots=True)
class DummyOptions:
    """The options and their defaults."""

    profile: str = "instant"
    """Whose timing to play: a key of `PROFILES`."""
    kv_bytes_per_token: int = 1024
    """Bytes; real models have 20 to 500 KiB. More makes the handoff heavier."""
    block_size: int = 16
    """Tokens a block. Larger blocks are cheaper to handle and are reused less."""
    num_blocks: int = 4096
    """KV cache size; memory is taken as blocks are used."""
    max_batch: int = 256
    """Sequences a step."""
    max_batch_tokens: int = 8192
    """Tokens a step: more computes prompts sooner, and makes running sequences wait longer for them."""
    context_length: int = 131072
    """Tokens, prompt and output together."""
    step_ms: float = 0.0
    """Milliseconds more for every decode step."""
    prefill_tokens_per_s: float = 0.0
    """Constant prefill rate; 0 leaves it to the profile."""
    tokenizer: str = "bytes"
    """`bytes`, the dummy model's own, or a directory with a model's `tokenizer.json`, whose tokens it then writes."""
    script: Script | None = None
    """A file with what the model says and calls, turn by turn; a model with a script writes calls as text."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Not an option: what that directory holds, by name."""
    vocabulary: VocabularyMap = OWN_VOCABULARY
    """Not an option: what the model writes in, as these files have it."""

    def timing(self) -> Timing:
        """The timing that these options ask for."""
        return PROFILES[self.profile].with_options(self.step_ms, self.prefill_tokens_per_s)

    def card(self, model: str) -> ModelCard:
        """The card of a dummy model of this name. Its hash covers whatever changes tokens or KV, and no timing."""
        settings, files = TextSettings.of_files(self.files), describe_files(self.files)
        tokenizer = "/".join(["bytes", *(file.sha256 for file in files)])
        identity = f"dummy/{_OUTPUT_VERSION}/{model}/{self.kv_bytes_per_token}/{self.block_size}/{tokenizer}/{self.context_length}"
        identity += f"/{self.script.digest}" if self.script is not None else ""
        # without the letters one by one no document can be written
        constraints = ("json_schema", "regex", "tools") if self.vocabulary.can_write_ascii else ()
        template = CHAT_TEMPLATE if self.script is None else TEMPLATE
        return ModelCard(
            model=model,
            model_hash=xxhash.xxh3_128_hexdigest(identity.encode()),
            context_length=self.context_length,
            tokenizer="huggingface" if files else "bytes",
            chat_template="" if settings.chat_templates else template,
            sampling_defaults=settings.sampling_defaults,
            features=("logprobs", "penalties", "logit_bias", *constraints, *(("tool_text",) if self.script else ())),
            files=files,
        )


def parse_options(options: EngineOptions) -> DummyOptions:
    """Raises UsageError, in one sentence, for an unknown key or a value that will not do."""
    known = [found.name for found in fields(DummyOptions) if found.name not in ("files", "vocabulary")]
    values: dict[str, Any] = {}
    for key, text in options.options.items():
        if key not in known:
            raise UsageError(f"the dummy engine has no option {key!r}; it knows {', '.join(known)}")
        values[key] = _parse(key, text)
    if values.get("tokenizer", "bytes") != "bytes":
        values |= _read_model(values["tokenizer"])
    if "script" in values and values.get("files"):
        raise UsageError("the dummy engine's option script goes with the tokenizer bytes only: leave one of them out")
    if options.kv_type is not None:
        raise UsageError("the dummy engine has no --kv-type: its KV cache is bytes of its own; leave it out")
    parsed = DummyOptions(**values)
    return parsed if options.kv_cache_tokens is None else _sized(parsed, options.kv_cache_tokens, "num_blocks" in values)


def _sized(parsed: DummyOptions, num_tokens: int, is_sized: bool) -> DummyOptions:
    """With a pool of so many tokens in whole blocks."""
    if is_sized:
        raise UsageError("--kv-cache-tokens and the dummy engine's option num_blocks say the same: leave one of them out")
    if num_tokens < parsed.block_size:
        raise UsageError(f"--kv-cache-tokens {num_tokens} is less than the dummy engine's one block of {parsed.block_size} tokens")
    return replace(parsed, num_blocks=num_tokens // parsed.block_size)


def _read_model(directory: str) -> dict[str, Any]:
    try:
        files = read_directory(Path(directory))
        TextSettings.of_files(files)
        return {"files": files, "vocabulary": map_vocabulary(load_tokenizer("huggingface", files))}
    except TokenizerFailed as error:
        raise UsageError(f"the dummy engine's option tokenizer: {error.message}") from error


def _parse(key: str, text: str) -> Any:
    if key == "script":
        return read_script(Path(text))
    if key == "profile":
        if text not in PROFILES:
            raise UsageError(f"the dummy engine's option {key} is one of {', '.join(PROFILES)}, not {text!r}")
        return text
    if key == "tokenizer":
        if text != "bytes" and not Path(text).is_dir():
            raise UsageError(f"the dummy engine's option {key} is one of bytes, or a directory with a tokenizer.json, not {text!r}")
        return text
    is_time = key in ("step_ms", "prefill_tokens_per_s")
    parse: Callable[[str], float] = float if is_time else int
    try:
        value = parse(text)
    except ValueError:
        value = -1
    if not (0 if is_time else 1) <= value < 2**40:
        kind = "a number that is not negative" if is_time else "a whole number of at least 1"
        raise UsageError(f"the dummy engine's option {key} is {kind}, not {text!r}")
    return value

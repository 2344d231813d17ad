"""What `--engine-opt` may say to the dummy engine."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from meshserve.engines.dummy.timing import PROFILES, Timing
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import UsageError
from meshserve.wire.card import FEATURES, ModelCard

_CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
_OUTPUT_VERSION = 1
"""Raise it with any change that makes other KV bytes or other tokens: peers of two versions must not share KV."""


@dataclass(frozen=True, slots=True)
class DummyOptions:
    """The options and their defaults."""

    profile: str = "instant"
    """Whose timing to play: a key of `timing.PROFILES`."""
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
    """Only `bytes`, the dummy model's own."""

    def timing(self) -> Timing:
        """The timing that these options ask for."""
        return PROFILES[self.profile].with_options(self.step_ms, self.prefill_tokens_per_s)

    def card(self, model: str) -> ModelCard:
        """The card of a dummy model of this name. Its hash covers whatever changes tokens or KV, and no timing."""
        identity = f"dummy/{_OUTPUT_VERSION}/{model}/{self.kv_bytes_per_token}/{self.block_size}/{self.tokenizer}/{self.context_length}"
        return ModelCard(
            model=model,
            model_hash=xxhash.xxh3_128_hexdigest(identity.encode()),
            context_length=self.context_length,
            tokenizer=self.tokenizer,
            chat_template=_CHAT_TEMPLATE,
            default_temperature=0.0,
            layers=1,
            dtype="uint8",
            kv_bytes_per_token=self.kv_bytes_per_token,
            block_size=self.block_size,
            can_hand_over=True,
            features=FEATURES,
        )


def parse_options(options: EngineOptions) -> DummyOptions:
    """Raises UsageError, in one sentence, for an unknown key or a value that will not do."""
    known = [found.name for found in fields(DummyOptions)]
    values = {}
    for key, text in options.options.items():
        if key not in known:
            raise UsageError(f"the dummy engine has no option {key!r}; it knows {', '.join(known)}")
        values[key] = _parse(key, text)
    return DummyOptions(**values)


def _parse(key: str, text: str) -> Any:
    choices = {"profile": list(PROFILES), "tokenizer": ["bytes"]}.get(key)
    if choices:
        if text not in choices:
            raise UsageError(f"the dummy engine's option {key} is one of {', '.join(choices)}, not {text!r}")
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

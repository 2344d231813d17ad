"""What the small files beside a `tokenizer.json` say: chat templates, special tokens, the end of a sequence. Pure."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshserve.errors import ProtocolError, TokenizerFailed
from meshserve.wire.generation import SamplingDefaults
from meshserve.wire.structs import asdict

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which templates know them."""
_MAX_TEMPERATURE = 100.0
"""A higher one is a mistake in the file."""


@dataclass(frozen=True, slots=True)
class TextSettings:
    """Of one model."""

    chat_templates: dict[str, str] = field(default_factory=dict)
    """Jinja by name; `default` is for all chats for which there is no better."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """By :data:`SPECIAL_TOKENS`; what the model does not have is left out."""
    add_bos_token: bool | None = None
    """Whether a text starts with the beginning of sequence; None: as `tokenizer.json` has it."""
    eos_ids: tuple[int, ...] = ()
    """What `generation_config.json` lets a sequence end with."""
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Of `generation_config.json`. Greedy if it says nothing, or that the model does not sample."""

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "TextSettings":
        """Read the files that are there. Raises TokenizerFailed for one that is not what its name says."""
        tokenizer = _parse(files, "tokenizer_config.json")
        generation = _parse(files, "generation_config.json")
        add_bos_token = tokenizer.get("add_bos_token")
        return cls(
            _templates(tokenizer.get("chat_template"), files.get("chat_template.jinja")),
            {name: token for name in SPECIAL_TOKENS if (token := _token(tokenizer.get(name)))},
            add_bos_token if isinstance(add_bos_token, bool) else None,
            _ids(generation.get("eos_token_id")),
            _sampling_defaults(generation),
        )

    def template(self, has_tools: bool) -> str | None:
        """The one for a chat; None if the model has none."""
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        return self.chat_templates.get("default")


def _parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerFailed(f"{name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerFailed(f"{name} is not a JSON object")
    return found


def _templates(configured: Any, own_file: bytes | None) -> dict[str, str]:
    """One text, or a list of named ones; a file of its own comes before both."""
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        named = [item for item in configured if isinstance(item, dict)]
        found = {item["name"]: item["template"] for item in named if _is_text(item.get("name")) and _is_text(item.get("template"))}
    if own_file is not None:
        found["default"] = own_file.decode("utf-8", "replace")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _token(value: Any) -> str | None:
    """A token is given as text, or as an object that says how it is matched."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(found for found in (value if isinstance(value, list) else [value]) if type(found) is int and found >= 0)


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """What it says, as far as a sampler can use it. A model that does not sample keeps its penalty only."""
    found = SamplingDefaults()
    is_greedy = generation.get("do_sample") is False
    for name in ("repetition_penalty",) if is_greedy else SamplingDefaults.__struct_fields__:
        value = generation.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            continue
        with contextlib.suppress(ProtocolError):  # no sampler can use it
            changed = SamplingDefaults.from_wire({**asdict(found), name: int(value) if name == "top_k" else float(value)})
            found = changed if changed.temperature <= _MAX_TEMPERATURE else found
    return found

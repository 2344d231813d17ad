"""Options of `run` about what a worker serves: engine, model, names."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshserve.cli.options import option, together
from meshserve.cli.running import declare
from meshserve.config import KV_TYPES, ServeConfig
from meshserve.engines.models.specs import SHORT_NAMES, is_real_model
from meshserve.errors import UsageError
from meshserve.wire.card import MAX_ALIASES

if TYPE_CHECKING:
    from meshserve.engines.models.resolving import ModelSource

LLAMA = "llama"
"""The engine of real models."""

MODEL_HELP = "A .gguf file, hf:ORG/REPO[:FILE or quantization], or smollm2; with another engine than llama what that engine takes."

_REAL_MODELS = f"a .gguf file, hf:ORG/REPO or {' or '.join(SHORT_NAMES)}"
_SERVE = ServeConfig()
_MAX_NAME_LETTERS = 255

model_options = together(
    option(
        "--engine", metavar="NAME",
        help=f"An installed engine, or module:Class.  [default: {LLAMA} for a real model, else {_SERVE.engine}]",
    ),
    option("--model", metavar="SPEC", help=f"{MODEL_HELP}  [default: the engine's]"),
    option(
        "--served-model-name", metavar="NAME[,NAME]",
        help="What clients call the model; it answers to each of these names alone.  [default: the model's own]",
    ),
    option(
        "--kv-cache-tokens", type=click.IntRange(1),
        help="Tokens of all sequences together that the KV cache holds.  [default: as fits into memory]",
    ),
    option(
        "--kv-type", type=click.Choice(KV_TYPES, case_sensitive=False),
        help="Elements of the KV cache.  [default: q8_0]",
    ),
    option("--engine-opt", "engine_options", multiple=True, metavar="KEY=VALUE", help="An option of the engine; repeatable."),
)


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`ServeConfig` that are no option's value as it is. Raises UsageError."""
    if settings["model"] == "":
        engine_for("")  # whatever the engine
    options = []
    for text in settings["engine_options"]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--engine-opt {text!r} is not KEY=VALUE")
        options.append((key, value))
    return {
        "engine": settings["engine"] or engine_for(settings["model"]),
        "served_model_names": _names(settings["served_model_name"]),
        "engine_options": tuple(options),
    }


def engine_for(spec: str | None) -> str:
    """The engine of a model where none was named. Raises UsageError for what can only be meant as a real model, and is none."""
    if spec is None:
        return _SERVE.engine
    if is_real_model(spec):
        return LLAMA
    if not spec:
        raise UsageError(f"--model is empty: name {_REAL_MODELS}")
    if "/" in spec or (spec != _SERVE.engine and _is_there(spec)):
        raise UsageError(f"{spec} is no model that is known: name {_REAL_MODELS}")
    return _SERVE.engine


def _is_there(spec: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long for a name, or a null byte
        return Path(spec).exists()
    return False


def say_dummy(spec: str | None) -> None:
    """Where no engine was named, a plain word is no real model: say so, for those who meant one."""
    if spec not in (None, _SERVE.engine) and engine_for(spec) != LLAMA:
        declare("dummy_model", f"{spec} is a name for the {_SERVE.engine} engine; a real model is {_REAL_MODELS}")


def with_model(config: ServeConfig, roles: tuple[str, ...]) -> ServeConfig:
    """The same with the path of the model's file, which is fetched first if it has to be, where these roles need one.

    Blocks: call it before the event loop runs. Raises UsageError or StartupFailed.
    """
    if config.engine != LLAMA or not {"decode", "prefill"} & set(roles):
        return config
    if config.model is None:
        raise UsageError(f"--engine {LLAMA} needs --model SPEC: {MODEL_HELP}")
    source = fetch_model(config.model)
    return replace(config, model=str(source.path), served_model_names=config.served_model_names or (source.name,))


def fetch_model(spec: str) -> "ModelSource":
    """The file of a real model; what takes time is said on stderr. Blocks. Raises UsageError or StartupFailed."""
    from meshserve.engines.loading import find_engine
    from meshserve.engines.models.resolving import resolve  # what fetches models: most peers need none of it

    find_engine(LLAMA)  # before a model is fetched that nothing here can serve
    return resolve(spec, lambda line: declare("model", line))


def _names(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(0 < len(name) <= _MAX_NAME_LETTERS and name.isprintable() for name in names):
        raise UsageError(f"--served-model-name {text!r} is not NAME[,NAME], each of up to {_MAX_NAME_LETTERS} printable characters")
    if len(names) > 1 + MAX_ALIASES:
        raise UsageError(f"--served-model-name: {len(names)} names are too many; a model has up to {1 + MAX_ALIASES}")
    return names

"""Options of `run` about what a worker serves: engine, model, names."""

from collections.abc import Callable
from typing import Any

from meshserve.cli.options import Command, option
from meshserve.config import ServeConfig
from meshserve.errors import UsageError
from meshserve.wire.card import MAX_ALIASES

_SERVE = ServeConfig()
_MAX_NAME_LETTERS = 255

_MODEL_OPTIONS: list[Callable[[Any], Any]] = [
    option("--engine", default=_SERVE.engine, metavar="NAME", help="An installed engine, or module:Class."),
    option("--model", default=None, metavar="NAME", help="The model that the engine serves.  [default: the engine's]", show_default=False),
    option(
        "--served-model-name",
        default=None,
        metavar="NAME[,NAME]",
        help="What clients call the model; it answers to each of these names alone.  [default: the model's own]",
        show_default=False,
    ),
    option("--engine-opt", "engine_options", multiple=True, metavar="KEY=VALUE", help="An option of the engine; repeatable."),
]


def model_options(command: Command) -> Command:
    """The options that :func:`model_settings` reads."""
    for add in reversed(_MODEL_OPTIONS):
        command = add(command)
    return command


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What they say, by the fields of :class:`ServeConfig`. Raises UsageError."""
    options = []
    for text in settings["engine_options"]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--engine-opt {text!r} is not KEY=VALUE")
        options.append((key, value))
    return {
        "engine": settings["engine"],
        "model": settings["model"],
        "served_model_names": _names(settings["served_model_name"]),
        "engine_options": tuple(options),
    }


def _names(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(0 < len(name) <= _MAX_NAME_LETTERS and name.isprintable() for name in names):
        raise UsageError(f"--served-model-name {text!r} is not NAME[,NAME], each of up to {_MAX_NAME_LETTERS} printable characters")
    if len(names) > 1 + MAX_ALIASES:
        raise UsageError(f"--served-model-name: {len(names)} names are too many; a model has up to {1 + MAX_ALIASES}")
    return names

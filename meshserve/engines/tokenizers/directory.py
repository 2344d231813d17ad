"""A model's directory on this host: the files of it that processors need."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from meshserve.errors import TokenizerFailed
from meshserve.wire.card import FILE_NAMES, MAX_FILE_BYTES, ModelFile


def read_directory(path: Path) -> dict[str, bytes]:
    """Contents by name of the files that are there, of :data:`~meshserve.wire.card.FILE_NAMES`.

    They are read once and kept, so that what is given out stays what the card says, whatever becomes of the directory. Raises
    TokenizerFailed if there is no `tokenizer.json`, or a file cannot be read or is too long.
    """
    found = {}
    for name in FILE_NAMES:
        try:
            with (path / name).open("rb") as file:
                found[name] = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TokenizerFailed(f"{path / name} cannot be read: {error.strerror}") from error
        if len(found[name]) > MAX_FILE_BYTES:
            raise TokenizerFailed(f"{path / name} is longer than {MAX_FILE_BYTES >> 20} MB")
    if "tokenizer.json" not in found:
        raise TokenizerFailed(f"there is no tokenizer.json in {path}")
    return found


def describe_files(files: Mapping[str, bytes]) -> tuple[ModelFile, ...]:
    """What a card says of them."""
    return tuple(ModelFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items())

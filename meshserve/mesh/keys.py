"""Key files: one secret, the same file on every machine of a mesh.

The file holds one line, `meshserve-key-1 ` and 64 hexadecimal digits. A reader of the file is a member, so it must be readable by
its owner only.
"""

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from meshserve.errors import KeyRefused

_HEADER = "meshserve-key-1 "


@dataclass(frozen=True, slots=True)
class MeshKey:
    """The secret of one mesh."""

    secret: bytes
    """32 random bytes."""

    @property
    def fingerprint(self) -> str:
        """For people to compare: says nothing about the secret."""
        digest = hashlib.blake2b(self.secret, digest_size=10, person=b"ms-fingerprint").hexdigest()
        return "-".join(digest[start : start + 4] for start in range(0, 20, 4))

    def curve_secret(self) -> bytes:
        """The 32 bytes that are the mesh's CURVE secret key, kept apart from other uses of the secret."""
        return hashlib.blake2b(self.secret, digest_size=32, person=b"ms-curve").digest()


def owner_secret(key: MeshKey | None, mesh_name: str) -> bytes:
    """The 32-byte secret with which frontends derive owners from API keys: the same in all frontends of a mesh.

    A mesh without a key has no shared secret, so the mesh's name takes its place. An attacker who reads the traffic of such a
    mesh can test guesses of API keys against owners, and finds keys that are easy to guess.
    """
    secret = key.secret if key is not None else mesh_name.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"ms-owner").digest()


def create_key_file(path: Path) -> MeshKey:
    """Write a new key, readable by its owner only. Raises KeyRefused if the file exists or cannot be written."""
    key = MeshKey(secrets.token_bytes(32))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise KeyRefused(f"{path} exists already; a key is never overwritten: choose another name or remove it yourself") from error
    except OSError as error:
        raise KeyRefused(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_HEADER}{key.secret.hex()}\n")
    return key


def read_key_file(path: Path) -> MeshKey:
    """The key in this file. Raises KeyRefused with what to do: missing, malformed, or readable by others."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyRefused(f"{path} can be read by others on this machine: run `chmod 600 {path}`")
        text = path.read_text()
    except OSError as error:
        raise KeyRefused(f"cannot read the key file {path}: {error.strerror}; `meshserve key new {path}` makes one") from error
    except UnicodeDecodeError as error:
        raise KeyRefused(f"{path} is not a meshserve key file") from error
    line = text.strip()
    try:
        secret = bytes.fromhex(line.removeprefix(_HEADER))
    except ValueError:
        secret = b""
    if not line.startswith(_HEADER) or len(secret) != 32:
        raise KeyRefused(f"{path} is not a meshserve key file; `meshserve key new FILE` makes one")
    return MeshKey(secret)

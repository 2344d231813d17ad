"""Models of a hub: through huggingface_hub, its cache and its settings (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME)."""

import errno
import importlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.engines.models.choosing import Choice, choose, quantization_of
from meshserve.engines.models.directories import Say, held, sha256_of
from meshserve.errors import MeshserveError, StartupFailed, UsageError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LIST_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class _HubFile:
    size_bytes: int
    sha256: str | None
    """None for what the hub keeps without one: small files, and no models."""


def fetch_from_hub(spec: str, say: Say) -> Path:
    """The file of `ORG/REPO[:FILE or quantization]` in the hub's cache on this machine; of a model in several files the first.

    Raises UsageError for a spec that fits nothing in that repository, StartupFailed for what cannot be had.
    """
    repository, _, wanted = spec.partition(":")
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--model hf:{spec} is not hf:ORG/REPO[:FILE or quantization]")
    hub = _Hub(repository)
    try:
        files = hub.files()
    except MeshserveError as error:
        if not isinstance(error.__cause__, Exception) or not _is_unreachable(error.__cause__):
            raise
        return hub.kept(wanted, error, say)
    choice = choose(repository, list(files), wanted)
    if choice.is_default:
        _say_choice(repository, choice, files, say)
    paths = [hub.fetch(name, files[name], say) for name in choice.files]
    return paths[0]


def _say_choice(repository: str, choice: Choice, files: dict[str, _HubFile], say: Say) -> None:
    others = sorted({quantization_of(name) for name in files} - {"", quantization_of(choice.files[0])})
    more = f"; hf:{repository}:NAME takes another: {', '.join(others)}" if others else ""
    say(f"hf:{repository}: {choice.files[0]} is taken{more}")


class _Hub:
    """One repository. Each method words what the library raises."""

    def __init__(self, repository: str) -> None:
        self._repository = repository
        try:
            self._library: Any = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise StartupFailed("hf: needs huggingface_hub: pip install 'meshserve[llama]'") from error
        self._library.logging.set_verbosity_error()  # its warnings are of several lines
        self._cache = Path(self._library.constants.HF_HUB_CACHE)
        self._folder = self._cache / f"models--{repository.replace('/', '--')}"

    def files(self) -> dict[str, _HubFile]:
        """What the repository holds, by name."""
        listed = self._worded(lambda: self._library.HfApi().model_info(self._repository, files_metadata=True, timeout=_LIST_TIMEOUT_S))
        return {found.rfilename: _HubFile(found.size or 0, _sha256_in(found.lfs)) for found in listed.siblings or ()}

    def fetch(self, name: str, file: _HubFile, say: Say) -> Path:
        """The file in the cache, which is asked first."""
        kept = self._library.try_to_load_from_cache(self._repository, name)
        if not isinstance(kept, str):
            say(f"fetching {name} of hf:{self._repository} ({file.size_bytes / 1e6:,.0f} MB, kept in {self._cache})")
            self._worded(lambda: self._fetch_contents(name, file, say))
        path = Path(self._worded(lambda: self._library.hf_hub_download(self._repository, name)))
        if str(path) != kept and file.sha256 is not None and path.resolve().name != file.sha256 and sha256_of(path) != file.sha256:
            for wrong in {path, path.resolve()}:
                wrong.unlink(missing_ok=True)
            raise self._other_hash(name)
        return path

    def _fetch_contents(self, name: str, file: _HubFile, say: Say) -> None:
        """Put the file's contents into the library's cache, where its own download then finds them, named by their hash.

        The library's own download begins again after the process that it ran in has ended, and compares no hash over plain HTTP.
        """
        part = self._folder / "blobs" / f"{file.sha256}.part"
        self._need_space(file.size_bytes - (part.stat().st_size if part.exists() else 0))
        if file.sha256 is None or file.size_bytes > self._library.constants.MAX_HTTP_DOWNLOAD_SIZE:
            return  # left to the library
        contents = part.with_suffix("")
        locks = self._cache / ".locks" / self._folder.name
        for folder in (contents.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with held(locks, say):
            if contents.exists():
                return
            self._append(name, part, file.size_bytes)
            if sha256_of(part) != file.sha256:
                part.unlink()
                raise self._other_hash(name)
            part.replace(contents)

    def _append(self, name: str, part: Path, size_bytes: int) -> None:
        """Fetch what the file still lacks."""
        http_get = importlib.import_module("huggingface_hub.file_download").http_get
        headers = self._library.utils.build_hf_headers()
        with part.open("ab") as opened:
            if opened.tell() > size_bytes:  # no start of this file
                opened.truncate(0)
                opened.seek(0)
            url = self._library.hf_hub_url(self._repository, name)
            http_get(url, opened, resume_size=opened.tell(), headers=headers, expected_size=size_bytes, displayed_filename=name)

    def _other_hash(self, name: str) -> StartupFailed:
        return StartupFailed(f"{name} of hf:{self._repository} came with another hash than the hub names: start again to fetch it anew")

    def kept(self, wanted: str, why: MeshserveError, say: Say) -> Path:
        """What fits in the cache, for a hub that cannot be asked (`why`)."""
        names: Sequence[Path] = []
        try:
            snapshot = self._folder / "snapshots" / (self._folder / "refs" / "main").read_text().strip()
            names = [path for path in snapshot.rglob("*") if path.is_file()]  # a link to a file that is not there yet is none
            chosen = choose(self._repository, [path.relative_to(snapshot).as_posix() for path in names], wanted)
        except (OSError, UsageError) as error:
            what = f"hf:{self._repository}" + (f":{wanted}" if wanted else "")
            raise StartupFailed(f"{why.message}, and {what} is not in the cache {self._cache}: fetch it once with a network") from error
        say(f"{why.message}: {chosen.files[0]} is taken from the cache")
        return snapshot / chosen.files[0]

    def _need_space(self, num_bytes: int) -> None:
        existing = next((folder for folder in (self._cache, *self._cache.parents) if folder.exists()), Path("/"))
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < num_bytes:
            raise StartupFailed(
                f"{self._cache} has {free_bytes / 1e6:,.0f} MB free and {num_bytes / 1e6:,.0f} MB are needed: make room, or set HF_HOME"
            )

    def _worded(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except MeshserveError:
            raise
        except Exception as error:
            # where the hub does not answer as it should, the library raises that its cache lacks the file, because of this
            cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None else error
            raise StartupFailed(self._words(cause)) from cause

    def _words(self, error: BaseException) -> str:
        kinds, what, status = _kinds(error), f"hf:{self._repository}", _status_of(error)
        if status == 401:  # what hubs answer strangers, rather than to say which repositories are there
            kinds.add("RepositoryNotFoundError")
        for kind, words in _WORDS.items():
            if kind in kinds:
                return words.format(what=what, status=status)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            return f"{what} cannot be kept in {self._cache}: {os.strerror(error.errno)}; make room, or set HF_HOME to another folder"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{what} cannot be fetched: {first}; try again"


_WORDS = {
    "GatedRepoError": "{what} is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN",
    "RepositoryNotFoundError": "there is no {what}, or it is private: check the name, or run `hf auth login` or set HF_TOKEN",
    "DisabledRepoError": "{what} was disabled by the hub: take another",
    "EntryNotFoundError": "the hub lists a file of {what} that it does not have: try again later",
    "RevisionNotFoundError": "{what} has no revision `main`: take another",
    "HfHubHTTPError": "the hub answers {status} for {what}: check HF_TOKEN if it is 403, else try again later",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "TransportError": "the hub cannot be reached",
}
"""By the names of the library's errors, those that are special cases of another first. By name, because the last is of the HTTP client
under the library, which has been another one before."""


def _sha256_in(lfs: Any) -> str | None:
    """It becomes a file's name here, so nothing else will do."""
    text = lfs.sha256 if lfs else ""
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _kinds(error: BaseException) -> set[str]:
    return {found.__name__ for found in type(error).__mro__}


def _is_unreachable(error: BaseException) -> bool:
    return bool(_kinds(error) & {"OfflineModeIsEnabled", "TransportError"}) or _status_of(error) >= 500


def _status_of(error: BaseException) -> int:
    """0 if the error is not an answer of the hub."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))

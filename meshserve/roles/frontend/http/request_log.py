"""The result of each HTTP request: a count by route, status, code and model, and a line in the log."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from meshserve.errors import Cancelled, MeshserveError, http_status_of
from meshserve.roles.frontend.http.messages import PlainAccount, Request
from meshserve.roles.frontend.http.reader import RequestReader
from meshserve.telemetry import (
    ACCESS_LOGGER,
    MAX_REQUEST_COUNTS,
    RequestCounts,
    RequestKey,
    log_event,
)

OTHER = "other"
"""Stands for a route, model or code that this mesh does not know, as clients may send any text."""
CLIENT_LEFT = 499
"""The client left before the response began; nginx uses the same status."""
_OK = PlainAccount().outcome
_MAX_SHOWN = 128
_log = logging.getLogger(ACCESS_LOGGER)


class RequestLog:
    """One for a frontend. A connection counts in `counts` itself what was counted before: that is
    all that most requests cost.
    """

    def __init__(
        self,
        counts: RequestCounts,
        route_of: Callable[[str], str | None],
        is_served: Callable[[str], bool],
    ) -> None:
        """`route_of` says which row of the table of routes a path has, `is_served` whether the mesh
        has a model of this name.
        """
        self.counts, self._route_of, self._is_served = counts, route_of, is_served
        self.is_writing = _log.isEnabledFor(logging.INFO)
        """Whether each request has a line."""

    def ended(self, request: Request) -> None:
        """A request was answered, refused, or left by its client."""
        self.count(request)
        if self.is_writing:
            self.write(request)

    def refused(self, reader: RequestReader, address: str, error: MeshserveError) -> None:
        """A request was refused before its end was read, perhaps before the end of its head."""
        request = reader.request
        if request is None:
            request = Request(
                reader.method, reader.path, b"", b"", {}, address, "", True, False, time.monotonic()
            )
        request.status = error.http_status
        request.failed(error.code)
        self.ended(request)

    def left(self, request: Request) -> None:
        """The client left, or was cut off, before the response was complete."""
        if not request.status:
            request.status = CLIENT_LEFT
        if request.account.outcome == _OK:
            request.failed(Cancelled.code)
        self.ended(request)

    def count(self, request: Request) -> None:
        """Count one request. The labels have few values, whatever clients send."""
        account = request.account
        model = account.model if not account.model or self._is_served(account.model) else OTHER
        code = _code_of(request)
        if code != _OK and http_status_of(code) is None:
            code = OTHER
        key: RequestKey = (
            request.route or self._route_of(request.path) or OTHER,
            request.status,
            code,
            model,
        )
        if key not in self.counts and len(self.counts) >= MAX_REQUEST_COUNTS:
            key = (OTHER, request.status, code, OTHER)
        self.counts[key] = self.counts.get(key, 0) + 1

    def write(self, request: Request) -> None:
        """The line."""
        account, ending = request.account, request.ending
        known: dict[str, Any] = {
            "method": request.method or "-",
            "route": request.route
            or self._route_of(request.path)
            or request.path[:_MAX_SHOWN]
            or "-",
            "status": request.status,
            "code": _code_of(request),
            "model": account.model[:_MAX_SHOWN],
            "prompt_tokens": ending.num_prompt_tokens if ending is not None else None,
            "completion_tokens": ending.num_completion_tokens if ending is not None else None,
            "cached_tokens": ending.num_cached_tokens if ending is not None else None,
            "ms": round((time.monotonic() - request.began_s) * 1000, 3),
            "client": request.address,
            "key": int(request.client[4:]) if request.client.startswith("key ") else None,
            "request_id": account.request_id,
            "client_id": account.client_id[:_MAX_SHOWN],
        }
        fields = {name: value for name, value in known.items() if value not in (None, "")}
        text = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        log_event(_log, "http_request", text, **fields)


def _code_of(request: Request) -> str:
    outcome = request.account.outcome
    return (
        outcome if outcome != _OK or request.status < 400 else OTHER
    )  # a page that is not there has no error


def _shown(value: object) -> str:
    """Put a value in quotes if it could be read as more than one value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(" =\"'") else text

"""Server-sent events (WHATWG HTML, section 9.2) of OpenAI's streams, counted as bytes: most of them are never parsed. Pure."""

import json
import re
from collections import deque
from typing import Any

_NAMES = ("text", "content", "reasoning_content", "reasoning", "refusal")
_CONTENT = re.compile(rb'"(?:%b)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*{|"function_call"\s*:\s*{' % "|".join(_NAMES).encode())
"""Content that is not empty, or a piece of a call. Quotes within a JSON string are escaped: nothing that a model says looks like this."""
_MAX_KEPT = 16
"""Of events without content, the last ones: what comes at the end counts, and a server may send any number before."""


class EventReader:
    """Takes the body in pieces, cut anywhere, and says how many events with content each completed."""

    __slots__ = ("_is_keeping", "_last", "_num_others", "_num_others_before", "_others", "_rest", "_texts")

    def __init__(self, is_keeping_text: bool = False) -> None:
        self._rest = b""
        self._others: deque[bytes] = deque(maxlen=_MAX_KEPT)
        """Events without content: the role, the finish reason, usage, a receipt, an error, the end."""
        self._last = b""
        """The last one with content."""
        self._num_others = self._num_others_before = 0
        """Events without content: all, and those before the last one with content."""
        self._is_keeping = is_keeping_text
        self._texts: list[bytes] = []

    def feed(self, data: bytes) -> int:
        """Events with content that are complete now and were not before."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # a line end that is cut in two is made whole by what comes next
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        num_found = 0
        for event in events:
            if event.startswith(b":") or b"\n:" in event:  # a comment, as servers send to keep connections alive
                event = _without_comments(event)
            if _CONTENT.search(event):
                num_found += 1
                self._last, self._num_others_before = event, self._num_others
                if self._is_keeping:
                    self._texts.append(event)
            elif event:
                self._others.append(event)
                self._num_others += 1
        return num_found

    def fields(self) -> tuple[dict[str, Any], bool]:
        """What the events without content and the last one said at their top level, later ones first; and whether the stream had an end."""
        found: dict[str, Any] = {}
        is_ended = False
        for event in self._in_order():
            data = _data_of(event)
            if data == b"[DONE]":
                is_ended = True
                continue
            fields = json_object(data)
            found.update({key: value for key, value in fields.items() if value is not None})
            is_ended = is_ended or any(choice.get("finish_reason") for choice in _choices(fields))
        return found, is_ended

    def _in_order(self) -> list[bytes]:
        """The events that were kept. The last may lack its empty line, where a server ends the response without one."""
        found = list(self._others)
        num_before = self._num_others_before - (self._num_others - len(found))
        found.insert(max(0, num_before), self._last)
        return [*found, self._rest]

    def take_text(self) -> str:
        """The content since the last call, if it was kept."""
        texts, self._texts = self._texts, []
        return "".join(text_of(json_object(_data_of(event))) for event in texts)


def text_of(fields: dict[str, Any]) -> str:
    """The content of the first choice of a chunk, or of a whole answer."""
    for choice in _choices(fields)[:1]:
        messages = _parts_of(choice)
        return next((part[name] for part in messages for name in _NAMES if isinstance(part.get(name), str) and part[name]), "")
    return ""


def has_calls(fields: dict[str, Any]) -> bool:
    """Whether the first choice of a whole answer calls a tool."""
    parts = [part for choice in _choices(fields)[:1] for part in _parts_of(choice)]
    return any(part.get(name) for part in parts for name in ("tool_calls", "function_call"))


def _parts_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (choice, choice.get("delta"), choice.get("message")) if isinstance(part, dict)]


def _without_comments(event: bytes) -> bytes:
    return b"\n".join(line for line in event.split(b"\n") if not line.startswith(b":"))


def _choices(fields: dict[str, Any]) -> list[dict[str, Any]]:
    choices = fields.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _data_of(event: bytes) -> bytes:
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def json_object(data: bytes) -> dict[str, Any]:
    """The object that these bytes are as JSON; an empty one if they are none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

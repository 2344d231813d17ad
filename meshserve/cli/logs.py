"""How log lines look, and that none of them storms."""

import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

_WINDOW_S = 10.0
_MAX_PER_PLACE = 20
_MAX_REMEMBERED = 512


class PlainFormatter(logging.Formatter):
    """One line each; what others sent cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """A traceback, which only `--log-level debug` brings, keeps its lines."""
        return "".join(letter if letter.isprintable() or (letter == "\n" and record.exc_info) else "?" for letter in super().format(record))


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time, level, logger, message; of events also their name and fields, such as `peer` or `request_id`."""

    def format(self, record: logging.LogRecord) -> str:
        """Without a traceback, whatever the record holds."""
        line = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower(), "logger": record.name}
        event = getattr(record, "event", None)
        fields = {"event": event, **getattr(record, "fields", {})} if event else {}
        return json.dumps({**line, "message": record.getMessage(), **fields}, default=str)


@dataclass(slots=True)
class _Repeats:
    began_s: float
    num_passed: int = 0
    num_held: int = 0


class RepeatLimit:
    """Decides which lines pass: the same text once in ten seconds, and twenty of one place in the code, whatever they say. Pure."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Repeats] = OrderedDict()

    def passes(self, place: str, text: str, now_s: float) -> int | None:
        """None if this line is held back; else how many of this place were, since the last one that passed."""
        by_text, by_place = self._of(text, now_s), self._of(place, now_s)
        if by_text.num_passed >= 1 or by_place.num_passed >= _MAX_PER_PLACE:
            by_place.num_held += 1
            return None
        by_text.num_passed += 1
        by_place.num_passed += 1
        num_held, by_place.num_held = by_place.num_held, 0
        return num_held

    def _of(self, key: str, now_s: float) -> _Repeats:
        known = self._known.pop(key, None)
        if known is None:
            known = _Repeats(now_s)
        elif now_s - known.began_s >= _WINDOW_S:
            known = _Repeats(now_s, 0, known.num_held)
        self._known[key] = known
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return known


class RepeatFilter(logging.Filter):
    """Holds repeated lines back, and says with the next how many they were."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RepeatLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        """False: not this one."""
        text = record.getMessage()
        num_held = self._limit.passes(f"{record.name}:{record.lineno}:{getattr(record, 'event', '')}", text, time.monotonic())
        if num_held:
            record.msg, record.args = f"{text} ({num_held} like this held back)", ()
        return num_held is not None

"""One request and what came back, as the generator saw it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
"""Of the APIs that can be asked, by the values of `--endpoint`."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. A conversation's later turns come from its earlier ones."""

    messages: tuple[tuple[str, str], ...]
    """Roles and texts; a completion is asked with all texts in one."""
    max_tokens: int
    num_turns_left: int = 0
    due_s: float | None = None
    """Seconds from the start, where a trace says so."""
    num_prompt_tokens: int | None = None
    """What a trace says. Its number of output tokens is `max_tokens`."""

    @property
    def prompt(self) -> str:
        """All texts in one."""
        return self.messages[0][1] if len(self.messages) == 1 else "\n".join(text for _, text in self.messages)


@dataclass(frozen=True, slots=True)
class Ending:
    """What the end of an answer said."""

    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    num_cached_tokens: int | None = None
    receipt: dict[str, Any] | None = None
    text: str = ""
    """Only where it was to be kept."""


@dataclass(slots=True)
class RequestRecord:
    """Times are of time.monotonic. Exactly one of :meth:`finish` and :meth:`fail` counts, the first."""

    request: Request
    due_s: float
    on_done: Callable[["RequestRecord"], None]
    is_measured: bool = True
    sent_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    """When each piece of content came: one time for all that one read brought."""
    ended_s: float | None = None
    error: str | None = None
    """Its kind: few words, so that errors can be counted."""
    ending: Ending = field(default_factory=Ending)
    cancel: Callable[[], None] | None = None
    """Tells the target to stop; set by it."""

    def sent(self, now_s: float) -> None:
        """The request is on its way."""
        self.sent_s = now_s

    def content(self, now_s: float, num_pieces: int) -> None:
        """So many pieces of content came now."""
        if num_pieces == 1:
            self.times_s.append(now_s)
        else:
            self.times_s += [now_s] * num_pieces

    def finish(self, now_s: float, ending: Ending) -> None:
        """The answer is complete; one without content is an error."""
        self._end(now_s, None if self.times_s else "empty answer", ending)

    def fail(self, now_s: float, kind: str) -> None:
        """There will be no complete answer."""
        self._end(now_s, kind, self.ending)

    def _end(self, now_s: float, error: str | None, ending: Ending) -> None:
        if self.ended_s is None:
            self.ended_s, self.error, self.ending = now_s, error, ending
            self.on_done(self)

    @property
    def num_tokens(self) -> int:
        """Of the answer: what the server counted, else the pieces."""
        return self.ending.num_completion_tokens or len(self.times_s)

    @property
    def ttft_s(self) -> float | None:
        """From due to the first content."""
        return self.times_s[0] - self.due_s if self.times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Between the first and the last piece, for each token after the first."""
        if len(self.times_s) < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / max(1, self.num_tokens - 1)

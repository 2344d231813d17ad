"""Where a connection stands, and when it has had its time. Pure; times are of one monotonic clock, and may be up to a sweep old."""

from dataclasses import dataclass
from enum import Enum

from meshserve.config import FrontendConfig


class Stage(Enum):
    """What a connection waits for."""

    HEAD = "head"
    """The rest of a request's line and headers, or their first byte."""
    BODY = "body"
    """The rest of a request's body."""
    ANSWER = "answer"
    """Us."""
    IDLE = "idle"
    """The next request, after an answer."""
    LINGER = "linger"
    """The client to take its refusal in."""


class Verdict(Enum):
    """What is to be done about a connection."""

    WAIT = "wait"
    TIMED_OUT = "timed out"
    """Refuse with 408 and close."""
    CLOSE = "close"
    """There is nothing to say."""
    TOO_SLOW = "too slow"
    """The client takes in nothing: cut it off."""


@dataclass(slots=True)
class Progress:
    """One connection's."""

    since_s: float
    stage: Stage = Stage.HEAD
    has_begun: bool = False
    """A byte of a request has come."""
    num_body_bytes: int = 0
    is_answering: bool = False
    """An earlier request's answer is on its way: what the client sends meanwhile has no deadline."""
    stuck_since_s: float | None = None
    """Since when the client has taken nothing in although there is something."""

    def enter(self, stage: Stage, now_s: float) -> None:
        """The connection waits for something else now."""
        self.stage, self.since_s = stage, now_s

    def verdict(self, now_s: float, limits: FrontendConfig) -> Verdict:
        """What its deadlines say."""
        if self.stuck_since_s is not None and now_s - self.stuck_since_s > limits.write_timeout_s:
            return Verdict.TOO_SLOW
        waited_s = now_s - self.since_s
        if self.stage is Stage.LINGER:
            return Verdict.CLOSE if waited_s > limits.linger_s else Verdict.WAIT
        if self.is_answering:
            return Verdict.WAIT
        if self.stage is Stage.HEAD and waited_s > limits.header_timeout_s:
            return Verdict.TIMED_OUT if self.has_begun else Verdict.CLOSE
        if self.stage is Stage.BODY and waited_s > limits.body_timeout_s + self.num_body_bytes / limits.min_body_bytes_per_s:
            return Verdict.TIMED_OUT
        if self.stage is Stage.IDLE and waited_s > limits.keep_alive_s:
            return Verdict.CLOSE
        return Verdict.WAIT

"""What a processor asks a router, and what it is answered. Between roles of one peer these objects go as they are."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.routing.candidates import Candidate
from meshserve.wire.account import milliseconds
from meshserve.wire.generation import pack_tokens, unpack_tokens


@dataclass(slots=True)
class RouteRequest:
    """Which worker is best for this prompt?"""

    request_id: str
    model: str
    tokens: "array[int]"
    policy: str | None = None
    """None: the router's own."""
    session: str = ""
    excluded: Sequence[str] = ()
    """Incarnations of workers that were tried."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return {
            "request_id": self.request_id,
            "model": self.model,
            "tokens": pack_tokens(self.tokens),
            "policy": self.policy,
            "session": self.session,
            "excluded": list(self.excluded),
        }

    @classmethod
    def from_wire(cls, data: Any) -> "RouteRequest":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, dict) or not isinstance(data.get("request_id"), str) or not isinstance(data.get("model"), str):
            raise ProtocolError("a question to a router names a request and a model")
        policy, session, excluded = data.get("policy") or None, data.get("session") or "", data.get("excluded") or []
        if not isinstance(policy, (str, type(None))) or not isinstance(session, str):
            raise ProtocolError("a policy and a session are strings")
        if not isinstance(excluded, list) or not all(isinstance(incarnation, str) for incarnation in excluded):
            raise ProtocolError("excluded workers are a list of incarnations")
        return cls(data["request_id"], data["model"], unpack_tokens(data.get("tokens")), policy, session, excluded)


@dataclass(slots=True)
class Placement:
    """Where a request may go, best first, and who said so."""

    router: str | None
    """Its name; None if there was none to ask."""
    policy: str
    decode: list[Candidate]
    prefill: list[Candidate]

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        decode, prefill = ([candidate.to_wire() for candidate in found] for found in (self.decode, self.prefill))
        ready_ms = [round(candidate.ready_ms, 3) for candidate in self.prefill]
        return {"router": self.router, "policy": self.policy, "decode": decode, "prefill": prefill, "prefill_ready_ms": ready_ms}

    @classmethod
    def from_wire(cls, data: Any) -> "Placement":
        """Raises ProtocolError for anything else, and for an answer without a decode worker: a router that knows none says so."""
        try:
            decode, prefill = ([Candidate.from_wire(item) for item in data[role]] for role in ("decode", "prefill"))
            found = cls(str(data["router"]), str(data["policy"]), decode, prefill)
            for candidate, ready_ms in zip(prefill, data.get("prefill_ready_ms") or (), strict=False):
                candidate.ready_ms = milliseconds(ready_ms)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ProtocolError("a router's answer cannot be read") from error
        if not decode:
            raise ProtocolError("a router's answer names no decode worker")
        return found

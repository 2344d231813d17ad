"""What routers tell each other: whom they have just sent a request."""

from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.wire.load import MAX_FIGURE


@dataclass(slots=True)  # not frozen, as what else is made for every request: that makes an object three times as dear
class Share:
    """What one worker gets of a request."""

    incarnation: str
    num_tokens: int
    """Prompt tokens that it will compute."""
    num_blocks: int
    """KV blocks that it will hold."""


@dataclass(slots=True)
class Booking:
    """One choice of a router. Known to all routers, so that two of them do not pile onto one worker."""

    request_id: str
    shares: tuple[Share, ...]
    """The decode worker's first, then the prefill worker's, if there is one."""
    session: str = ""

    def to_wire(self) -> list[Any]:
        """Plain data for :meth:`from_wire`."""
        return [self.request_id, self.session, [[share.incarnation, share.num_tokens, share.num_blocks] for share in self.shares]]

    @classmethod
    def from_wire(cls, data: Any) -> "Booking":
        """Raises ProtocolError for anything else."""
        if not isinstance(data, list) or len(data) < 3 or not isinstance(data[0], str) or not isinstance(data[1], str):
            raise ProtocolError("a booking names a request and a session")
        if not isinstance(data[2], list) or not 0 < len(data[2]) <= 2 or not all(map(_is_share, data[2])):
            raise ProtocolError("a booking has one or two shares: a worker, tokens and blocks")
        return cls(data[0], tuple(Share(*share) for share in data[2]), data[1])


def _is_share(share: Any) -> bool:
    if not isinstance(share, list) or [type(part) for part in share] != [str, int, int]:
        return False
    return all(0 <= figure < MAX_FIGURE for figure in share[1:])

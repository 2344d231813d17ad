"""What routers tell each other: whom they have just sent a request."""

from typing import Annotated

from meshserve.wire.structs import Figure, Meta, Row


class Share(Row):
    """What one worker gets of a request."""

    incarnation: str
    num_tokens: Figure
    """Prompt tokens that it will compute."""
    num_blocks: Figure
    """KV blocks that it will hold."""


class Booking(Row):
    """One choice of a router. Known to all routers, so that two of them do not pile onto one worker."""

    request_id: str
    shares: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=2)]
    """The decode worker's first, then the prefill worker's, if there is one."""
    session: str = ""

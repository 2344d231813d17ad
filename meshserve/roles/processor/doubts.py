"""What a processor believes of a worker's stream. Pure: an item or an end, and how far the sequence is, in; what it says, or the kind of
fault, out. The kinds are those of :data:`meshserve.mesh.faults.FAULTS`.
"""

from typing import Any, NamedTuple

from meshserve.wire.generation import GenerationEnd


class NewTokens(NamedTuple):
    """What an item says."""

    item: list[int]
    """The tokens, after the position of the first one."""
    logprobs: Any = None
    """As many, not looked at."""
    account: Any = None
    """The worker's word with its first tokens, not looked at."""


def tokens_in(item: Any, num_tokens: int, most_tokens: int, *, is_first: bool) -> NewTokens | str:
    """The tokens in an item that follows `num_tokens` of at most `most_tokens`; or a kind of fault: `item`, `order` or `excess`.

    Only a worker's first item begins with its account.
    """
    account, logprobs = None, None
    if is_first and isinstance(item, list) and len(item) > 2 and isinstance(item[0], (list, tuple)):
        account, item = item[0], item[1:]
    if isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], list):
        item, logprobs = item
    if not isinstance(item, list) or len(item) < 2 or type(item[0]) is not int:
        return "item"
    if item[0] != num_tokens:
        return "order"
    if num_tokens + len(item) - 1 > most_tokens:
        return "excess"
    return NewTokens(item, logprobs, account)


def is_end(end: GenerationEnd, num_tokens: int, most_tokens: int) -> bool:
    """Whether a sequence of which `num_tokens` came can have ended so. A worker of an earlier version does not say how many there are:
    of such a worker an end before any token is not believed.
    """
    if end.num_tokens is None:
        return num_tokens > 0
    return end.num_tokens == num_tokens and (end.reason != "length" or num_tokens == most_tokens)

"""Checks of a worker's stream. Pure: from an item or an end, and the tokens so far, to the tokens of the item, or to the kind of
fault. The kinds are those of :data:`meshserve.mesh.faults.FAULTS`.
"""

from typing import Any, NamedTuple

from meshserve.wire.generation import GenerationEnd


class NewTokens(NamedTuple):
    """The tokens of an item, with their log probabilities and the worker's account."""

    item: list[int]
    """The tokens, after the position of the first one."""
    logprobs: Any = None
    """As many as tokens; not checked."""
    account: Any = None
    """The worker's account, which comes with its first tokens; not checked."""


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
    """Whether `end` is a valid end of a sequence of which `num_tokens` arrived. A worker of an earlier version does not send the number
    of tokens: an end of such a worker is valid after at least one token.
    """
    if end.num_tokens is None:
        return num_tokens > 0
    return end.num_tokens == num_tokens and (end.reason != "length" or num_tokens == most_tokens)

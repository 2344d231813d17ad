"""How long a handoff takes, from those that were made. Pure."""

from meshserve.engines.core.rates import Line

_MEMORY_HANDOFFS = 20.0
"""Handoffs after which one counts for a third: the network's load changes soon."""

_ENOUGH_HANDOFFS = 3

_MOST_ABOVE = 2.0
"""A handoff that took longer than this times what was expected counts as this: one stalled connection must not end all handoffs."""

_FADE = 0.98
"""Of the handoff's expected time, for each prompt that stays here by it: without handoffs nobody measures whether the network is still
slow, and after some 35 such prompts it is expected to take half. Higher tries again later, lower tries more often in vain."""


class HandoffRates:
    """What handing over KV adds to computing it elsewhere, as one decode worker measured it."""

    def __init__(self) -> None:
        self._line, self._num_handoffs, self._faded = Line(_MEMORY_HANDOFFS), 0, 1.0
        self._mean_s_per_token = 0.0

    def handed_over(self, num_tokens: int, duration_s: float) -> None:
        """The KV of so many tokens came from another worker."""
        if num_tokens <= 0:
            return
        mean_s, now_s = self._mean_s_per_token, duration_s / num_tokens
        self._mean_s_per_token = mean_s + (now_s - mean_s) * 0.1 if mean_s else now_s
        self._num_handoffs += 1
        if self._num_handoffs == 1:  # it waited for connections to open
            return
        if self._num_handoffs > _ENOUGH_HANDOFFS:
            duration_s = min(duration_s, _MOST_ABOVE * self.handoff_s(num_tokens))
        self._line.add(num_tokens, duration_s)
        self._faded = 1.0

    def kept_here(self) -> None:
        """A prompt was not handed over, by what :meth:`handoff_s` said among others."""
        self._faded *= _FADE

    def handoff_s(self, num_tokens: int) -> float:
        """What handing over the KV of so many tokens is expected to add; 0 until it was measured, so that it will be."""
        base_s, s_per_token = self._line.fit()
        return (base_s + s_per_token * num_tokens) * self._faded

    def ns_per_token(self) -> int:
        """The mean of the last twenty or so, for routers; 0 until there was one."""
        return round(self._mean_s_per_token * 1e9)

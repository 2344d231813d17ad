"""When a prefill worker claims its next prompt: pure arithmetic.

Too late, and the worker is idle for a round trip between two prompts. Too early, and a prompt is bound to a worker that still computes a
long one, while another comes free. So a worker claims when it has nothing, and when it is about to have nothing. Where so many wait that
nobody will come free for lack of work, it also claims what fits into one batch, which an engine computes in less time than one by one.
"""

import math
from collections.abc import Hashable

from meshserve.config import HandoffConfig

_ANSWER_S = 0.05
"""A claim that is not answered by then keeps nobody else waiting: its decode worker may be hung."""
_RATE_WEIGHT = 0.25
"""Of a new measurement in the running average."""


class ClaimPace:
    """Keeps what is claimed and not yet computed. Keys are the caller's; times are seconds of one monotonic clock."""

    def __init__(self, config: HandoffConfig) -> None:
        self._config = config
        self._remaining: dict[Hashable, int] = {}
        """Tokens of each prompt that are not computed yet."""
        self._unanswered_since_s: dict[Hashable, float] = {}
        self._computed_tokens = 0
        self._marked_s = 0.0
        self._progressed_s = 0.0
        self.tokens_per_s: float | None = None
        """How fast this worker computes prompts; None before the first one ended."""

    def may_claim(self, num_tokens: int, num_waiting: int, now_s: float) -> bool:
        """Whether now is the time for the next prompt, which has so many tokens, when so many wait."""
        if len(self._remaining) >= self._config.prefill_slots:
            return False
        unanswered = [since_s for since_s in self._unanswered_since_s.values() if now_s - since_s > _ANSWER_S]
        if len(self._remaining) == len(unanswered):
            return True
        batch_tokens = sum(self._remaining.values()) + num_tokens
        if num_waiting > self._config.prefill_slots and batch_tokens <= self._config.prefill_batch_tokens:
            return True
        return self.claim_in_s(now_s) <= 0

    def claim_in_s(self, now_s: float) -> float:
        """How long until all that it has takes no longer than `claim_ahead_ms`, if it goes on at the rate that was measured.

        Infinite where no rate was measured yet, or where it has all that it may have.
        """
        if self.tokens_per_s is None or len(self._remaining) >= self._config.prefill_slots:
            return math.inf
        ends_s = self._progressed_s + sum(self._remaining.values()) / self.tokens_per_s
        return ends_s - self._config.claim_ahead_ms / 1000 - now_s

    def claimed(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """A claim goes out for a prompt of so many tokens."""
        if not self._remaining:
            self._computed_tokens, self._marked_s, self._progressed_s = 0, now_s, now_s
        self._remaining[key] = num_tokens
        self._unanswered_since_s[key] = now_s

    def granted(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """The claim was granted, and so many tokens are left to compute."""
        self._unanswered_since_s.pop(key, None)
        if len(self._remaining) == 1:
            self._computed_tokens, self._marked_s, self._progressed_s = 0, now_s, now_s  # nothing ran while it was on its way
        self._remaining[key] = num_tokens

    def computed(self, key: Hashable, num_tokens: int, now_s: float) -> None:
        """So many of its tokens are done."""
        remaining = self._remaining.get(key)
        if remaining is not None:
            done = min(num_tokens, remaining)
            self._remaining[key] = remaining - done
            self._computed_tokens += done
            self._progressed_s = now_s

    def was_cached(self, num_tokens: int) -> None:
        """So many of the tokens that were given out had been there already, and say nothing about the rate."""
        self._computed_tokens = max(0, self._computed_tokens - num_tokens)

    def ended(self, key: Hashable, now_s: float) -> None:
        """Computed, or given up."""
        self._unanswered_since_s.pop(key, None)
        if self._remaining.pop(key, None) is not None and self._computed_tokens and now_s > self._marked_s:
            rate = self._computed_tokens / (now_s - self._marked_s)
            self.tokens_per_s = rate if self.tokens_per_s is None else self.tokens_per_s + _RATE_WEIGHT * (rate - self.tokens_per_s)
            self._computed_tokens, self._marked_s = 0, now_s

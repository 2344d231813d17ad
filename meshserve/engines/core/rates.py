"""How fast an engine is, from the steps that it made: what routers estimate waiting times with, and decode workers decide by whether to
hand a prompt over. Pure."""

from meshserve.engines.core.scheduler import StepLimits

_MEMORY_STEPS = 1000.0
"""Steps after which an observation counts for a third: long enough for a line through them, short enough to follow another load."""

_KEEP = 1 - 1 / _MEMORY_STEPS

_MEMORY_HANDOFFS = 20.0
"""The same for handoffs: the network's load changes sooner than an engine's speed."""

_ENOUGH_STEPS = 3.0

_ENOUGH_TOKENS = 16.0
"""Prompt tokens in the mean step, below which their steps say nothing of what a token takes: those of prompts that were handed over, or
were cached but for the last token."""

_PROMPT_STEP_TOKENS = 8
"""A step with fewer prompt tokens says nothing of how fast a prompt is computed here, for the same reason."""

_UNLIMITED = StepLimits(2**31, 2**31)

_MOST_ABOVE = 2.0
"""A handoff that took longer than this times what was expected counts as this: one stalled connection must not end all handoffs."""

_FADE = 0.98
"""Of the handoff's expected time, for each prompt that stays here by it: without handoffs nobody measures whether the network is still
slow, and after some 35 such prompts it is expected to take half. Higher tries again later, lower tries more often in vain."""


class _Line:
    """y = base + slope x by least squares, older points counting less."""

    def __init__(self, keep: float = _KEEP) -> None:
        self._keep = keep
        self.weight = self._x = self._y = self._xx = self._xy = 0.0
        self._fits: list[tuple[float, float] | None] = [None, None]
        """What :meth:`fit` found, until there is another point: each prompt asks for it."""

    def add(self, x: float, y: float) -> None:
        keep = self._keep
        self.weight = self.weight * keep + 1
        self._x = self._x * keep + x
        self._y = self._y * keep + y
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * y
        self._fits = [None, None]

    @property
    def mean_x(self) -> float:
        """0 without points."""
        return self._x / self.weight if self.weight else 0.0

    def fit(self, is_flat_otherwise: bool) -> tuple[float, float]:
        """Base and slope, neither negative. Where all x are alike: all of it base, or all of it slope."""
        found = self._fits[is_flat_otherwise]
        if found is None:
            found = self._fits[is_flat_otherwise] = self._fit(is_flat_otherwise)
        return found

    def _fit(self, is_flat_otherwise: bool) -> tuple[float, float]:
        if not self.weight:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self.weight, self._y / self.weight
        variance = self._xx / self.weight - mean_x * mean_x
        slope = 0.0 if is_flat_otherwise or not mean_x else mean_y / mean_x
        if variance > 0.01 * mean_x * mean_x:
            slope = max(0.0, (self._xy / self.weight - mean_x * mean_y) / variance)
        base = mean_y - slope * mean_x
        return (base, slope) if base >= 0 else (0.0, mean_y / mean_x)


class StepRates:
    """Fits a line through the times of decode steps by blocks held, and one through those of prompts by tokens.

    Steps that only compute prompts and steps that decode besides have a line each for :meth:`prefill_s`: small chunks beside streams are
    slower than what is left of such a step's time when decoding alone is taken from it.
    """

    def __init__(self, limits: StepLimits = _UNLIMITED) -> None:
        """`limits` are the engine's own, looked at whenever they are needed."""
        self._limits = limits
        self._decodes, self._prefills = _Line(), _Line()
        self._alone, self._beside = _Line(), _Line()
        self._handoffs, self._num_handoffs, self._faded = _Line(1 - 1 / _MEMORY_HANDOFFS), 0, 1.0
        self._mean_output_tokens = 0.0
        self._handoff_s_per_token = 0.0

    def observe(self, num_prompt_tokens: int, num_decodes: int, used_blocks: int, duration_s: float) -> None:
        """A step took so long. Of one that did both, what decoding alone would have taken is not counted for the prompt."""
        if not num_prompt_tokens:
            self._decodes.add(used_blocks, duration_s)
            return
        if num_prompt_tokens >= _PROMPT_STEP_TOKENS:
            (self._beside if num_decodes else self._alone).add(num_prompt_tokens, duration_s)
        if num_decodes:
            base, slope = self._decodes.fit(True)
            duration_s = max(0.0, duration_s - base - slope * used_blocks)
        self._prefills.add(num_prompt_tokens, duration_s)

    def finished(self, num_output_tokens: int) -> None:
        """A sequence ended after so many tokens. The mean follows the last hundred or so."""
        mean = self._mean_output_tokens
        self._mean_output_tokens = mean + (num_output_tokens - mean) * 0.02 if mean else float(num_output_tokens)

    def handed_over(self, num_tokens: int, duration_s: float) -> None:
        """The KV of so many tokens came from another worker. The mean follows the last twenty or so."""
        if num_tokens > 0:
            mean, now = self._handoff_s_per_token, duration_s / num_tokens
            self._handoff_s_per_token = mean + (now - mean) * 0.1 if mean else now
            self._add_handoff(num_tokens, duration_s)

    def _add_handoff(self, num_tokens: int, duration_s: float) -> None:
        self._num_handoffs += 1
        if self._num_handoffs == 1:  # it waited for connections to open
            return
        if self._num_handoffs > _ENOUGH_STEPS:
            duration_s = min(duration_s, _MOST_ABOVE * self.handoff_s(num_tokens))
        self._handoffs.add(num_tokens, duration_s)
        self._faded = 1.0

    def kept_here(self) -> None:
        """A prompt was not handed over, by what :meth:`handoff_s` said among others."""
        self._faded *= _FADE

    def handoff_s(self, num_tokens: int) -> float:
        """What handing over the KV of so many tokens adds to computing it elsewhere; 0 until it was measured, so that it will be."""
        base_s, s_per_token = self._handoffs.fit(False)
        return (base_s + s_per_token * num_tokens) * self._faded

    def prefill_s(self, num_tokens: int, num_decodes: int) -> float | None:
        """To compute so many prompt tokens beside so many sequences that decode; None until enough of it was measured.

        Besides a decode step's share of it, what the limits make of a prompt counts: each of its steps has the base time.
        """
        line = self._beside if num_decodes else self._alone
        if line.weight < _ENOUGH_STEPS:
            return self._unlike_s(num_tokens, num_decodes)
        base_s, s_per_token = line.fit(False)
        return (base_s * self._num_steps(num_tokens, num_decodes) if base_s else 0.0) + s_per_token * num_tokens

    def _unlike_s(self, num_tokens: int, num_decodes: int) -> float | None:
        """From steps that had what this one has not: with sequences to decode where there are none now, or the other way round."""
        line = self._alone if num_decodes else self._beside
        if line.weight < _ENOUGH_STEPS:
            return None
        base_s, s_per_token = line.fit(False)
        step_s = self.decode_s() if num_decodes else 0.0
        return (base_s + step_s) * self._num_steps(num_tokens, num_decodes) + s_per_token * num_tokens

    def decode_s(self) -> float:
        """The mean decode step; 0 until there was one."""
        base_s, s_per_block = self._decodes.fit(True)
        return base_s + s_per_block * self._decodes.mean_x

    def _num_steps(self, num_tokens: int, num_decodes: int) -> int:
        limits = self._limits
        most = limits.max_step_tokens - num_decodes
        most_prompt = limits.max_mixed_tokens if num_decodes else limits.max_prompt_tokens
        return -(-num_tokens // max(1, min(most, most_prompt) if most_prompt else most))

    def figures(self) -> dict[str, int]:
        """As fields of a WorkerLoad; what was hardly observed yet is left out."""
        found = {"mean_output_tokens": round(self._mean_output_tokens), "handoff_ns_per_token": round(self._handoff_s_per_token * 1e9)}
        if self._prefills.weight >= _ENOUGH_STEPS and self._prefills.mean_x >= _ENOUGH_TOKENS:
            base_s, s_per_token = self._prefills.fit(False)
            found |= {"prefill_base_us": round(base_s * 1e6), "prefill_ns_per_token": max(1, round(s_per_token * 1e9))}
        if self._decodes.weight >= _ENOUGH_STEPS:
            base_s, s_per_block = self._decodes.fit(True)
            found |= {"decode_base_us": max(1, round(base_s * 1e6)), "decode_ns_per_block": round(s_per_block * 1e9)}
        return found

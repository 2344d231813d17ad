"""How fast an engine is, from the steps that it made: what routers estimate waiting times with. Pure."""

_MEMORY_STEPS = 1000.0
"""Steps after which an observation counts for a third: long enough for a line through them, short enough to follow another load."""

_KEEP = 1 - 1 / _MEMORY_STEPS

_ENOUGH_STEPS = 3.0

_ENOUGH_TOKENS = 16.0
"""Prompt tokens in the mean step, below which their steps say nothing of what a token takes: those of prompts that were handed over, or
were cached but for the last token."""


class _Line:
    """y = base + slope x by least squares, older points counting less."""

    def __init__(self) -> None:
        self.weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * _KEEP + 1
        self._x = self._x * _KEEP + x
        self._y = self._y * _KEEP + y
        self._xx = self._xx * _KEEP + x * x
        self._xy = self._xy * _KEEP + x * y

    @property
    def mean_x(self) -> float:
        """0 without points."""
        return self._x / self.weight if self.weight else 0.0

    def fit(self, is_flat_otherwise: bool) -> tuple[float, float]:
        """Base and slope, neither negative. Where all x are alike: all of it base, or all of it slope."""
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
    """Fits a line through the times of decode steps by blocks held, and one through those of prompts by tokens."""

    def __init__(self) -> None:
        self._decodes, self._prefills = _Line(), _Line()
        self._mean_output_tokens = 0.0
        self._handoff_s_per_token = 0.0

    def observe(self, num_prompt_tokens: int, num_decodes: int, used_blocks: int, duration_s: float) -> None:
        """A step took so long. Of one that did both, what decoding alone would have taken is not counted for the prompt."""
        if not num_prompt_tokens:
            self._decodes.add(used_blocks, duration_s)
            return
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

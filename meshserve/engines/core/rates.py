"""How fast an engine is, by the steps that it made, for routers and decode workers. Pure."""

from meshserve.engines.core.scheduler import StepLimits
from meshserve.engines.fitting import Line

_HALF_LIFE_S = 60.0
"""Of what was observed before the engine was idle. Another load of its machine may have slowed it then: what it measures now soon
outweighs that. Longer keeps a line through few prompts steady, shorter finds out sooner that a worker is slow no more."""
_IDLE_S = 1.0
"""Shorter pauses between steps age nothing."""

_ENOUGH_STEPS = 4

_ENOUGH_TOKENS = 16.0
"""Prompt tokens in the mean step, below which their steps say nothing of what a token takes: those of prompts that were handed over, or
were cached but for the last token."""

_PROMPT_STEP_TOKENS = 8
"""A step with fewer prompt tokens says nothing of how fast a prompt is computed here, for the same reason."""


class StepRates:
    """Fits a line through the times of decode steps by blocks held, and one through those of prompts by tokens.

    Steps that only compute prompts and steps that decode besides have a line each for :meth:`prefill_s`: small chunks beside streams are
    slower than what is left of such a step's time when decoding alone is taken from it. `limits` are the engine's own.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self._decodes, self._prefills = Line(is_flat=True), Line()
        self._alone, self._beside = Line(), Line()
        self._mean_output_tokens = 0.0
        self._num_prompts = self._num_finished = 0
        self._observed_s = 0.0

    def observe(
        self, num_prompt_tokens: int, num_decodes: int, used_blocks: int, duration_s: float, now_s: float = 0.0
    ) -> None:
        """A step took so long, and ended `now_s`. Of one that did both, what decoding alone would have taken is not
        counted for the prompt.
        """
        if now_s - self._observed_s > _IDLE_S:
            share = 0.5 ** ((now_s - self._observed_s) / _HALF_LIFE_S)
            for line in (self._decodes, self._prefills, self._alone, self._beside):
                line.fade(share)
        self._observed_s = now_s
        if not num_prompt_tokens:
            self._decodes.add(used_blocks, duration_s)
            return
        if num_prompt_tokens >= _PROMPT_STEP_TOKENS:
            self._num_prompts += 1
            (self._beside if num_decodes else self._alone).add(num_prompt_tokens, duration_s)
        if num_decodes:
            base_s, s_per_block = self._decodes.fit()
            duration_s = max(0.0, duration_s - base_s - s_per_block * used_blocks)
        self._prefills.add(num_prompt_tokens, duration_s)

    def finished(self, num_output_tokens: int) -> None:
        """A sequence ended after so many tokens. The mean follows the last hundred or so."""
        self._num_finished += 1
        mean = self._mean_output_tokens
        self._mean_output_tokens = mean + (num_output_tokens - mean) * 0.02 if mean else float(num_output_tokens)

    def prefill_s(self, num_tokens: int, num_decodes: int) -> float | None:
        """To compute so many prompt tokens beside so many sequences that decode; None until enough of it was measured.

        What the limits make of a prompt counts: each of its steps has the base time. Until steps with sequences to decode, or without,
        were measured, the others stand for them.
        """
        line, other = (self._beside, self._alone) if num_decodes else (self._alone, self._beside)
        step_s = 0.0
        if line.num_added < _ENOUGH_STEPS:
            line, step_s = other, self.decode_s() if num_decodes else 0.0
            if line.num_added < _ENOUGH_STEPS:
                return None
        base_s, s_per_token = line.fit()
        num_steps = -(-num_tokens // max(1, self._limits.most_new_tokens(num_decodes)))
        return (base_s + step_s) * num_steps + s_per_token * num_tokens

    def decode_s(self) -> float:
        """The mean decode step; 0 until there was one."""
        base_s, s_per_block = self._decodes.fit()
        return base_s + s_per_block * self._decodes.mean_x

    def figures(self) -> dict[str, int]:
        """As fields of a WorkerLoad; what was hardly observed yet is left out."""
        num_measured = max(1, self._num_prompts, self._num_finished)
        found = {"mean_output_tokens": round(self._mean_output_tokens), "num_measured": num_measured}
        if self._prefills.num_added >= _ENOUGH_STEPS and self._prefills.mean_x >= _ENOUGH_TOKENS:
            base_s, s_per_token = self._prefills.fit()
            found |= {"prefill_base_us": round(base_s * 1e6), "prefill_ns_per_token": max(1, round(s_per_token * 1e9))}
        if self._decodes.num_added >= _ENOUGH_STEPS:
            base_s, s_per_block = self._decodes.fit()
            found |= {"decode_base_us": max(1, round(base_s * 1e6)), "decode_ns_per_block": round(s_per_block * 1e9)}
        return found

"""How long a step takes on the hardware that the dummy engine plays. Pure arithmetic."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Timing:
    """A step takes the prefill time of all its new prompt tokens together plus, if any sequence decodes, the decode time.

    With n new prompt tokens: `prefill_base_ms` + `prefill_ms_per_token` n + `prefill_ms_per_token2` n^2. At KV occupancy u
    (0 to 1): `decode_base_ms` + `decode_ms_by_occupancy` u + `decode_ms_by_occupancy2` u^2.
    """

    prefill_base_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_token2: float = 0.0
    decode_base_ms: float = 0.0
    decode_ms_by_occupancy: float = 0.0
    decode_ms_by_occupancy2: float = 0.0

    def step_s(self, num_prompt_tokens: int, num_decodes: int, occupancy: float) -> float:
        """Seconds of a step that computes so many prompt tokens and has so many sequences decoding."""
        milliseconds = 0.0
        if num_prompt_tokens:
            n = num_prompt_tokens
            milliseconds += self.prefill_base_ms + self.prefill_ms_per_token * n + self.prefill_ms_per_token2 * n * n
        if num_decodes:
            u = min(1.0, occupancy)
            milliseconds += self.decode_base_ms + self.decode_ms_by_occupancy * u + self.decode_ms_by_occupancy2 * u * u
        return milliseconds / 1000

    def with_options(self, step_ms: float, prefill_tokens_per_s: float) -> "Timing":
        """The same hardware with `step_ms` more a decode step and, unless it is 0, prefill at a constant rate instead."""
        timing = replace(self, decode_base_ms=self.decode_base_ms + step_ms)
        if not prefill_tokens_per_s:
            return timing
        return replace(timing, prefill_base_ms=0.0, prefill_ms_per_token=1000 / prefill_tokens_per_s, prefill_ms_per_token2=0.0)


PROFILES: dict[str, Timing] = {
    # measures the mesh, not the engine
    "instant": Timing(),
    # the default performance model of NVIDIA Dynamo's mocker, as the results of its offline replay show it
    "reference": Timing(16.50142, 0.01518344, 4.209989e-7, 5.74, 54.01, -25.74),
    # Llama-3.3-70B in fp8 on two H100 80G, from NVIDIA's published NIM performance tables (docs.nvidia.com/nim/benchmarking/llm/1.0.0/
    # performance, NIM 1.8.0, one request at a time): a line through the times to the first token at 500 and 5000 input tokens
    # (47.77 and 406.77 ms), and the time between tokens (18.58 ms). Flat in occupancy: the table's growth with load is mostly prefill
    "2xh100-llama3.3-70b": Timing(7.88, 0.079778, 0.0, 18.58),
}
"""By the name that the option `profile` takes."""

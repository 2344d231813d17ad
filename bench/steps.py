"""`python -m bench.steps [--json]`: what a token costs the dummy engine, plain and with what else a request may ask of it.

Many sequences decode together, profile `instant`, on a real event loop, into sinks that forget. Each kind of request is measured in
turn with the plain one, the turns' order alternating; the figure is the ratio of their processor times per token.
"""

import asyncio
import json
import time
from array import array
from typing import Any

import click
import uvloop

from meshserve.cli.bench.compare import ratio_of
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions, GenerationStats
from meshserve.errors import MeshserveError
from meshserve.wire.generation import GenerateRequest, Sampling, TokenLogprobs

_SCHEMA = {
    "type": "object",
    "properties": {"texts": {"type": "array", "items": {"type": "string", "minLength": 200}, "minItems": 8}},
    "required": ["texts"],
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 1": {"temperature": 1.0},
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "penalties, temperature 1, logprobs 5": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "temperature": 1.0, "logprobs": 5},
    "bias of 20 tokens": {"logit_bias": tuple((300 + index, 1.5) for index in range(20))},
    "json_schema": {"json_schema": json.dumps(_SCHEMA)},
}


class _Forgets:
    """A sink that only counts those that ended."""

    def __init__(self, num_sequences: int) -> None:
        self._num_open = num_sequences
        self.ended = asyncio.Event()

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """None are asked for."""

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Forget them."""

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        """One less."""
        self._num_open -= 1
        if not self._num_open:
            self.ended.set()

    def on_error(self, error: MeshserveError) -> None:
        """It would spoil the figures."""
        raise error


async def token_us(sampling: dict[str, Any], num_sequences: int, num_tokens: int) -> float:
    """Microseconds of processor time a token, prompts of 16 tokens included."""
    engine = DummyEngine(EngineOptions(options={"kv_bytes_per_token": "16", "max_batch": str(num_sequences)}))
    await engine.start()
    sink = _Forgets(num_sequences)
    began = time.process_time()
    for number in range(num_sequences):
        tokens = array("I", [number % 251, number // 251, *range(14)])
        wanted = Sampling(max_tokens=num_tokens, ignore_eos=True, seed=number, **sampling)
        engine.generate(GenerateRequest(str(number), "dummy", tokens, wanted), sink)
    await sink.ended.wait()
    elapsed = time.process_time() - began
    await engine.close()
    return elapsed * 1e6 / num_sequences / num_tokens


async def compare(num_sequences: int, num_tokens: int, num_pairs: int) -> dict[str, dict[str, Any]]:
    """By kind: microseconds a token, and the ratio to a plain one."""
    found: dict[str, dict[str, Any]] = {}
    for name, sampling in KINDS.items():
        times: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(num_pairs):
            for is_plain in (pair % 2 == 0, pair % 2 == 1):
                times[is_plain].append(await token_us({} if is_plain else sampling, num_sequences, num_tokens))
        found[name] = {"us": round(sorted(times[False])[num_pairs // 2], 2), "ratio": ratio_of(times[False], times[True]).to_dict()}
    return found


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--sequences", default=256, show_default=True, help="Decoding together.")
@click.option("--tokens", default=100, show_default=True, help="Of each.")
@click.option("--pairs", default=10, show_default=True, help="Alternations.")
def main(as_json: bool, sequences: int, tokens: int, pairs: int) -> None:
    """Microseconds a token by what a request asks for, and as a ratio to a plain one."""
    found = uvloop.run(compare(sequences, tokens, pairs))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, figures in found.items():
        ratio = figures["ratio"]
        click.echo(f"{name:38s} {figures['us']:7.2f} us   {ratio['median']:6.2f}x  ({ratio['low']:.2f} to {ratio['high']:.2f})")


if __name__ == "__main__":
    main()

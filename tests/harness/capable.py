"""An engine with every feature in its simplest form, for `--engine tests.harness.capable:CapableEngine`."""

import json
from dataclasses import replace
from typing import Any

from meshserve.engines.dummy.engine import DummyEngine
from meshserve.engines.protocol import EngineOptions, GenerationSink, GenerationStats, Reservation
from meshserve.errors import MeshserveError
from meshserve.wire.card import FEATURES
from meshserve.wire.generation import GenerateRequest, Sampling, TokenLogprobs


class CapableEngine(DummyEngine):
    """The dummy's timing and KV. A strong bias forces its token; under a schema the output is one document, a byte a token."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.card = replace(self.card, features=FEATURES)

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        """Let the dummy generate, and change what it says on the way out."""
        asked = request.sampling
        plain = replace(
            Sampling(asked.max_tokens, asked.min_tokens, asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.ignore_eos),
            seed=asked.seed + 1_000_003 * asked.choice,
            temperature=max(asked.temperature, 0.01) if asked.choice else asked.temperature,
        )
        if asked == plain:
            super().generate(request, sink, reservation)
            return
        plain = replace(plain, ignore_eos=True) if asked.json_schema else plain
        super().generate(replace(request, sampling=plain), _Altered(self, request, sink), reservation)


class _Altered:
    """The sink of the dummy's own run."""

    def __init__(self, engine: CapableEngine, request: GenerateRequest, sink: GenerationSink) -> None:
        self._engine, self._request, self._sink, self._asked = engine, request, sink, request.sampling
        self._document = list(json.dumps(instance(json.loads(self._asked.json_schema))).encode()) if self._asked.json_schema else None
        self._forced = next((token for token, bias in self._asked.logit_bias if bias >= 50), None)
        self._position = 0

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        for token in tokens:
            self._one(token)

    def _one(self, token: int) -> None:
        if self._forced is not None:
            token = self._forced
        if self._document is not None:
            token = self._document[self._position]
        self._position += 1
        most = self._asked.logprobs
        told = [(-0.25, tuple((token + rank, -0.25 - rank) for rank in range(most)))] if most >= 0 else None
        self._sink.on_tokens([token], told)
        if self._document is not None and self._position == len(self._document):
            self._engine.cancel(self._request.request_id)
            self._sink.on_finish("stop", GenerationStats(len(self._request.tokens), 0, 0.0, 0.0, 0.0))

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        self._sink.on_finish(reason, stats)

    def on_error(self, error: MeshserveError) -> None:
        self._sink.on_error(error)


def instance(schema: Any, root: Any = None) -> Any:
    """A document that is valid under a schema, of the few keywords that the tests use."""
    root = schema if root is None else root
    if "$ref" in schema:
        found = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[int(part)] if isinstance(found, list) else found[part]
        return instance(found, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], root)
    if schema.get("type", "object") == "object":
        return {name: instance(part, root) for name, part in schema.get("properties", {}).items()}
    if schema["type"] == "array":
        return [instance(schema["items"], root)]
    return {"string": "Paris", "integer": 7, "number": 2.5, "boolean": True, "null": None}[schema["type"]]

"""Requests with a schema, through a running engine."""

import asyncio
import json
from array import array
from typing import Any

import pytest

from meshserve.engines.dummy.choosing import Chooser
from meshserve.engines.dummy.documents import WrittenDocument, read_schema
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.wire.generation import Sampling
from tests.engines.documents_harness import check_valid, text_of
from tests.engines.dummy_harness import GenerationRecord, a_request, generated, prefilled, running_engine, tokens_of, written

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"anyOf": [{"enum": ["cat", "dog"]}, {"type": "null"}]}},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


def a_document_request(tokens: "array[int]", request_id: str = "r", num_generated: int = 0, **sampling: Any) -> Any:
    wanted = {"max_tokens": 200, "ignore_eos": False, "json_schema": json.dumps(PERSON)} | sampling
    return a_request(tokens, request_id, num_generated, **wanted)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "seed": 4},
        {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.7, "logprobs": 3},
        {"logit_bias": ((ord("{"), -100.0), (300, 100.0))},
    ],
)
def test_a_document_ends_as_a_stop_is_valid_and_goes_on_elsewhere(sampling: dict[str, Any]) -> None:
    async def run() -> None:
        async with running_engine() as one, running_engine() as other, running_engine(num_blocks=64) as small:
            prompt, record = tokens_of(11), GenerationRecord()
            one.generate(a_document_request(prompt, **sampling), record)
            whole = await record.end()
            assert record.reason == "stop"
            check_valid(PERSON, text_of(whole))
            for position in (1, len(whole) // 2, len(whole) - 1, len(whole)):
                rest = GenerationRecord()
                other.generate(a_document_request(prompt + array("I", whole[:position]), "t", position, **sampling), rest)
                assert await rest.end() == whole[position:]
                assert (rest.reason, rest.logprobs) == ("stop", record.logprobs[position:])
            crowd = [GenerationRecord() for _ in range(4)]
            for number, sink in enumerate(crowd):
                small.generate(a_document_request(prompt, f"r{number}", **sampling), sink)
            assert [await sink.end() for sink in crowd] == [whole] * 4

    asyncio.run(run())


def test_other_prompts_seeds_choices_and_kv_give_other_documents() -> None:
    async def run() -> None:
        async with running_engine() as engine, running_engine() as other:
            texts = [text_of(await generated(engine, a_document_request(tokens_of(9, seed)))) for seed in range(12)]
            assert len(set(texts)) == 12
            variants: list[list[dict[str, Any]]] = [[{"seed": value} for value in range(5)], [{"choice": value} for value in range(5)]]
            for extras in variants:
                drawn = [await generated(engine, a_document_request(tokens_of(9), temperature=1.0, **extra)) for extra in extras]
                assert len(set(map(text_of, drawn))) == 5
            prompt = tokens_of(9)
            reservation = other.reserve(a_request(prompt))
            for index, payload in (await prefilled(engine, prompt[:-1])).blocks.items():
                reservation.write(index, bytes([payload[0] ^ 1, *payload[1:]]), written)
            sink = GenerationRecord()
            other.generate(a_document_request(prompt), sink, reservation)
            assert text_of(await sink.end()) != texts[0]
            check_valid(PERSON, text_of(sink.tokens))

    asyncio.run(run())


def test_a_document_is_cut_by_max_tokens_and_padded_with_blanks_where_it_must_go_on() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            whole = await generated(engine, a_document_request(tokens_of(9)))
            cut, padded, held = GenerationRecord(), GenerationRecord(), GenerationRecord()
            engine.generate(a_document_request(tokens_of(9), "cut", max_tokens=7), cut)
            engine.generate(a_document_request(tokens_of(9), "padded", ignore_eos=True), padded)
            engine.generate(a_document_request(tokens_of(9), "held", min_tokens=len(whole) + 5), held)
            assert (await cut.end(), cut.reason) == (whole[:7], "length")
            assert (await padded.end(), padded.reason) == (whole + [32] * (200 - len(whole)), "length")
            assert (await held.end(), held.reason) == (whole + [32] * 5, "stop")

    asyncio.run(run())


def test_probabilities_of_what_keeps_a_document_valid_sum_to_one() -> None:
    sampling = Sampling(logprobs=20, json_schema=json.dumps(PERSON), logit_bias=((ord("}"), 1.0),), temperature=1.0)
    chooser = Chooser(sampling, [], WrittenDocument(read_schema(sampling.json_schema)))
    probe, position = WrittenDocument(read_schema(sampling.json_schema)), 0
    while True:
        offered = probe.candidates()
        token, logprobs = chooser.choose(7**22 * (position + 1), position)
        assert logprobs is not None
        assert {other for other, _ in logprobs[1]} <= {*offered, EOS_TOKEN}
        if len(offered) <= 1:
            assert logprobs == (0.0, ((token, 0.0),))
        if token == EOS_TOKEN:
            break
        probe.take(token)
        position += 1
    assert position > 20


def test_an_output_that_the_schema_does_not_allow_is_not_continued() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            with pytest.raises(InvalidRequest, match="does not follow the request's schema"):
                engine.generate(a_document_request(tokens_of(11) + array("I", list(b"[1")), num_generated=2), GenerationRecord())
            with pytest.raises(Unsupported, match="pattern"):
                engine.check(a_document_request(tokens_of(11), json_schema='{"type": "string", "pattern": "x"}'))

    asyncio.run(run())

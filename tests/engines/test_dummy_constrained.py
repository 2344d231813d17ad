"""Requests with a schema, through a running engine, and what the dummy model makes of any constraint."""

import asyncio
import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.dummy.constrained import ConstrainedOutput
from meshserve.engines.dummy.sampler import Sampler
from meshserve.engines.tokenizers import EOS_TOKEN, load_tokenizer
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.wire.generation import Sampling
from tests.engines.constraint_harness import CASES, COMPILER, PERSON, TOKENIZER, a_document_request, check_valid, constraint_of, text_of
from tests.engines.dummy_harness import GenerationRecord, a_request, generated, prefilled, running_engine, tokens_of, written
from tests.engines.trained import files_of, write_directory

PIECES = [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)]
SOME_LIMIT = 256


def an_output(keys: frozenset[bytes] | None = frozenset(), **constraint: Any) -> ConstrainedOutput:
    return ConstrainedOutput(COMPILER.compile(**constraint), PIECES, keys)


def document_of(output: ConstrainedOutput, seed: int, sampling: Sampling | None = None) -> list[int]:
    """What a sampler makes of it, with digests that follow from the seed."""
    sampler, context, tokens = Sampler(sampling or Sampling(), [], output), seed, list[int]()
    while len(tokens) < SOME_LIMIT:
        context = (context * 6364136223846793005 + 1442695040888963407) % 2**64
        token, _ = sampler.sample(context, len(tokens))
        if token == EOS_TOKEN:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("schema", [schema for schema, _, _ in CASES.values()], ids=CASES)
def test_documents_are_valid_end_soon_and_differ(schema: Any) -> None:
    async def run() -> None:
        async with running_engine(num_blocks=1000) as engine:
            texts = set()
            for seed in range(12):
                for temperature in (0.0, 1.0):
                    wanted: Any = {"json_schema": json.dumps(schema), "temperature": temperature, "seed": seed}
                    sink = GenerationRecord()
                    engine.generate(a_document_request(tokens_of(9, seed), max_tokens=SOME_LIMIT, **wanted), sink)
                    texts.add(text_of(await sink.end()))
                    assert sink.reason == "stop", text_of(sink.tokens)
            for text in texts:
                check_valid(schema, text)
            assert len(texts) > 1 or "const" in schema

    asyncio.run(run())


@pytest.mark.parametrize("name", ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
def test_strings_of_a_format_end_soon(name: str) -> None:
    schema = {"type": "string", "format": name}
    texts = {text_of(document_of(an_output(json_schema=json.dumps(schema)), seed)) for seed in range(12)}
    assert len(texts) > 3
    assert max(map(len, texts)) <= 50
    for text in texts:
        constraint = constraint_of(schema)
        assert constraint.num_allowed(text.encode()) == len(text)


def test_plain_outputs_under_a_constraint_end_soon_too() -> None:
    for constraint in ({"regex": "[a-z]+(-[a-z]+)*"}, {"regex": ".*"}, {"choices": ("no", "not now", "yes")}, {"regex": r"\d{3}x?"}):
        texts = [text_of(document_of(an_output(None, **constraint), seed)) for seed in range(12)]
        assert len(set(texts)) > 2
        assert max(map(len, texts)) < 60
        for text in texts:
            assert COMPILER.compile(**constraint).num_allowed(text.encode()) == len(text)


def test_objects_have_the_properties_that_their_schema_names_even_if_others_may_come() -> None:
    schema = {"type": "object", "properties": {"alpha": {"type": "string"}, "beta": {"type": "integer"}, "gamma": {}}, "required": ["beta"]}
    outputs = [an_output(frozenset((b"alpha", b"beta", b"gamma")), json_schema=json.dumps(schema)) for _ in range(30)]
    found = [json.loads(text_of(document_of(output, seed))) for seed, output in enumerate(outputs)]
    assert all({"beta"} <= document.keys() <= {"alpha", "beta", "gamma"} for document in found)
    assert {"alpha", "gamma"} <= {key for document in found for key in document}


def test_what_refers_to_itself_comes_to_an_end() -> None:
    tree = json.dumps({"type": "array", "items": {"$ref": "#"}})
    assert max(len(document_of(an_output(json_schema=tree), seed, Sampling(temperature=2.0, seed=seed))) for seed in range(40)) < SOME_LIMIT


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_documents_are_valid_in_another_vocabulary_and_go_on_elsewhere(kind: str, tmp_path: Path) -> None:
    files = files_of(kind)
    tokenizer, directory = load_tokenizer("huggingface", files), write_directory(tmp_path / kind, files)

    async def run() -> None:
        async with running_engine(tokenizer=directory) as one, running_engine(tokenizer=directory) as other:
            for name in ("an object", "a pattern", "lengths", "bounds"):
                wanted: Any = {"json_schema": json.dumps(CASES[name][0]), "temperature": 1.0, "presence_penalty": 0.5}
                whole = await generated(one, a_document_request(tokens_of(9), **wanted))
                check_valid(CASES[name][0], b"".join(map(tokenizer.token_bytes, whole)).decode())
                half = len(whole) // 2
                rest = await generated(other, a_document_request(tokens_of(9) + array("I", whole[:half]), "t", half, **wanted))
                assert rest == whole[half:]

    asyncio.run(run())


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
                reservation.write([(index, bytes([payload[0] ^ 1, *payload[1:]]))], written)
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


def test_probabilities_of_what_it_chooses_among_sum_to_one() -> None:
    sampling = Sampling(logprobs=20, json_schema=json.dumps(PERSON), logit_bias=((ord("}"), 1.0),), temperature=1.0)
    sampler, probe, position = (
        Sampler(sampling, [], an_output(json_schema=sampling.json_schema)),
        an_output(json_schema=sampling.json_schema),
        0,
    )
    while True:
        context = 7**22 * (position + 1)
        offered = probe.candidates(context, True)
        token, logprobs = sampler.sample(context, position)
        assert logprobs is not None
        assert len(set(offered)) == len(offered)
        assert {other for other, _ in logprobs[1]} <= {*offered}
        if len(offered) == 1:
            assert logprobs == (0.0, ((token, 0.0),))
        if token == EOS_TOKEN:
            break
        probe.take(token)
        position += 1
    assert position > 20


def test_an_output_that_the_schema_does_not_allow_is_not_continued() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            for text in (b"[1", b"{,", b'{"name":"x","age":3,"pets":[]}x'):
                with pytest.raises(InvalidRequest, match="does not follow the request's grammar"):
                    engine.generate(a_document_request(tokens_of(11) + array("I", list(text)), num_generated=len(text)), GenerationRecord())
            with pytest.raises(Unsupported, match="uniqueItems"):
                engine.check(a_document_request(tokens_of(11), json_schema='{"type": "array", "uniqueItems": true}'))

    asyncio.run(run())

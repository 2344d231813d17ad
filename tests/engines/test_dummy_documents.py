"""Documents under a schema: valid, finite, soon refused if they cannot be, and a function of the KV cache where they are free."""

import asyncio
import json
import random
import time
from array import array
from collections.abc import Iterator
from datetime import date, datetime
from datetime import time as time_of_day
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.dummy.choosing import Chooser
from meshserve.engines.dummy.documents import WrittenDocument, read_schema
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from meshserve.errors import InvalidRequest, Unsupported
from meshserve.wire.generation import Sampling
from tests.engines.dummy_harness import GenerationRecord, a_request, generated, prefilled, running_engine, tokens_of

TOKENIZER = ByteTokenizer()
MOST_TOKENS = 20_000


def text_of(tokens: list[int]) -> str:
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


def written(schema: Any, seed: int = 0) -> list[int]:
    """A document whose choices are drawn evenly."""
    document, draw, tokens = WrittenDocument(read_schema(json.dumps(schema))), random.Random(seed), list[int]()
    while offered := document.candidates():
        assert len(set(offered)) == len(offered)
        tokens.append(draw.choice(offered))
        document.take(tokens[-1])
        assert len(tokens) < MOST_TOKENS
    return tokens


def check_valid(schema: Any, text: str) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def texts_of(schema: Any, num_seeds: int = 60) -> set[str]:
    texts = {text_of(written(schema, seed)) for seed in range(num_seeds)}
    for text in texts:
        check_valid(schema, text)
    return texts


# --- schemas made up

NAMES = st.sampled_from(["a", "ab", "kind", 'quo"te', "über", "\ud800", "next value"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from([1.0, 0.5, 1e-7]), st.text(max_size=4), NAMES)


def bounds(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.tuples(values, values).map(sorted).map(lambda pair: {low: pair[0], high: pair[1]})
    return st.one_of(st.just({}), values.map(lambda value: {low: value}), values.map(lambda value: {high: value}), pairs)


STRINGS = st.one_of(
    bounds("minLength", "maxLength", st.integers(0, 40)).map(lambda found: {"type": "string", **found}),
    st.sampled_from(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]).map(
        lambda found: {"type": "string", "format": found}
    ),
)
NUMBERS = st.one_of(
    bounds("minimum", "maximum", st.integers(-500, 500)).map(lambda found: {"type": "integer", **found}),
    bounds("minimum", "exclusiveMaximum", st.floats(-1e6, 1e6)).map(lambda found: {"type": "number", **found}),
    st.tuples(st.sampled_from([1, 2, 7, 0.1, 0.25, 1.5, 12.5]), st.sampled_from(["integer", "number"]), st.integers(-99, 99)).map(
        lambda found: {"type": found[1], "multipleOf": found[0], "exclusiveMinimum": found[2]}
    ),
)
LEAVES = st.one_of(
    STRINGS,
    NUMBERS,
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {}, True, {"type": "object"}, {"type": ["string", "null"]}, {"$ref": "#/$defs/node"}]
    ),
    st.lists(SCALARS, min_size=1, max_size=5).map(lambda found: {"enum": found}),
    SCALARS.map(lambda found: {"const": found}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    extra: dict[str, Any] = draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}]))
    return {"type": "object", "properties": properties, "required": required, **extra}


def compounds(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        objects(inner),
        st.tuples(inner, bounds("minItems", "maxItems", st.integers(0, 4))).map(
            lambda found: {"type": "array", "items": found[0], **found[1]}
        ),
        st.lists(inner, min_size=1, max_size=4).map(lambda found: {"anyOf": found, "description": "one of these"}),
        st.tuples(objects(inner), objects(inner)).map(lambda found: {"allOf": list(found)}),
        st.tuples(objects(inner), st.lists(objects(inner), min_size=1, max_size=2)).map(lambda found: {**found[0], "anyOf": found[1]}),
    )


NODE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
    "required": ["value", "next", "children"],
    "additionalProperties": False,
}
SCHEMAS = st.recursive(LEAVES, compounds, max_leaves=8).map(lambda found: {"$defs": {"node": NODE}, "allOf": [found]})


@settings(max_examples=400, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_whatever_is_written_is_valid(schema: dict[str, Any], seed: int) -> None:
    try:
        tokens = written(schema, seed)
    except Unsupported as refused:
        contradicts = "no document that ends" in refused.message or "cannot be merged" in refused.message
        assert contradicts, refused.message
        return
    check_valid(schema, text_of(tokens))


@settings(max_examples=100, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32), st.integers(0, 100))
def test_what_may_come_next_follows_from_the_tokens_so_far(schema: dict[str, Any], seed: int, stop: int) -> None:
    try:
        tokens = written(schema, seed)
    except Unsupported:
        return
    again = WrittenDocument(read_schema(json.dumps(schema)))
    one = WrittenDocument(read_schema(json.dumps(schema)))
    for token in tokens[:stop]:
        again.take(token)
    for token in tokens[:stop]:
        one.take(token)
    for token in tokens[stop:]:
        assert token in again.candidates()
        assert again.candidates() == one.candidates()
        again.take(token)
        one.take(token)
    assert again.candidates() == ()


@pytest.mark.parametrize(
    ("schema", "some"),
    [
        ({"enum": ["red", "green", 3, None, {"a": [1]}]}, {'"red"', '"green"', "3", "null", '{"a": [1]}'}),
        ({"enum": [1, "1", 2.5, True], "type": ["string", "boolean"]}, {'"1"', "true"}),
        ({"const": "grün"}, {'"grün"'}),
        ({"type": ["boolean", "null"]}, {"true", "false", "null"}),
        ({"type": "integer", "minimum": 7, "maximum": 9}, {"7", "8", "9"}),
        ({"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9}, {"8"}),
        ({"type": "integer", "multipleOf": 2.5, "minimum": 1, "maximum": 11}, {"5", "10"}),
        ({"type": "number", "minimum": 0.3, "maximum": 0.3}, {"0.3"}),
        ({"type": "array", "items": {"const": 1}, "maxItems": 2}, {"[1]", "[1, 1]"}),
        ({"type": "array", "maxItems": 0}, {"[]"}),
        ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, {"[1]", "[2]"}),
        ({"type": "string", "maxLength": 0}, {'""'}),
        ({"properties": {"a": {"const": 1}, "b": {"const": 2}}}, {"{}", '{"a": 1}', '{"b": 2}', '{"a": 1, "b": 2}'}),
        ({"type": "object", "properties": {}}, {"{}"}),
        ({"anyOf": [{"const": {"k": 1}}, {"const": {"k": 2}}, False]}, {'{"k": 1}', '{"k": 2}'}),
        ({"oneOf": [{"type": "null"}, {"enum": [1, 2], "type": "integer"}]}, {"null", "1", "2"}),
        ({"allOf": [{"type": ["integer", "null"]}, {"minimum": 3, "maximum": 5}, {"maximum": 4, "type": "number"}]}, {"3", "4"}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 5}}}, {"5"}),
        ({"properties": {"a": {"const": 1}}, "required": ["a"], "anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, None),
    ],
)
def test_every_freedom_that_a_small_schema_leaves_is_used(schema: dict[str, Any], some: set[str] | None) -> None:
    texts = texts_of(schema)
    assert len(texts) > 1 if some is None else texts == some


def test_branches_that_begin_alike_are_all_written() -> None:
    branches = [
        {"type": "object", "properties": {"kind": {"const": kind}, "value": {"type": "integer"}}, "required": ["kind", "value"]}
        for kind in ("circle", "cube", "cone")
    ]
    for word in ("anyOf", "oneOf"):
        kinds = {json.loads(text)["kind"] for text in texts_of({word: branches})}
        assert kinds == {"circle", "cube", "cone"}


def test_an_object_of_which_nothing_is_said_is_small_and_not_empty() -> None:
    for text in texts_of({"type": "object"}):
        assert 1 <= len(json.loads(text)) <= 3
    assert len(texts_of({"type": "object"})) > 30
    assert {len(json.loads(text)) for text in texts_of({"type": "object", "additionalProperties": {"type": "integer"}})} >= {1, 2}


FORMATS: dict[str, Any] = {
    "date": date.fromisoformat,
    "time": time_of_day.fromisoformat,
    "date-time": datetime.fromisoformat,
    "ipv4": ip_address,
    "ipv6": ip_address,
    "uuid": UUID,
}


@pytest.mark.parametrize("name", FORMATS)
def test_strings_have_the_format_that_is_asked_for(name: str) -> None:
    texts = texts_of({"type": "string", "format": name})
    assert len(texts) > 5
    for text in texts:
        FORMATS[name](json.loads(text))


def test_what_refers_to_itself_comes_to_an_end() -> None:
    lengths = [len(written({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, seed)) for seed in range(40)]
    assert max(lengths) < 2000
    tree = {"type": "array", "items": {"$ref": "#"}, "minItems": 0}
    assert max(len(written(tree, seed)) for seed in range(40)) < 2000


# --- schemas that will not do


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "^a+$"}, "'pattern', which this model cannot keep to"),
        ({"type": "string", "format": "iri"}, "format 'iri' is unknown; known are date, time"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"properties": {"a": {"if": {}}}}, "'if'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "cannot be told apart; anyOf would do"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no document that ends"),
        ({"enum": [1], "type": "string"}, "no document that ends"),
        (False, "no document that ends"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no document that ends"),
        ({"$ref": "#"}, "no document that ends"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no document that ends"),
        ({"$ref": "#", "type": "object"}, "nests more than 64 levels"),
        ({"$ref": "http://example.org/schema"}, "only '#' and '#/...' can be followed"),
        ({"type": "array", "minItems": 10**9}, "too long"),
        ({"type": "string", "minLength": 10**6}, "too long"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 2}, "uniqueItems"),
        ({"anyOf": [{"type": "null"}] * 65}, "65 branches"),
        ({"properties": {"a": {"$id": "x"}}}, r"\$id within"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_words(schema: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as refused:
        read_schema(json.dumps(schema))
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 30_000,
        '{"enum": [NaN]}',
        '{"const": 1e999}',
        "3",
        '"string"',
        '{"type": "text"}',
        '{"type": []}',
        '{"type": 3}',
        '{"minLength": -1}',
        '{"minLength": 1e300}',
        '{"minimum": "3"}',
        '{"minimum": 1e101}',
        '{"multipleOf": 0}',
        '{"required": [1]}',
        '{"properties": []}',
        '{"anyOf": []}',
        '{"anyOf": [3]}',
        '{"items": [{}]}',
        '{"enum": 3}',
        '{"$ref": 3}',
        '{"$ref": "#/$defs/a"}',
        '{"exclusiveMinimum": true, "minimum": 3}',
    ],
)
def test_what_is_no_schema_is_a_mistake_of_the_client(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_schema(text)
    assert refused.value.param == "response_format"


def nested(depth: int, inner: Any, wrap: Any) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def hostile_schemas() -> Iterator[tuple[str, Any]]:
    steps, last = range(20), {"d20": {"type": "string"}}
    doubling = {f"d{index}": {"allOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in steps}
    yield "doubling allOf", {"$ref": "#/$defs/d0", "$defs": doubling | last}
    halves = {f"d{index}": {"anyOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in steps}
    yield "doubling anyOf", {"$ref": "#/$defs/d0", "$defs": halves | last}
    pair = {
        f"d{index}": {"properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"}, "required": ["a", "b"]} for index in steps
    }
    yield "doubling properties", {"$ref": "#/$defs/d0", "$defs": pair | last}
    optional = {f"d{index}": {"properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"}} for index in steps}
    yield "doubling optional properties", {"$ref": "#/$defs/d0", "$defs": optional | last}
    yield "anyOf of anyOf", nested(3, {"type": "object"}, lambda inner: {"anyOf": [inner] * 8})
    yield "anyOf within properties", nested(3, {"type": "null"}, lambda inner: {"anyOf": [{"properties": {"a": inner}}] * 7})
    yield "deep", nested(60, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "deeper", nested(200, {"type": "null"}, lambda inner: {"items": inner, "minItems": 1})
    yield "wide", {"properties": {f"n{index}": {"type": "integer"} for index in range(1500)}}
    yield "wide and required", {"properties": {f"n{index}": {} for index in range(700)}, "required": [f"n{index}" for index in range(700)]}
    yield "long enum", {"enum": [f"value {index}" for index in range(4000)]}
    yield (
        "long enum, often",
        {"anyOf": [{"$ref": "#/$defs/e", "type": "string"}] * 60, "$defs": {"e": {"enum": [f"v{i}" for i in range(4000)]}}},
    )
    yield "long enums, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 60, "$defs": {"e": {"enum": [f"v{i}" for i in range(4000)]}}}
    yield "long required, merged", {"allOf": [{"$ref": "#/$defs/e"}] * 900, "$defs": {"e": {"required": [f"v{i}" for i in range(4000)]}}}
    yield "deep enum", {"allOf": [{"$ref": "#/$defs/e"}] * 60, "$defs": {"e": {"enum": [nested(150, 1, lambda inner: [inner, inner][:1])]}}}
    yield "many constants", {"oneOf": [{"const": index} for index in range(64)]}
    kinds = [{"type": "object", "properties": {"k": {"const": f"k{index}"}}, "required": ["k"]} for index in range(64)]
    yield "many kinds", {"oneOf": kinds}
    yield "some kinds", {"oneOf": kinds[:30]}
    yield "narrow numbers", {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1e-300} for _ in range(64)]}
    for number in (90, 200):
        huge = {f"n{index}": {"type": "integer", "minimum": 10**99 + index, "multipleOf": 7} for index in range(number)}
        yield f"{number} huge numbers", {"properties": huge}
        tiny = {f"n{index}": {"minimum": 1e99, "maximum": 1e99, "multipleOf": (1 + index) * 1e-99} for index in range(number)}
        yield f"{number} tiny multiples", {"properties": tiny}
    yield "many numbers", {"properties": {f"n{index}": {"type": "number", "minimum": index % 50} for index in range(400)}}
    back = {"anyOf": [{"type": "null"}, *[{"$ref": "#" + "/items" * depth} for depth in range(0, 40, 3)]]}
    yield "many ways back", nested(40, back, lambda inner: {"type": "array", "items": inner, "minItems": 1})
    mutual = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{j}"} for j in range(30)]} for i in range(30)}
    yield "all refer to all", {"$ref": "#/$defs/d0", "$defs": {**mutual, "d0": {"anyOf": [{"$ref": "#/$defs/d1"}, {"type": "null"}]}}}
    yield "long reference", {"$ref": "#" + "/a" * 20_000}


HOSTILE = dict(hostile_schemas())


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_costs_little_and_its_documents_are_bounded(schema: Any) -> None:
    text = json.dumps(schema)
    durations = []
    for _ in range(5):
        began = time.thread_time()
        try:
            read_schema.__wrapped__(text)
            is_read = True
        except (Unsupported, InvalidRequest):
            is_read = False
        durations.append(time.thread_time() - began)
    assert min(durations) < 0.010
    if is_read:
        read_schema(text)  # once more, to be kept
        began = time.thread_time()
        tokens = written(schema)
        assert len(tokens) < MOST_TOKENS
        assert (time.thread_time() - began) / len(tokens) < 0.001
        check_valid(schema, text_of(tokens))


# --- through the engine

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
            reservation = other.reserve(prompt)
            for index, payload in (await prefilled(engine, prompt[:-1])).blocks.items():
                reservation.write(index, bytes([payload[0] ^ 1, *payload[1:]]))
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

"""Penalties, bias and log probabilities, against the model's logits written out over the whole vocabulary."""

import asyncio
from array import array
from collections import Counter
from math import exp, fsum, log
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.dummy.model import Cursor, KVContents, candidates, next_token
from meshserve.engines.dummy.sampler import Sampler
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer
from meshserve.errors import InvalidRequest
from meshserve.wire.generation import Sampling, TokenLogprobs
from tests.engines.dummy_harness import GenerationRecord, a_request, generated, prefilled, running_engine, tokens_of, write_prompt, written

VOCAB_SIZE = ByteTokenizer.vocab_size
CONTEXTS = st.integers(0, 2**64 - 1)
PENALTIES = st.sampled_from([0.0, 0.0, 0.3, 2.0, -1.5])
OUTPUTS = st.lists(st.sampled_from([0, 65, 257, 258, 300, 301, VOCAB_SIZE - 1]), max_size=60)
BIASES = st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-100, 100), max_size=8)


def logits_by_the_book(
    context: int, sampling: Sampling, position: int, output: list[int], prompt: tuple[int, ...] = ()
) -> dict[int, float]:
    """Every token that may come, with the logit that the documentation gives it."""
    can_end = not sampling.ignore_eos and position >= sampling.min_tokens
    tokens, _ = candidates(context, position, can_end)
    wins_eos = tokens[0] == EOS_TOKEN
    logits = dict.fromkeys(range(VOCAB_SIZE), -50.0)
    for rank, token in enumerate(tokens):
        logits[token] = -0.4 * (rank - wins_eos) - 6.0 * wins_eos if token != EOS_TOKEN else 0.0
    for token in {*prompt, *output}:  # the best candidate counts as 10 here
        lead = logits[token] + 10.0
        logits[token] = (lead / sampling.repetition_penalty if lead > 0 else lead * sampling.repetition_penalty) - 10.0
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token, count in Counter(output).items():
        logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    if not can_end:
        del logits[EOS_TOKEN]
    return logits


def check_logprobs(found: TokenLogprobs | None, token: int, logits: dict[int, float], num_alternatives: int) -> None:
    assert found is not None
    own, listed = found
    best = max(logits.values())
    total = best + log(fsum(exp(logit - best) for logit in logits.values()))
    assert own == pytest.approx(logits[token] - total, abs=1e-9)
    assert len(listed) == min(num_alternatives, len(logits))
    assert [value for _, value in listed] == pytest.approx(
        sorted((v - total for v in logits.values()), reverse=True)[: len(listed)], abs=1e-9
    )
    for other, value in listed:
        assert value == pytest.approx(logits[other] - total, abs=1e-9)
    assert len({other for other, _ in listed}) == len(listed)
    assert dict(listed).get(token, own) == own
    assert sorted(listed, key=lambda pair: -pair[1]) == list(listed)


@settings(max_examples=300, deadline=None)
@given(
    CONTEXTS,
    st.integers(0, 60),
    OUTPUTS,
    BIASES,
    PENALTIES,
    PENALTIES,
    st.sampled_from([1.0, 1.0, 1.3, 10.0, 0.1]),
    st.integers(0, 20),
    st.sampled_from([0.0, 0.7, 5.0]),
    st.booleans(),
)
def test_tokens_and_log_probabilities_are_those_of_the_whole_vocabulary(
    context: int,
    position: int,
    output: list[int],
    bias: dict[int, float],
    presence: float,
    frequency: float,
    repetition: float,
    num: int,
    temperature: float,
    goes_on: bool,
) -> None:
    sampling = Sampling(
        temperature=temperature,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
        logprobs=num,
        ignore_eos=goes_on,
        seed=position,
    )
    prompt = (66, 257, 290)
    logits = logits_by_the_book(context, sampling, position, output, prompt)
    token, logprobs = Sampler(sampling, output, prompt=prompt).sample(context, position)
    check_logprobs(logprobs, token, logits, num)
    best = max(logits.values())
    assert logits[token] >= best - (1e-9 if temperature == 0 else 30.0 + 1e-9)


@given(CONTEXTS, st.integers(0, 60), st.sampled_from([0.0, 0.7, 5.0]), st.integers(0, 9), st.floats(0.1, 1), OUTPUTS, BIASES, PENALTIES)
def test_to_ask_for_log_probabilities_changes_no_token(
    context: int, position: int, temperature: float, top_k: int, top_p: float, output: list[int], bias: dict[int, float], penalty: float
) -> None:
    plain: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 3}
    bent: dict[str, Any] = {"logit_bias": tuple(bias.items()), "presence_penalty": penalty, "frequency_penalty": penalty}
    for extras in ({}, bent):
        chosen = [Sampler(Sampling(**plain, **extras, logprobs=num), output).sample(context, position)[0] for num in (-1, 0, 20)]
        assert len(set(chosen)) == 1
        if not extras:
            assert chosen[0] == next_token(context, Sampling(**plain), position)


@given(CONTEXTS, st.integers(0, 60), st.sampled_from([0.3, 0.7, 5.0]), st.floats(0, 1), st.integers(0, 99), BIASES)
def test_nothing_is_drawn_that_is_less_likely_than_min_p_of_the_best(
    context: int, position: int, temperature: float, min_p: float, seed: int, bias: dict[int, float]
) -> None:
    for biases in ((), tuple(bias.items())):
        sampling = Sampling(temperature=temperature, min_p=min_p, seed=seed, logit_bias=biases)
        logits = logits_by_the_book(context, sampling, position, [])
        token = Sampler(sampling).sample(context, position)[0] if biases else next_token(context, sampling, position)
        assert exp((logits[token] - max(logits.values())) / temperature) >= min_p - 1e-9


def test_probabilities_over_the_whole_vocabulary_sum_to_one() -> None:
    for context in range(0, 2**64, 2**58 + 977):
        for position in range(0, 26, 3):
            every = (Sampler(Sampling(logprobs=0)).rate(context, position, token)[0] for token in range(VOCAB_SIZE))
            assert fsum(map(exp, every)) == pytest.approx(1, abs=1e-12)


@given(CONTEXTS, st.integers(1, 60), st.integers(0, VOCAB_SIZE - 1), st.integers(0, 20))
def test_a_prompts_tokens_are_rated_by_the_same_logits(context: int, index: int, token: int, num: int) -> None:
    rated = Sampler(Sampling(logprobs=num)).rate(context, index, token)
    check_logprobs(rated, token, logits_by_the_book(context, Sampling(), index, []), num)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("token", [0, 255, EOS_TOKEN, 257, VOCAB_SIZE - 1])
def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(token: int, temperature: float) -> None:
    for context in range(0, 2**64, 2**59 + 31):
        for position in range(25):
            forced = Sampling(temperature=temperature, logit_bias=((token, 100.0),))
            assert Sampler(forced).sample(context, position)[0] == token
            favourite = next_token(context, Sampling(temperature=temperature), position)
            banned = Sampling(temperature=temperature, logit_bias=((favourite, -100.0),))
            assert Sampler(banned).sample(context, position)[0] != favourite


def test_a_part_of_speech_that_is_banned_altogether_leaves_the_rest_of_the_vocabulary() -> None:
    for position in range(25):
        words, _ = candidates(5 << 40, position, False)
        token, logprobs = Sampler(Sampling(logit_bias=tuple((word, -100.0) for word in words), logprobs=3)).sample(5 << 40, position)
        assert token not in words
        assert logprobs is not None
        assert logprobs[0] == pytest.approx(-log(VOCAB_SIZE - len(words)))


def test_choices_draw_their_own_tokens_and_the_first_those_of_a_request_without() -> None:
    def drawn(choice: int) -> list[int]:
        return [next_token(7**20 + position, Sampling(temperature=1.0, seed=4, choice=choice), position) for position in range(40)]

    assert drawn(0) == [next_token(7**20 + position, Sampling(temperature=1.0, seed=4), position) for position in range(40)]
    assert len({tuple(drawn(choice)) for choice in range(5)}) == 5


def text(seed: int, sampling: Sampling) -> "array[int]":
    cursor = Cursor(KVContents(16, 24, "m"), list(range(40)), 0)
    cursor.extend([seed])
    tokens = array("I")
    for position in range(200):
        tokens.append(next_token(cursor.context, sampling, position))
        if tokens[-1] == EOS_TOKEN:
            break
        cursor.append(tokens[-1])
    return tokens


@pytest.mark.parametrize(
    ("sampling", "digest"),
    [
        ({}, "c3e154fc3e24eca7"),
        ({"ignore_eos": True}, "467bad6016226257"),
        ({"temperature": 0.8}, "10f9e2e05d022595"),
        ({"temperature": 1.3, "top_p": 0.8, "top_k": 9, "min_tokens": 40}, "eae2e5e2067ed39b"),
    ],
)
def test_texts_are_those_of_output_version_1(sampling: dict[str, Any], digest: str) -> None:
    """Other digests need another `_OUTPUT_VERSION`."""
    texts = [text(seed, Sampling(seed=seed, **sampling)).tobytes() for seed in range(20)]
    assert xxhash.xxh3_64_hexdigest(b"".join(texts)) == digest


BENT: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    "rewards": {"presence_penalty": -2.0, "frequency_penalty": -2.0, "temperature": 0.9},
    "bias": {"logit_bias": ((46, 48.0), (300, 3.0)), "temperature": 1.0},
    "repetition": {"repetition_penalty": 1.8, "min_p": 0.1, "temperature": 1.5},
    "logprobs": {"logprobs": 7, "temperature": 0.5},
    "all": {"logprobs": 7, "temperature": 1.0, "presence_penalty": 0.5, "logit_bias": ((70, 46.0),), "choice": 2},
}


@pytest.mark.parametrize("sampling", BENT.values(), ids=BENT)
def test_another_worker_and_one_that_was_preempted_go_on_with_the_same_tokens(sampling: dict[str, Any]) -> None:
    async def run() -> None:
        prompt = tokens_of(11)
        async with running_engine() as one, running_engine() as other, running_engine(num_blocks=24) as small:
            record = GenerationRecord()
            one.generate(a_request(prompt, max_tokens=60, **sampling), record)
            whole = await record.end()
            assert whole != await generated(one, a_request(prompt, max_tokens=60, seed=99)) or "logprobs" in sampling
            for position in (1, 23, 59):
                rest = GenerationRecord()
                other.generate(a_request(prompt + array("I", whole[:position]), "t", position, max_tokens=60, **sampling), rest)
                assert await rest.end() == whole[position:]
                assert rest.logprobs == record.logprobs[position:]
            crowd = [GenerationRecord() for _ in range(3)]
            for number, sink in enumerate(crowd):
                small.generate(a_request(prompt, f"r{number}", max_tokens=60, **sampling), sink)
            assert [await sink.end() for sink in crowd] == [whole] * 3
            assert [sink.logprobs for sink in crowd] == [record.logprobs] * 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "much", "little"), [("frequency_penalty", 1.0, -2.0), ("presence_penalty", 2.0, -2.0), ("repetition_penalty", 2.0, 0.2)]
)
def test_penalties_make_a_text_repeat_itself_less(name: str, much: float, little: float) -> None:
    penalties: list[dict[str, Any]] = [{name: much}, {name: little}]

    async def run() -> None:
        async with running_engine() as engine:
            plain = await generated(engine, a_request(tokens_of(9), max_tokens=200))
            varied = await generated(engine, a_request(tokens_of(9), max_tokens=200, **penalties[0]))
            dull = await generated(engine, a_request(tokens_of(9), max_tokens=200, **penalties[1]))
            assert len(set(dull)) < len(set(plain)) < len(set(varied))

    asyncio.run(run())


def test_every_token_has_its_log_probabilities_and_a_plain_one_has_none() -> None:
    async def run() -> None:
        async with running_engine() as engine:
            rated, plain = GenerationRecord(), GenerationRecord()
            engine.generate(a_request(tokens_of(9), "rated", logprobs=2), rated)
            engine.generate(a_request(tokens_of(9), "plain"), plain)
            assert await rated.end() == await plain.end()
            assert [listed[0] for _, listed in rated.logprobs] == [
                (token, own) for token, (own, _) in zip(rated.tokens, rated.logprobs, strict=True)
            ]
            assert plain.logprobs == []

    asyncio.run(run())


def test_a_prompt_is_rated_alike_computed_here_cached_handed_over_or_preempted() -> None:
    async def run() -> None:
        prompt = tokens_of(23)
        request = a_request(prompt, prompt_logprobs=2)
        async with running_engine() as one, running_engine() as other, running_engine(num_blocks=12, max_batch_tokens=5) as small:
            fresh, cached, moved, crowded = (GenerationRecord() for _ in range(4))
            one.generate(request, fresh)
            await fresh.end()
            one.generate(request, cached)
            await cached.end()
            assert cached.stats is not None
            assert cached.stats.num_cached_tokens == 20
            reservation = other.reserve(a_request(prompt))
            await write_prompt(reservation, one, prompt)
            other.generate(request, moved, reservation)
            first = GenerationRecord()
            small.generate(a_request(tokens_of(8, seed=1), "first", max_tokens=30), first)
            small.generate(request, crowded)
            await first.end()
            for sink in (fresh, cached, moved, crowded):
                assert await sink.end() == fresh.tokens
                assert sink.prompt_logprobs == fresh.prompt_logprobs
            assert fresh.prompt_logprobs is not None
            assert len(fresh.prompt_logprobs) == 23
            assert fresh.prompt_logprobs[0] is None
            longer, continued = GenerationRecord(), GenerationRecord()
            one.generate(a_request(prompt + array("I", [1, 2]), prompt_logprobs=2), longer)
            other.generate(a_request(prompt, num_generated=3, prompt_logprobs=2), continued)
            await longer.end()
            assert longer.prompt_logprobs is not None
            assert longer.prompt_logprobs[:23] == fresh.prompt_logprobs
            await continued.end()
            assert continued.prompt_logprobs is None

    asyncio.run(run())


def test_a_corrupted_block_gives_a_prompt_other_ratings() -> None:
    async def run() -> None:
        prompt = tokens_of(13)
        async with running_engine() as one, running_engine() as other:
            right, wrong = GenerationRecord(), GenerationRecord()
            one.generate(a_request(prompt, prompt_logprobs=3), right)
            await right.end()
            reservation = other.reserve(a_request(prompt))
            for index, payload in (await prefilled(one, prompt[:-1])).blocks.items():
                reservation.write([(index, bytes([payload[0] ^ (index == 1), *payload[1:]]))], written)
            other.generate(a_request(prompt, prompt_logprobs=3), wrong, reservation)
            await wrong.end()
            assert right.prompt_logprobs is not None
            assert wrong.prompt_logprobs is not None
            assert wrong.prompt_logprobs[:5] == right.prompt_logprobs[:5]
            assert all(one != other for one, other in zip(wrong.prompt_logprobs[5:], right.prompt_logprobs[5:], strict=True))

    asyncio.run(run())


def test_a_long_prompt_is_rated_in_many_short_turns() -> None:
    async def run() -> None:
        async with running_engine(kv_bytes_per_token=1, block_size=16, num_blocks=2048) as engine:
            sink = GenerationRecord()
            engine.generate(a_request(tokens_of(16_000), max_tokens=1, prompt_logprobs=1), sink)
            num_turns = 0
            while not sink.ended.is_set():
                await asyncio.sleep(0)
                num_turns += 1
            assert num_turns >= 16_000 / 512
            assert sink.prompt_logprobs is not None
            assert len(sink.prompt_logprobs) == 16_000

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sampling", "param", "words"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2, not 2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "not nan"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20, not 21"),
        ({"logprobs": -2}, "logprobs", "not -2"),
        ({"prompt_logprobs": 21}, "logprobs", "not 21"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias", f"there are 0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", "the token -1"),
        ({"logit_bias": ((5, 100.5),)}, "logit_bias", "from -100 to 100, not 100.5 as for the token 5"),
        ({"logit_bias": ((5, float("nan")),)}, "logit_bias", "not nan"),
        ({"choice": -1}, "n", "no choice -1"),
        ({"min_p": 1.5}, "min_p", "from 0 to 1, not 1.5"),
        ({"min_p": float("nan")}, "min_p", "not nan"),
        *(({"repetition_penalty": value}, "repetition_penalty", "at least 0.01, not") for value in (0.0, 1e-50, 0.0099, float("nan"))),
    ],
)
def test_what_is_out_of_range_is_refused_by_the_name_of_its_field(sampling: dict[str, Any], param: str, words: str) -> None:
    async def run() -> None:
        async with running_engine() as engine:
            with pytest.raises(InvalidRequest, match=words) as refused:
                engine.check(a_request(tokens_of(5), **sampling))
            assert refused.value.param == param

    asyncio.run(run())


def test_a_prompt_too_long_or_with_unknown_tokens_is_not_rated() -> None:
    async def run() -> None:
        async with running_engine(num_blocks=1024) as engine:
            with pytest.raises(InvalidRequest, match="at most 1560 tokens with 20 alternatives each, and not for 1561"):
                engine.check(a_request(tokens_of(1561), prompt_logprobs=20))
            engine.check(a_request(tokens_of(1560), prompt_logprobs=20))
            with pytest.raises(InvalidRequest, match=f"the token {VOCAB_SIZE}"):
                engine.check(a_request(array("I", [1, VOCAB_SIZE, 2]), prompt_logprobs=0))

    asyncio.run(run())

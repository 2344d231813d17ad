"""Options, loading, tokenizer and sampling of the dummy engine."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.dummy.model import Cursor, KVContents, next_token
from meshserve.engines.loading import load_engine
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer, load_tokenizer
from meshserve.errors import StartupFailed, TokenizerFailed, UsageError
from meshserve.wire.card import ModelCard
from meshserve.wire.generation import Sampling
from meshserve.wire.structs import replace


def card(model: str | None = None, **options: str) -> ModelCard:
    return DummyEngine(EngineOptions(model, options)).card


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("colour", "red", "no option 'colour'; it knows profile, kv_bytes_per_token, block_size"),
        ("block_size", "0", "whole number of at least 1"),
        ("num_blocks", "many", "not 'many'"),
        ("profile", "warp", "one of instant, reference, "),
        ("step_ms", "-1", "not negative"),
        ("step_ms", "nan", "not negative"),
        ("tokenizer", "gpt2", "one of bytes"),
    ],
)
def test_options_that_will_not_do_are_refused_with_what_would(key: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        card(**{key: value})


def test_cards_are_equal_exactly_when_tokens_and_kv_are() -> None:
    assert card() == card(profile="reference", max_batch="1", step_ms="3")
    small = card(num_blocks="9")
    assert (small.model_hash, small.context_length) == (card().model_hash, 9 * 16), "a request has no more tokens than its pool"
    hashes = {card().model_hash, card("other").model_hash, card(kv_bytes_per_token="8").model_hash, card(block_size="8").model_hash}
    assert len(hashes) == 4
    assert ModelCard.from_wire(card().to_wire()) == card()


def test_engines_are_found_by_name_and_by_module_and_class() -> None:
    assert load_engine("dummy", EngineOptions()).card.model == "dummy"
    assert load_engine("meshserve.engines.dummy:DummyEngine", EngineOptions("named")).card.model == "named"
    with pytest.raises(UsageError, match="no engine 'dumy'; there are dummy"):
        load_engine("dumy", EngineOptions())
    for name in ("meshserve.nowhere:Engine", "meshserve.engines.dummy:Nobody", ":"):
        with pytest.raises(StartupFailed, match="cannot be loaded"):
            load_engine(name, EngineOptions())


@given(st.text())
def test_text_survives_the_byte_tokenizer(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.typecode == "I"
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == text.encode("utf-8", "replace")
    assert len(tokens) == len(text.encode("utf-8", "replace"))


def test_special_and_unknown_tokens_stand_for_nothing_and_words_for_distinct_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert [tokenizer.token_bytes(token) for token in (tokenizer.eos_token, tokenizer.vocab_size, 10**9, -1)] == [b""] * 4
    words = [tokenizer.token_bytes(token) for token in range(257, tokenizer.vocab_size)]
    assert len(set(words)) == len(words)
    assert all(words)


def test_a_tokenizer_that_is_not_here_is_named() -> None:
    assert isinstance(load_tokenizer(card().tokenizer), ByteTokenizer)
    with pytest.raises(TokenizerFailed, match="the tokenizer 'llama' is unknown"):
        load_tokenizer("llama")


CONTEXTS = st.integers(0, 2**64 - 1)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 5.0]),
    top_k=st.integers(0, 40),
    seed=st.integers(-(2**70), 2**70),
    top_p=st.floats(0.001, 1),
    min_tokens=st.integers(0, 30),
    ignore_eos=st.booleans(),
)


@given(CONTEXTS, SAMPLINGS, st.integers(0, 200))
def test_any_sampling_gives_a_word_or_an_end_that_is_allowed(context: int, sampling: Sampling, position: int) -> None:
    token = next_token(context, sampling, position)
    assert token == next_token(context, sampling, position)
    assert EOS_TOKEN <= token < ByteTokenizer.vocab_size
    if token == EOS_TOKEN:
        assert not sampling.ignore_eos
        assert position >= max(1, sampling.min_tokens)


@given(CONTEXTS, SAMPLINGS, st.integers(0, 200))
def test_a_small_nucleus_and_one_candidate_are_greedy(context: int, sampling: Sampling, position: int) -> None:
    greedy = next_token(context, replace(sampling, temperature=0.0), position)
    assert next_token(context, replace(sampling, temperature=0.7, top_k=1), position) == greedy
    assert next_token(context, replace(sampling, temperature=0.7, top_p=1e-9), position) == greedy


def length_of(seed: int, temperature: float) -> int:
    contents = KVContents(16, 16, "m")
    cursor = Cursor(contents, list(range(100)), 0)
    cursor.extend([seed])
    sampling = Sampling(temperature=temperature, seed=seed)
    for position in range(1500):
        token = next_token(cursor.context, sampling, position)
        if token == EOS_TOKEN:
            return position
        cursor.append(token)
    return 1500


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_end_after_about_sixty_tokens(temperature: float) -> None:
    lengths = [length_of(seed, temperature) for seed in range(300)]
    assert 50 < sum(lengths) / len(lengths) < 70


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 40), st.integers(1, 40))
def test_a_cursor_opened_anywhere_goes_on_as_if_it_had_never_stopped(tokens: list[int], stop: int, kv_bytes_per_token: int) -> None:
    one, other = KVContents(4, kv_bytes_per_token, "m"), KVContents(4, kv_bytes_per_token, "m")
    blocks = list(range(10))
    unbroken = Cursor(one, blocks, 0)
    unbroken.extend(tokens)
    before = Cursor(other, blocks, 0)
    before.extend(tokens[:stop])
    after = Cursor(other, blocks, before.num_tokens)
    assert after.context == before.context
    after.extend(tokens[stop:])
    assert after.context == unbroken.context
    assert one.read([(block, 4) for block in blocks]) == other.read([(block, 4) for block in blocks])


def test_a_block_that_nobody_wrote_gives_another_context() -> None:
    contents = KVContents(2, 8, "m")
    Cursor(contents, [0, 1], 0).extend(array("I", [1, 2, 3, 4]))
    assert Cursor(contents, [0, 1], 4).context != Cursor(contents, [0, 7], 4).context


@given(st.binary(min_size=96, max_size=96), st.integers(1, 40))
def test_rows_that_came_from_elsewhere_are_kept_to_the_byte_and_go_on_from_there(payload: bytes, token: int) -> None:
    contents = KVContents(4, 32, "m")
    Cursor(contents, [0], 0).extend([token] * 4)
    own = contents.read([(0, 4)])[0]
    contents.write([(0, payload)])
    cursor = Cursor(contents, [0, 1], 3)
    cursor.append(token)
    held = contents.read([(0, 4)])[0]
    assert held[:96] == payload and len(held) == 128
    contents.digest([0], 0, 1, {})
    assert Cursor(contents, [0, 1], 4).context == cursor.context
    contents.write([(0, own)])
    assert contents.read([(0, 4)])[0] == own

"""Rules about the tokens that come out."""

from typing import Any

from meshserve.engines.conformance.recorders import demand
from meshserve.engines.conformance.subject import GREEDY, SEEDED, Promise, Subject, Trial
from meshserve.errors import Unsupported

_EACH_WAY = (GREEDY, SEEDED)
_SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}}, "required": ["a", "b"]}'


def lengths(block_size: int) -> tuple[int, ...]:
    """Of prompts, around the ends of blocks."""
    return (1, block_size - 1 or 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 3)


async def a_request_ends_once_with_all_its_tokens(subject: Subject) -> None:
    """Each request ends exactly once, last; it gives out `max_tokens` tokens if nothing ends it before, and is unknown from then on."""
    async with subject.trial() as trial:
        for length in lengths(trial.block_size):
            for max_tokens in (1, 2, 9):
                output = trial.generate(trial.request(subject.prompt(length), max_tokens=max_tokens))
                overdue_s = trial.engine.overdue_s(output.request_id)
                demand(overdue_s is not None and overdue_s >= 0, "a request that the engine holds is overdue by 0 s or more")
                demand(len(await output.end()) == max_tokens and output.reason == "length", "a request ends with all its tokens")
                is_known = trial.engine.overdue_s(output.request_id), trial.engine.admission(output.request_id)
                demand(is_known == (None, None), "a request that has ended is unknown")


async def equal_requests_get_equal_tokens(subject: Subject) -> None:
    """The same request gives the same tokens in another engine of the same model, greedy and seeded; and again in the same one, if it
    promises COMPANY."""
    found = []
    for _ in range(2):
        async with subject.trial() as trial:
            prompts = [subject.prompt(length, length) for length in lengths(trial.block_size)]
            found.append([await trial.output(prompt, **sampling) for prompt in prompts for sampling in _EACH_WAY])
            if subject.promise >= Promise.COMPANY:
                found.append([await trial.output(prompt, **sampling) for prompt in prompts for sampling in _EACH_WAY])
    demand(all(tokens == found[0] for tokens in found), "equal requests get equal tokens")


async def sampling_is_a_function_of_the_seed(subject: Subject) -> None:
    """Above temperature 0 another seed, or another choice of one seed, gives other tokens; at 0 it changes nothing."""
    async with subject.trial() as trial:
        prompt = subject.prompt(trial.block_size)
        hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 24}
        drawn = [await trial.output(prompt, **hot, **draw) for draw in ({"seed": 1}, {"seed": 2}, {"seed": 1, "choice": 1})]
        demand(drawn[0] != drawn[1] and drawn[0] != drawn[2], "another seed, or another choice, gives other tokens")
        if subject.promise >= Promise.PATHS:
            demand(await trial.output(prompt, seed=1) == await trial.output(prompt, seed=2), "a greedy request has no use for its seed")


async def company_changes_nothing(subject: Subject) -> None:
    """If promised (COMPANY): a request gets the same tokens alone and beside others, whatever they do."""
    subject.demand_promise(Promise.COMPANY)
    async with subject.trial() as alone, subject.trial() as together:
        prompts = [subject.prompt(length, number) for number, length in enumerate(lengths(alone.block_size))]
        expected = [await alone.output(prompt, **SEEDED) for prompt in prompts]
        outputs = [together.generate(together.request(prompt, **SEEDED)) for prompt in prompts]
        demand([await output.end() for output in outputs] == expected, "company does not change a request's tokens")


async def a_cached_prefix_changes_nothing(subject: Subject) -> None:
    """If promised (PATHS): a prompt of which the engine holds a prefix gets the tokens that it gets elsewhere, and at least one is
    computed."""
    subject.demand_promise(Promise.PATHS)
    async with subject.trial() as fresh, subject.trial() as warm:
        size = fresh.block_size
        await warm.output(subject.prompt(3 * size + 1))
        for shared, length in ((size, 2 * size), (2 * size, 2 * size + 1), (3 * size, 3 * size), (size + 1, size + 5)):
            prompt = subject.prompt(3 * size + 1)[:shared] + subject.prompt(length - shared, length)
            num_cached = warm.engine.num_cached_tokens(warm.request(prompt))
            demand(num_cached % size == 0 and num_cached < length, f"{num_cached} of {length} tokens are whole blocks, and not all")
            demand(await warm.output(prompt) == await fresh.output(prompt), f"{num_cached} cached tokens change nothing")


async def another_worker_continues(subject: Subject) -> None:
    """If promised (COMPANY): with `num_generated` tokens of the output at the end of its prompt, a request gets the rest that it would
    have got."""
    subject.demand_promise(Promise.COMPANY)
    async with subject.trial() as one, subject.trial() as other:
        for sampling in _EACH_WAY:
            prompt = subject.prompt(one.block_size + 3)
            whole = await one.output(prompt, **sampling)
            for position in (1, 6, len(whole) - 1):
                so_far = prompt[:]
                so_far.extend(whole[:position])
                rest = await other.output(so_far, position, **sampling)
                demand(rest == whole[position:], f"after {position} tokens another worker goes on with the same ones")


_FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("penalties", {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "temperature": 0.8, "seed": 3}),
    ("logit_bias", {"logit_bias": ((40, 3.0), (41, -100.0)), "temperature": 1.2, "top_k": 20, "min_p": 0.01, "seed": 4}),
    ("logprobs", {"logprobs": 3, "frequency_penalty": 0.5, "temperature": 1.1, "choice": 2, "seed": 5}),
    ("json_schema", {"json_schema": _SCHEMA, "ignore_eos": False, "temperature": 0.7, "seed": 6}),
    ("json_schema", {"json_schema": _SCHEMA, "ignore_eos": False, "min_tokens": 8, "logprobs": 1}),
    ("regex", {"regex": "[a-f]{3,9} [0-9]{2,8}", "ignore_eos": False, "temperature": 1.0, "seed": 7}),
    ("regex", {"choices": ("a first choice", "a second one"), "ignore_eos": False, "logprobs": 2}),
)
"""Sampling parameters, after the feature of the card without which they are left out."""


async def another_worker_continues_whatever_was_asked(subject: Subject) -> None:
    """If promised (COMPANY): wherever an output is cut, another worker goes on with the same tokens, log probabilities and end, as what
    penalties, constraints and `min_tokens` need to know is in the output so far."""
    subject.demand_promise(Promise.COMPANY)
    async with subject.trial() as one, subject.trial() as other:
        known = one.engine.card.features
        asked = [dict(way) for way in _EACH_WAY] + [sampling for feature, sampling in _FEATURES if feature in known]
        for sampling in asked:
            prompt = subject.prompt(one.block_size + 1)
            whole = one.generate(one.request(prompt, **sampling))
            await whole.end()
            for position in range(1, min(len(whole.tokens) + 1, 12)):
                so_far = prompt[:]
                so_far.extend(whole.tokens[:position])
                rest = other.generate(other.request(so_far, position, **sampling))
                found = (await rest.end(), rest.reason, rest.logprobs)
                expected = (whole.tokens[position:], whole.reason, whole.logprobs[position:])
                demand(found == expected, f"{sampling}: after {position} tokens another worker goes on as the first would: {found}")


async def an_end_of_the_model_ends_the_output(subject: Subject) -> None:
    """The model's end token ends a request with `stop` and is not given out; not before `min_tokens`, and never with `ignore_eos`."""
    async with subject.trial() as trial:
        if subject.end_token is None or "logit_bias" not in trial.engine.card.features:
            raise Unsupported("there is no way to make this model end its output")
        for min_tokens in (0, 5):
            request = trial.request(subject.prompt(7), min_tokens=min_tokens, ignore_eos=False, logit_bias=((subject.end_token, 100.0),))
            output = trial.generate(request)
            tokens = await output.end()
            demand((len(tokens), output.reason) == (min_tokens, "stop"), f"the end comes after {min_tokens} tokens: {len(tokens)}")
            demand(subject.end_token not in tokens, "the end token is not given out")
        tokens = await trial.output(subject.prompt(7), logit_bias=((subject.end_token, 100.0),))
        demand(len(tokens) == 12 and subject.end_token not in tokens, "with ignore_eos a model does not end")


async def log_probabilities_come_with_their_tokens(subject: Subject) -> None:
    """If the card's features say so: one for each token, at most 0, as many alternatives as asked for, likeliest first."""
    async with subject.trial() as trial:
        if "logprobs" not in trial.engine.card.features:
            raise Unsupported("the model has no log probabilities")
        output = trial.generate(trial.request(subject.prompt(5), logprobs=3))
        await output.end()
        demand(len(output.logprobs) == 12, "each token has its log probability")
        for own, alternatives in output.logprobs:
            values = [value for _, value in alternatives]
            demand(own <= 0 and len(values) == 3 and values == sorted(values, reverse=True), f"likeliest first: {own}, {values}")
            demand(own == values[0], "a greedy token is the likeliest one")


async def more_requests_than_places_are_served_in_turn(subject: Subject) -> None:
    """What does not fit into the batch waits, and gets what it would have got alone."""
    async with subject.trial() as trial:
        count = min(40, 2 * (trial.engine.load().max_running or 8) + 3)
        outputs = [trial.generate(trial.request(subject.prompt(3 + number, number), max_tokens=5)) for number in range(count)]
        await _demand_outputs(subject, trial, [await output.end() for output in outputs])


async def _demand_outputs(subject: Subject, trial: Trial, found: list[list[int]]) -> None:
    demand(all(len(tokens) == 5 for tokens in found), "all get their tokens")
    if subject.promise >= Promise.COMPANY:
        for number in (0, len(found) - 1):
            demand(await trial.output(subject.prompt(3 + number, number), max_tokens=5) == found[number], "waiting changes nothing")


OUTPUT_CHECKS = (
    a_request_ends_once_with_all_its_tokens,
    equal_requests_get_equal_tokens,
    sampling_is_a_function_of_the_seed,
    company_changes_nothing,
    a_cached_prefix_changes_nothing,
    another_worker_continues,
    another_worker_continues_whatever_was_asked,
    an_end_of_the_model_ends_the_output,
    log_probabilities_come_with_their_tokens,
    more_requests_than_places_are_served_in_turn,
)

"""Rules about refusing, cancelling, closing, and about what an engine says of itself."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from meshserve.engines.conformance.handoff import refusal_of
from meshserve.engines.conformance.recorders import Output, Recorder, demand
from meshserve.engines.conformance.subject import Promise, Subject, Trial
from meshserve.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, MeshserveError, PoolFull, Unsupported
from meshserve.kv.pool import block_hashes
from meshserve.wire.generation import BOUNDS


async def an_engine_describes_its_model(subject: Subject) -> None:
    """The card names the model and its hash; each file that it names is there, under the SHA-256 of its contents."""
    async with subject.trial() as trial:
        engine = trial.engine
        demand(engine.card.model and engine.card.model_hash and engine.card.context_length > 0, "a card names its model")
        named = {described.sha256 for described in engine.card.files}
        demand(named <= engine.files.keys(), "each file of the card is there")
        for sha256, content in engine.files.items():
            demand(hashlib.sha256(content).hexdigest() == sha256, "files are found by the SHA-256 of their contents")


async def what_cannot_be_served_is_refused_at_once(subject: Subject) -> None:
    """A request that is out of bounds, too long for the context or for the pool raises in the call, and leaves nothing behind."""
    async with subject.trial() as trial:
        prompt = subject.prompt(5)
        beyond = [{bounds.name: value} for bounds in BOUNDS for value in (bounds.least - 1, bounds.most + 1)]
        others: tuple[dict[str, float], ...] = ({"max_tokens": 0}, {"top_p": 0.0}, {"repetition_penalty": 0.0}, {"choice": -1})
        invalid = [*((0, sampling) for sampling in (*others, *beyond)), (12, {}), (5, {}), (-1, {})]
        for num_generated, sampling in invalid:
            request = trial.request(prompt, num_generated, "same", **sampling)
            _demand_raises(InvalidRequest, partial(trial.engine.check, request), f"{sampling} or {num_generated} of 5 tokens generated")
            _demand_raises(InvalidRequest, partial(trial.generate, request), f"{sampling} or {num_generated} of 5 tokens generated")
        empty: array[int] = array("I")
        _demand_raises(InvalidRequest, lambda: trial.generate(trial.request(empty, 0, "same")), "an empty prompt")
        context_length = trial.engine.card.context_length
        too_long = trial.request(subject.prompt(context_length - 11), 0, "same")
        _demand_raises(ContextLengthExceeded, lambda: trial.engine.check(too_long), "a request longer than the context")
        _demand_raises(ContextLengthExceeded, lambda: trial.generate(too_long), "a request longer than the context")
        longer_than_pool = trial.request(subject.prompt(trial.num_blocks * trial.block_size + 1), 0, "same")
        _demand_raises((PoolFull, ContextLengthExceeded), lambda: trial.generate(longer_than_pool), "a prompt longer than the pool")
        await trial.generate(trial.request(prompt, 0, "same")).end()


async def prefills_and_reservations_are_refused_at_once(subject: Subject) -> None:
    """The same for what comes by handoff."""
    async with subject.trial() as trial:
        trial.demand_handoff()
        empty: array[int] = array("I")
        longest = subject.prompt(max(trial.num_blocks * trial.block_size, trial.engine.card.context_length) + 1)
        _demand_raises(InvalidRequest, lambda: trial.prefill(empty, request_id="same"), "a prefill of nothing")
        _demand_raises(InvalidRequest, lambda: trial.prefill(subject.prompt(5), -1, "same"), "a prefill from block -1 on")
        _demand_raises((ContextLengthExceeded, PoolFull), lambda: trial.prefill(longest, request_id="same"), "a prefill beyond the pool")
        _demand_raises(InvalidRequest, lambda: trial.engine.reserve(trial.request(empty)), "a reservation for nothing")
        _demand_raises(PoolFull, lambda: trial.engine.reserve(trial.request(longest)), "a reservation beyond the pool")
        await trial.prefill(subject.prompt(5), request_id="same").end()


def _demand_raises(expected: type[MeshserveError] | tuple[type[MeshserveError], ...], call: Callable[[], object], what: str) -> None:
    error = refusal_of(call)
    demand(isinstance(error, expected), f"{what} is refused in the call: {error!r}")


async def tokens_beyond_the_vocabulary_hurt_nobody(subject: Subject) -> None:
    """A prompt with a token that no model has is refused as InvalidRequest, or served; the engine goes on."""
    async with subject.trial() as trial:
        prompt = array("I", [*subject.prompt(4), 2**32 - 1])
        calls: list[Callable[[], Recorder]] = [lambda: trial.generate(trial.request(prompt))]
        if trial.engine.kv_layout.can_hand_over:
            calls.append(lambda: trial.prefill(prompt))
        for call in calls:
            try:
                recorder = call()
                await trial.until(lambda found=recorder: found.is_over, "a request ends")  # type: ignore[misc]  # bound in the loop
            except InvalidRequest:
                pass
        await trial.output(subject.prompt(4))


async def ids_are_one_request_each(subject: Subject) -> None:
    """A request with the id of one that has not ended is refused; of one that has ended, or was cancelled, it is served."""
    async with subject.trial() as trial:
        first = trial.generate(trial.request(subject.prompt(9), 0, "same", max_tokens=50))
        _demand_raises(InvalidRequest, lambda: trial.generate(trial.request(subject.prompt(5), 0, "same")), "an id that is taken")
        demand(len(await first.end()) == 50, "the one that came first goes on")
        second = trial.generate(trial.request(subject.prompt(9), 0, "same", max_tokens=50))
        await second.reach(1)
        trial.cancel(second)
        await trial.generate(trial.request(subject.prompt(5), 0, "same")).end()


async def cancelled_requests_are_silent(subject: Subject) -> None:
    """Whether it waits, is in its prompt or in its output: a cancelled request's sink is called no more, and its blocks are free."""
    async with subject.trial() as trial:
        trial.engine.cancel("unknown")
        prompt = subject.prompt(4 * trial.block_size)
        trial.cancel(trial.generate(trial.request(prompt)))
        demand(trial.engine.load().num_waiting == 0, "a request that is cancelled before its first step does not wait")
        in_prompt = trial.generate(trial.request(subject.prompt(4 * trial.block_size, 1), max_tokens=40))
        await trial.until(lambda: trial.engine.load().num_running > 0 or in_prompt.is_over, "a request runs")
        trial.cancel(in_prompt)
        for num_tokens in (1, 2, 20):
            output = trial.generate(trial.request(subject.prompt(9, num_tokens), max_tokens=40))
            await output.reach(num_tokens)
            trial.cancel(output)
            trial.cancel(output)
        demand(trial.engine.load().used_blocks == 0, "cancelled requests hold nothing")
        if trial.engine.kv_layout.can_hand_over:
            blocks = trial.prefill(subject.prompt(6 * trial.block_size, 2))
            await trial.until(lambda: bool(blocks.found) or blocks.is_over, "a block comes")
            trial.cancel(blocks)
        await trial.output(prompt)


async def a_sink_may_cancel_anything(subject: Subject) -> None:
    """A sink that cancels its own request, or another one of the same step, within a call: neither is called again."""
    async with subject.trial() as trial:
        for own in (True, False):
            outputs: list[Output] = []

            def cancel(own: bool = own, outputs: list[Output] = outputs) -> None:
                if len(outputs) == 2 and len(outputs[0].tokens) == 3 and not outputs[1 - own].is_over:
                    trial.cancel(outputs[1 - own])

            outputs += (trial.generate(trial.request(subject.prompt(5, number), max_tokens=30), on_call=cancel) for number in range(2))
            demand(len(await outputs[own].end()) == 30, "the other one goes on")
        if trial.engine.kv_layout.can_hand_over:
            blocks = trial.prefill(subject.prompt(3 * trial.block_size), on_call=lambda: None if blocks.is_over else trial.cancel(blocks))
            await trial.until(lambda: blocks.is_over, "a block comes")
            demand(blocks.num_calls == 1, "a prefill that is cancelled at its first blocks gives out no others")


async def preempted_requests_go_on(subject: Subject) -> None:
    """Requests that outgrow the pool together are all served; if promised (ALWAYS), each as if it were alone."""
    async with subject.trial() as trial:
        max_tokens = min(trial.engine.card.context_length, trial.num_blocks * trial.block_size * 2 // 5) - trial.block_size - 1
        prompts = [subject.prompt(trial.block_size + 1, number) for number in range(3)]
        outputs = [trial.generate(trial.request(prompt, max_tokens=max_tokens)) for prompt in prompts]
        found = [await output.end() for output in outputs]
        demand(all(len(tokens) == max_tokens for tokens in found), "all get their tokens")
        if subject.promise >= Promise.ALWAYS:
            for prompt, tokens in zip(prompts, found, strict=True):
                demand(await trial.output(prompt, max_tokens=max_tokens) == tokens, "preemption changes nothing")


async def a_pool_full_of_cached_blocks_serves(subject: Subject) -> None:
    """What is cached and held by nobody gives way to what is new; prompts that come again get their tokens again."""
    async with subject.trial() as trial:
        prompts = [subject.prompt(2 * trial.block_size + 1, number) for number in range(trial.num_blocks // 2 + 2)]
        found = [await trial.output(prompt, max_tokens=3) for prompt in prompts]
        load = trial.engine.load()
        demand(load.used_blocks == 0 and load.cached_blocks <= load.num_blocks, "cached blocks are within the pool, and held by nobody")
        demand(
            subject.promise < Promise.ALWAYS or await trial.output(prompts[0], max_tokens=3) == found[0],
            "what was evicted is computed again",
        )
        most = min(trial.engine.card.context_length, trial.num_blocks * trial.block_size)
        demand(len(await trial.output(subject.prompt(most - 3, 99), max_tokens=3)) == 3, "a prompt as long as the pool is served")


async def watched_blocks_are_those_that_are_found(subject: Subject) -> None:
    """The hashes stored less those evicted are what `num_cached_tokens` finds, and what the next watcher is told at first."""
    async with subject.trial() as trial:
        engine, size = trial.engine, trial.block_size
        known: set[int] = set()

        def follow(stored: Sequence[int], evicted: Sequence[int]) -> None:
            demand(known.isdisjoint(stored) and known.issuperset(evicted), "what is stored was not there before, what is evicted was")
            known.update(stored)
            known.difference_update(evicted)

        known.update(engine.watch_blocks(follow))
        prompts = [subject.prompt(2 * size + 1, number) for number in range(trial.num_blocks // 2 + 2)]
        for prompt in prompts:
            await trial.output(prompt, max_tokens=2)
        await trial.until(lambda: _is_consistent(trial, known, prompts), "the watcher knows what is found")
        demand({*engine.watch_blocks(None)} == known, "who watches next is told what is there")


def _is_consistent(trial: Trial, known: set[int], prompts: list["array[int]"]) -> bool:
    for prompt in prompts:
        hashes = block_hashes(prompt, trial.block_size, trial.engine.card.model_hash)
        num_known = next((index for index, found in enumerate(hashes) if found not in known), len(hashes))
        if trial.engine.num_cached_tokens(trial.request(prompt)) != num_known * trial.block_size:
            return False
    return True


async def a_closed_engine_is_silent_and_starts_again(subject: Subject) -> None:
    """`close` ends all work without a call, and refuses what comes later; it may come twice. After `start` the engine serves again."""
    async with subject.trial() as trial:
        prompt = subject.prompt(2 * trial.block_size + 1)
        expected = await trial.output(prompt)
        output = trial.generate(trial.request(prompt, max_tokens=20))
        waiting = trial.generate(trial.request(subject.prompt(5)))
        reservation = trial.engine.reserve(trial.request(prompt)) if trial.engine.kv_layout.can_hand_over else None
        await output.reach(2)
        for recorder in (output, waiting):
            recorder.silence("its engine was closed")
        await trial.engine.close()
        await trial.engine.close()
        _demand_raises(EngineFailed, lambda: trial.generate(trial.request(prompt)), "a request to a closed engine")
        demand(trial.engine.load().used_blocks == 0, "a closed engine holds nothing")
        if reservation is not None:
            reservation.release()
        await trial.engine.start()
        demand(await trial.output(prompt) == expected, "an engine that was closed and started again gives the same tokens")


async def what_is_unsupported_is_refused_in_the_call(subject: Subject) -> None:
    """Log probabilities of the prompt, and constraints, are given or refused as Unsupported by `check` and `generate` alike."""
    async with subject.trial() as trial:
        asked: tuple[dict[str, Any], ...] = (
            {"prompt_logprobs": 0}, {"json_schema": '{"type": "integer"}'}, {"regex": "[ab]+"}, {"choices": ("yes", "no")}
        )  # fmt: skip
        for sampling in asked:
            request = trial.request(subject.prompt(5), ignore_eos=False, max_tokens=4, **sampling)
            error = refusal_of(partial(trial.engine.check, request))
            demand(error is None or isinstance(error, Unsupported), f"{sampling} is served, or Unsupported: {error!r}")
            if error is None:
                await trial.generate(request).end()
            else:
                _demand_raises(Unsupported, partial(trial.generate, request), f"{sampling}, which `check` refuses,")


LIFECYCLE_CHECKS = (
    an_engine_describes_its_model,
    what_cannot_be_served_is_refused_at_once,
    prefills_and_reservations_are_refused_at_once,
    what_is_unsupported_is_refused_in_the_call,
    tokens_beyond_the_vocabulary_hurt_nobody,
    ids_are_one_request_each,
    cancelled_requests_are_silent,
    a_sink_may_cancel_anything,
    preempted_requests_go_on,
    a_pool_full_of_cached_blocks_serves,
    watched_blocks_are_those_that_are_found,
    a_closed_engine_is_silent_and_starts_again,
)

"""Rules about KV blocks on their way out and in."""

from array import array
from collections.abc import Callable

from meshserve.engines.conformance.outputs import lengths
from meshserve.engines.conformance.recorders import demand
from meshserve.engines.conformance.subject import SEEDED, Promise, Subject, Trial
from meshserve.engines.protocol import Reservation
from meshserve.errors import BlockRefused, MeshserveError, PoolFull, Unsupported


def refusal_of(call: Callable[[], object]) -> MeshserveError | None:
    """The error that a call raises."""
    try:
        call()
    except MeshserveError as error:
        return error
    return None


def _nobody(error: MeshserveError | None) -> None:
    """Waits for a written block."""


async def an_engine_without_handoff_says_so(subject: Subject) -> None:
    """An engine whose layout refuses refuses every reservation and prefill too, as Unsupported, and goes on."""
    async with subject.trial() as trial:
        layout = trial.engine.kv_layout
        demand(layout.fingerprint and layout.block_size > 0, "a layout has a fingerprint and a block size")
        if layout.can_hand_over:
            return
        prompt = subject.prompt(trial.block_size + 2)
        demand(isinstance(refusal_of(lambda: trial.engine.reserve(trial.request(prompt))), Unsupported), "no reservations without handoff")
        demand(isinstance(refusal_of(lambda: trial.prefill(prompt)), Unsupported), "no prefills without handoff")
        await trial.output(prompt)


async def a_prefill_gives_out_each_block_once(subject: Subject) -> None:
    """From the first block asked for, ascending, the partial last one included; again the same bytes, if it promises PATHS."""
    async with subject.trial() as trial:
        trial.demand_handoff()
        size = trial.block_size
        for length in lengths(size):
            blocks = await trial.prefill(subject.prompt(length)).end()
            for first in range(len(blocks) + 1):
                again = trial.prefill(subject.prompt(length), first)
                found = await again.end()
                demand(again.num_cached_tokens % size == 0, "prefix hits are whole blocks")
                same = {index: block for index, block in blocks.items() if index >= first}
                demand(
                    found == same if subject.promise >= Promise.PATHS else found.keys() == same.keys(),
                    f"the blocks from {first} on are the same again",
                )


async def handed_over_kv_gives_the_tokens_of_local_kv(subject: Subject) -> None:
    """If promised (PATHS): prefill, reserve, write and generate give what the engine itself would have computed; if promised (ALWAYS), in
    whatever order blocks come."""
    subject.demand_promise(Promise.PATHS)
    async with subject.trial() as trial:
        trial.demand_handoff()
    for number, length in enumerate(lengths(trial.block_size)):
        async with subject.trial() as source, subject.trial() as target:  # new ones, so that nothing else is in their pools
            prompt = subject.prompt(length, number)
            request = target.request(prompt, **SEEDED)
            is_backwards = number % 2 == 0 and subject.promise >= Promise.ALWAYS
            reservation = await target.hand_over(source, request, is_backwards=is_backwards)
            demand(reservation.num_tokens == length - 1, "all of a prompt but its last token is handed over")
            output = target.generate(request, reservation)
            reservation.release()
            demand(await output.end() == await source.output(prompt, **SEEDED), f"KV of {length} tokens is that of this engine")


async def blocks_of_a_cached_prefix_are_not_asked_for(subject: Subject) -> None:
    """What `num_cached_tokens` finds is not missing in a reservation; what was handed over is found by the next prompt, if any is."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        size = target.block_size
        prompt = subject.prompt(3 * size + 2)
        await target.output(prompt[: size + 1])
        for _ in range(2):
            request = target.request(prompt)
            num_cached = target.engine.num_cached_tokens(request)
            reservation = target.engine.reserve(request)
            demand(reservation.num_cached_tokens == num_cached, "a reservation holds what was cached")
            demand(list(reservation.missing()) == list(range(num_cached // size, 4)), "the rest is missing")
            reservation.release()
            request = target.request(prompt)
            output = target.generate(request, await target.hand_over(source, request))
            tokens = await output.end()
            if subject.promise >= Promise.PATHS:
                demand(tokens == await source.output(prompt), "half of a prompt here and half from elsewhere is the whole")


async def unfit_payloads_are_refused(subject: Subject) -> None:
    """A payload that is truncated, has a byte too many or is empty raises BlockRefused; the block is missing as before, and nothing is
    hurt."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        prompt = subject.prompt(2 * target.block_size + 3)
        blocks = await source.prefill(prompt[:-1]).end()
        request = target.request(prompt)
        reservation = target.engine.reserve(request)
        missing = list(reservation.missing())
        for index, (_, payload) in blocks.items():
            for unfit in (payload[:-1], payload + b"\0", b"", payload[: len(payload) // 2], payload * 2):
                _demand_refused(reservation, index, unfit)
        last = len(blocks) - 1
        _demand_refused(reservation, last, blocks[0][1])
        for index in (-1, last + 1, 1 << 40):
            _demand_refused(reservation, index, blocks[0][1])
        demand(list(reservation.missing()) == missing, "what was refused is missing as before")
        for index, (_, payload) in blocks.items():
            demand(await target.write(reservation, index, payload) is None, "a fit payload is taken after unfit ones")
        tokens = await target.generate(request, reservation).end()
        demand(subject.promise < Promise.PATHS or tokens == await source.output(prompt), "refused payloads change nothing")


def _demand_refused(reservation: Reservation, index: int, payload: bytes) -> None:
    error = refusal_of(lambda: reservation.write([(index, payload)], _nobody))
    demand(isinstance(error, BlockRefused), f"{len(payload)} unfit bytes for block {index} are refused: {error!r}")


async def a_block_of_another_place_hurts_nobody(subject: Subject) -> None:
    """Where its bytes tell its place, a block is refused in another; where they do not, it is taken, and only its own request is wrong."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        size = target.block_size
        other = await target.output(subject.prompt(size + 3, 1))
        blocks = await source.prefill(subject.prompt(2 * size)).end()
        reservation = target.engine.reserve(target.request(subject.prompt(2 * size + 1)))
        try:
            await target.write(reservation, 0, blocks[1][1])
        except BlockRefused:
            demand(list(reservation.missing()) == [0, 1], "a refused block is missing as before")
        reservation.release()
        demand(subject.promise < Promise.PATHS or await target.output(subject.prompt(size + 3, 1)) == other, "others do not notice")


async def a_block_is_taken_once(subject: Subject) -> None:
    """A block that is not missing is refused, and so is one that comes after its reservation has ended."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        prompt = subject.prompt(2 * target.block_size + 1)
        blocks = await source.prefill(prompt[:-1]).end()
        reservation = target.engine.reserve(target.request(prompt))
        error = await target.write(reservation, 1, blocks[1][1])
        demand(error is None and list(reservation.missing()) == [0], "a written block is not missing")
        _demand_refused(reservation, 1, blocks[1][1])
        reservation.release()
        _demand_refused(reservation, 0, blocks[0][1])


async def blocks_of_one_write_are_taken_together(subject: Subject) -> None:
    """All of them or none: with an unfit one, or one that comes twice, all are missing as before."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        prompt = subject.prompt(2 * target.block_size + 3)
        blocks = [(index, payload) for index, (_, payload) in (await source.prefill(prompt[:-1]).end()).items()]
        request = target.request(prompt)
        reservation = target.engine.reserve(request)
        missing = list(reservation.missing())
        unfit = [*blocks[:-1], (blocks[-1][0], blocks[-1][1][:-1])]
        for refused in (unfit, [*blocks, blocks[0]], [*blocks, (len(blocks), blocks[0][1])]):
            error = refusal_of(lambda refused=refused: reservation.write(refused, _nobody))  # type: ignore[misc]
            demand(isinstance(error, BlockRefused), f"a write with an unfit block is refused: {error!r}")
            demand(list(reservation.missing()) == missing, "none of its blocks is taken")
        demand(await target.write_all(reservation, blocks) is None, "fit blocks are taken after them")
        demand(reservation.is_complete, "a reservation is complete once all blocks are written")
        tokens = await target.generate(request, reservation).end()
        demand(subject.promise < Promise.PATHS or tokens == await source.output(prompt), "refused payloads change nothing")


async def a_generation_needs_all_blocks(subject: Subject) -> None:
    """With a missing block, or for another prompt, `generate` raises BlockRefused and queues nothing; the reservation goes on."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        prompt = subject.prompt(2 * target.block_size + 1)
        blocks = await source.prefill(prompt[:-1]).end()
        request = target.request(prompt)
        reservation = target.engine.reserve(request)
        await target.write(reservation, 0, blocks[0][1])
        error = refusal_of(lambda: target.generate(request, reservation))
        demand(isinstance(error, BlockRefused), f"a missing block is a BlockRefused: {error!r}")
        await target.write(reservation, 1, blocks[1][1])
        other = target.request(subject.prompt(2 * target.block_size + 1, 1))
        error = refusal_of(lambda: target.generate(other, reservation))
        demand(isinstance(error, BlockRefused), f"a reservation for another prompt is a BlockRefused: {error!r}")
        demand(len(await target.generate(request, reservation).end()) == 12, "the same id goes on with the same reservation")
        again = refusal_of(lambda: target.generate(target.request(prompt), reservation))
        demand(isinstance(again, BlockRefused), f"a reservation is used once: {again!r}")


async def a_release_gives_back_once(subject: Subject) -> None:
    """`release` gives all blocks back, written ones too; called again, or after `generate` took the reservation, it does nothing."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        prompt = subject.prompt(2 * target.block_size + 1)
        for num_written in range(3):
            await _release_twice(source, target, prompt, num_written)
        request = target.request(prompt, max_tokens=20)
        reservation = await target.hand_over(source, request)
        output = target.generate(request, reservation)
        await output.reach(1)
        for _ in range(2):
            reservation.release()
        demand(len(await output.end()) == 20, "a release after generate harms nobody")


async def written_blocks_outlive_their_reservation(subject: Subject) -> None:
    """What was written from the prompt's start on is there for the next prompt as a prefix, or all of it is gone; what follows a gap is
    gone."""
    async with subject.trial() as source, subject.trial() as target:
        target.demand_handoff()
        size = target.block_size
        prompt = subject.prompt(3 * size + 2)
        blocks = await source.prefill(prompt[:-1]).end()
        for written, num_kept in (((0,), 1), ((2,), 1), ((1,), 2)):
            request = target.request(prompt)
            reservation = target.engine.reserve(request)
            for index in {*written} & {*reservation.missing()}:
                await target.write(reservation, index, blocks[index][1])
            reservation.release()
            num_cached = target.engine.num_cached_tokens(request)
            demand(num_cached in (0, num_kept * size), f"{num_cached} tokens are cached, and {num_kept} blocks of {size} were written")
        tokens = await target.output(prompt)
        demand(subject.promise < Promise.PATHS or tokens == await source.output(prompt), "blocks that were kept are right")


async def _release_twice(source: Trial, target: Trial, prompt: "array[int]", num_written: int) -> None:
    reservation = target.engine.reserve(target.request(prompt))
    demand(target.engine.load().used_blocks > 0, "a reservation holds blocks")
    blocks = await source.prefill(prompt[:-1]).end()
    for index in list(reservation.missing())[:num_written]:
        reservation.write([(index, blocks[index][1])], _nobody)  # it may be released before the block is in
    for _ in range(2):
        reservation.release()
        demand(target.engine.load().used_blocks == 0, "a released reservation holds nothing")


async def nobody_is_reserved_room_that_others_wait_for(subject: Subject) -> None:
    """A reservation that finds no room raises PoolFull and holds nothing; while a request waits for room, so does every other one."""
    async with subject.trial() as trial:
        trial.demand_handoff()
        size = trial.block_size
        held, number = [], 0
        while trial.num_blocks - trial.engine.load().used_blocks > 3:
            number += 1
            length = min(trial.engine.card.context_length - 12, (trial.num_blocks - trial.engine.load().used_blocks - 2) * size)
            held.append(trial.engine.reserve(trial.request(subject.prompt(length, number))))
        used = trial.engine.load().used_blocks
        error = refusal_of(lambda: trial.engine.reserve(trial.request(subject.prompt(4 * size, 99))))
        demand(
            isinstance(error, PoolFull) and trial.engine.load().used_blocks == used, f"no room is a PoolFull that holds nothing: {error!r}"
        )
        waiting = trial.generate(trial.request(subject.prompt(4 * size - 1, 98), max_tokens=2))
        await trial.until(lambda: _is_refused(trial, subject.prompt(size // 2 + 1, 97)), "nobody is reserved what others wait for")
        for reservation in held:
            reservation.release()
        demand(len(await waiting.end()) == 2, "room that is given back goes to whoever waits")
        trial.engine.reserve(trial.request(subject.prompt(size, 96))).release()


def _is_refused(trial: Trial, prompt: "array[int]") -> bool:
    try:
        trial.engine.reserve(trial.request(prompt)).release()
    except PoolFull:
        return True
    return False


HANDOFF_CHECKS = (
    an_engine_without_handoff_says_so,
    a_prefill_gives_out_each_block_once,
    handed_over_kv_gives_the_tokens_of_local_kv,
    blocks_of_a_cached_prefix_are_not_asked_for,
    unfit_payloads_are_refused,
    a_block_of_another_place_hurts_nobody,
    a_block_is_taken_once,
    blocks_of_one_write_are_taken_together,
    a_generation_needs_all_blocks,
    a_release_gives_back_once,
    written_blocks_outlive_their_reservation,
    nobody_is_reserved_room_that_others_wait_for,
)

"""An engine whose model raises, hangs or ends: its requests end in one clear error, its owner is told once, and it can start again."""

import asyncio
import contextlib
import resource
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.core.request import EngineRequest
from meshserve.engines.core.reservation import BlockReservation, WriteDone
from meshserve.engines.core.runner import StepResult
from meshserve.engines.core.scheduler import Step
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.dummy.options import parse_options
from meshserve.engines.dummy.runner import DummyRunner
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.thread import EngineThread
from meshserve.errors import EngineFailed, MeshserveError, StartupFailed, UsageError
from tests.engines.dummy_harness import DEADLINE_S, GenerationRecord, PrefillRecord, a_request, generated, tokens_of
from tests.harness import until

if TYPE_CHECKING:
    from meshserve.engines.llama import LlamaEngine

OPTIONS = {"kv_bytes_per_token": "24", "block_size": "4", "num_blocks": "64", "max_batch_tokens": "16"}


class FaultyRunner(DummyRunner):
    """A dummy whose fault comes with its fifth step."""

    def __init__(self, fault: str) -> None:
        super().__init__(parse_options(EngineOptions(options=OPTIONS)), "dummy", time.monotonic)
        self.fault, self.num_steps, self.hangs_since = fault, 0, 0.0
        self.on_failure: Callable[[MeshserveError], None] = lambda error: None

    async def start(self, on_result: Callable[[StepResult], None], on_failure: Callable[[MeshserveError], None]) -> None:
        await super().start(on_result, on_failure)
        self.on_failure, self.hangs_since = on_failure, 0.0

    def submit(self, step: Step[EngineRequest]) -> None:
        self.num_steps += 1
        if self.num_steps != 5 or not self.fault:
            super().submit(step)
        elif self.fault == "raises":
            raise OSError("the device is gone")
        elif self.fault == "brings nonsense":
            self._on_result(StepResult([1, 2, 3], blocks=[(None, 0, 0, b"")]))  # type: ignore[list-item, misc]
        elif self.fault == "hangs":
            self.hangs_since = time.monotonic()
        else:
            self.on_failure(EngineFailed("its thread ended"))
            self.on_failure(EngineFailed("its thread ended"))

    def overdue_s(self) -> float:
        return time.monotonic() - self.hangs_since if self.hangs_since else super().overdue_s()

    def write_blocks(self, reservation: BlockReservation, blocks: list[tuple[int, bytes]], on_done: WriteDone) -> None:
        """Never done: the fault comes first."""


async def ended(*records: GenerationRecord | PrefillRecord) -> list[MeshserveError | None]:
    for record in records:
        await record.end()
    return [record.error for record in records]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raises", "device is gone"), ("brings nonsense", "the engine failed"), ("hangs", "hangs"), ("ends", "its thread ended")],
)
def test_all_requests_of_an_engine_that_fails_end_and_it_starts_again(fault: str, words: str) -> None:
    async def run() -> None:
        runner, told, written = FaultyRunner(fault), list[MeshserveError](), list[MeshserveError | None]()
        engine = CoreEngine(runner)
        engine.on_failure = told.append
        await engine.start()
        known = set(engine.watch_blocks(lambda stored, evicted: known.update(stored) or known.difference_update(evicted)))  # type: ignore[func-returns-value]
        reservation = engine.reserve(a_request(tokens_of(9, seed=2), "late"))
        reservation.write([(0, bytes(96))], written.append)
        one, two, three = GenerationRecord(), GenerationRecord(), PrefillRecord()
        engine.generate(a_request(tokens_of(9), "one"), one)
        engine.generate(a_request(tokens_of(200, seed=1), "two"), two)
        engine.prefill("three", tokens_of(20, seed=3), 0, three)
        errors = await ended(one, two, three)
        assert all(isinstance(error, EngineFailed) and words in error.message for error in errors)
        assert told == [errors[0]] == written
        load = engine.load()
        assert (load.num_running, load.num_waiting, load.used_blocks, load.cached_blocks, known) == (0, 0, 0, 0, set())
        with pytest.raises(EngineFailed, match="down"):
            engine.generate(a_request(tokens_of(9), "one"), GenerationRecord())
        reservation.release()
        await engine.start()
        assert len(await generated(engine, a_request(tokens_of(9), "one"))) == 20  # type: ignore[arg-type]
        assert len(told) == 1 and engine.load().used_blocks == 0
        await engine.close()

    asyncio.run(run())


class FailsAtItsEnd(PrefillRecord):
    """Takes all blocks, and raises when it is told that there are no more."""

    def on_prefilled(self, num_cached_tokens: int) -> None:
        super().on_prefilled(num_cached_tokens)
        raise RuntimeError("the receiver is broken")


def test_a_prefill_whose_receiver_fails_at_its_end_fails_alone() -> None:
    async def run() -> None:
        engine, told = DummyEngine(EngineOptions()), list[MeshserveError]()
        engine.on_failure = told.append
        await engine.start()
        broken, other = FailsAtItsEnd(), GenerationRecord()
        engine.prefill("broken", tokens_of(20), 0, broken)
        engine.generate(a_request(tokens_of(9), "other"), other)
        assert await ended(broken, other) == [None, None] and not told  # its end was told once, and is not told again
        assert engine.load().used_blocks == 0
        await engine.close()

    asyncio.run(run())


def test_a_sink_that_cancels_at_the_prompt_s_log_probabilities_gets_no_token() -> None:
    class Canceller(GenerationRecord):
        def on_prompt_logprobs(self, logprobs: object) -> None:
            engine.cancel("r")

    engine = CoreEngine(FaultyRunner(""))

    async def run() -> None:
        await engine.start()
        record = Canceller()
        engine.generate(a_request(tokens_of(5), prompt_logprobs=0), record)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not record.tokens and engine.load().used_blocks == 0
        await engine.close()

    asyncio.run(run())


def test_an_engine_that_gets_no_thread_does_not_start_and_says_so() -> None:
    async def run() -> None:
        thread = EngineThread(lambda: contextlib.nullcontext(Idle()), lambda error: None)
        usual_bytes = threading.stack_size(1 << 47)  # more than there are addresses
        try:
            with pytest.raises(StartupFailed, match="no thread"):
                await thread.start()
        finally:
            threading.stack_size(usual_bytes)
        await thread.close(1.0)

    asyncio.run(run())


class Idle:
    """A model that does nothing."""

    def abort(self) -> None:
        """Nothing runs."""


class Restarted(DummyEngine):
    """Starts, then fails to with an error that nobody foresaw, then starts."""

    num_starts = 0

    async def start(self) -> None:
        self.num_starts += 1
        if self.num_starts == 2:
            raise OSError("the device is busy")
        await super().start()


def test_an_engine_that_fails_is_started_until_it_runs_whatever_its_start_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        mesh = MeshConfig(roles=("decode",), interface="127.0.0.1", use_mdns=False)
        peer = Peer(mesh, ServeConfig(engine=f"{__name__}:{Restarted.__name__}"))
        await peer.start()
        engine = peer._engine
        assert isinstance(engine, Restarted)
        engine.on_failure(EngineFailed("the device is gone"))
        assert peer.mesh.own.withdrawn == ("decode",)
        await until(lambda: engine.num_starts == 3 and not peer.mesh.own.withdrawn, DEADLINE_S, "the engine runs again")
        await peer.stop()

    asyncio.run(run())
    assert any("did not start: OSError: the device is busy" in line for line in caplog.messages)


# --- llama.cpp


@asynccontextmanager
async def faulty_llama(path: Path, fault: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> "AsyncIterator[LlamaEngine]":
    """An engine whose first context does something else after 20 steps."""
    from meshserve.engines.llama import LlamaEngine, runner
    from meshserve.engines.llama.context import LlamaContext

    class FaultyContext(LlamaContext):
        num_steps = 0

        def decode(self, *rows: Sequence[Any]) -> bool:
            FaultyContext.num_steps += 1
            if FaultyContext.num_steps == 20:
                fault()
            return super().decode(*rows)

    monkeypatch.setattr(runner, "LlamaContext", FaultyContext)
    engine = LlamaEngine(EngineOptions(model=str(path), kv_cache_tokens=512, options={"threads": "1", "slots": "6", "max_running": "3"}))
    await engine.start()
    yield engine
    await engine.close()


def _raise() -> None:
    raise OSError("access violation")


@pytest.mark.parametrize(("fault", "words"), [(_raise, "access violation"), (sys.exit, "ended"), (threading.Event().wait, "hangs")])
def test_a_library_that_raises_or_hangs_fails_its_engine_which_starts_again(
    fault: Callable[[], object], words: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words == "hangs":
        hung = threading.Event()
        fault = lambda: hung.wait(DEADLINE_S)  # noqa: E731

    async def run() -> None:
        told: list[MeshserveError] = []
        async with faulty_llama(tiny_files["dense"], fault, monkeypatch) as engine:
            engine.on_failure = told.append
            records = [GenerationRecord(), GenerationRecord()]
            for number, record in enumerate(records):
                engine.generate(a_request(tokens_of(70, number), f"r{number}", max_tokens=60), record)
            errors = await ended(*records)
            assert told == [errors[0]] and errors[0] is errors[1]
            assert isinstance(errors[0], EngineFailed) and words in errors[0].message
            if words == "hangs":
                hung.set()
            await engine.start()
            assert len(await generated(engine, a_request(tokens_of(70)))) == 20  # type: ignore[arg-type]
            assert len(told) == 1 and engine.load().used_blocks == 0

    asyncio.run(run())


def test_an_engine_that_is_down_checks_no_request_with_what_it_has_freed(tiny_files: dict[str, Path]) -> None:
    from meshserve.engines.llama import LlamaEngine

    async def run() -> None:
        engine = LlamaEngine(EngineOptions(str(tiny_files["dense"]), {"threads": "1"}, 1024))
        for choices in (("one", "two"), ("three",)):  # the second one is new to the compiler
            with pytest.raises(EngineFailed):
                engine.check(a_request(tokens_of(8), choices=choices))
            await engine.start()
            engine.check(a_request(tokens_of(8), choices=choices))
            await engine.close()
        with pytest.raises(EngineFailed):
            engine.check(a_request(tokens_of(8), choices=("four",)))

    asyncio.run(run())


_LEAVES_EARLY = """
import asyncio, sys
from meshserve.engines.llama import LlamaEngine
from meshserve.engines.protocol import EngineOptions
from tests.engines.dummy_harness import GenerationRecord, a_request, tokens_of

async def main():
    engine = LlamaEngine(EngineOptions(model=sys.argv[1], kv_cache_tokens=4096, options={"threads": "1"}))
    await engine.start()
    record = GenerationRecord()
    engine.generate(a_request(tokens_of(2000), max_tokens=2000), record)
    while engine.load().num_running == 0:
        await asyncio.sleep(0)

asyncio.run(main())
print("left")
"""


def test_an_interpreter_that_ends_while_a_step_runs_ends_well(tiny_files: dict[str, Path]) -> None:
    done = subprocess.run([sys.executable, "-c", _LEAVES_EARLY, tiny_files["sliding-window"]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@pytest.mark.parametrize(
    ("num_tokens", "error", "words"),
    [
        (100_000_000_000, UsageError, "--kv-cache-tokens is at most 134217728"),
        (134_217_728, StartupFailed, "takes 36.5 GB, and .* GB of memory are available: lower --kv-cache-tokens"),
        (100, UsageError, "at least 128"),
    ],
)
def test_a_kv_cache_that_cannot_be_is_refused_before_anything_is_loaded(
    num_tokens: int, error: type[MeshserveError], words: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from meshserve.engines import budget
    from meshserve.engines.llama import LlamaEngine

    monkeypatch.setattr(budget, "available_bytes", lambda: 8_000_000_000)
    with pytest.raises(error, match=words):
        LlamaEngine(EngineOptions(model=str(tiny_files["dense"]), kv_cache_tokens=num_tokens))


_LACKS_MEMORY = """
import asyncio, resource, sys
from meshserve.engines.llama import LlamaEngine
from meshserve.engines.llama.library import load_library
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import StartupFailed

async def main():
    engine = LlamaEngine(EngineOptions(model=sys.argv[1], kv_cache_tokens=1 << 20, options={"threads": "1"}))
    load_library()
    taken = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (taken + (100 << 20), resource.RLIM_INFINITY))
    try:
        await engine.start()
    except StartupFailed as error:
        print(error.message)
    await engine.close()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await engine.start()
    await engine.close()

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by RLIMIT_AS, and measured in /proc")
def test_memory_that_runs_out_while_a_model_loads_is_one_line(tiny_files: dict[str, Path]) -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", _LACKS_MEMORY, tiny_files["dense"]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.count("\n") == 1
        and "no memory for 1,051,728 cells of KV cache" in done.stdout
        and "lower --kv-cache-tokens" in done.stdout
    )

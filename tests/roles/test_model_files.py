"""Files of models: from a worker over real sockets, checked, shared, kept on disk; and the tokens that a processor makes with them."""

import asyncio
import hashlib
import logging
import os
import resource
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshserve.cli import observing
from meshserve.config import MeshConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers.huggingface import HuggingFaceTokenizer
from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError, TokenizerFailed
from meshserve.mesh import files as mesh_files
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.files import fetch_file, offer_files
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor import model_files
from meshserve.roles.processor.model_files import FileCache, ModelFiles, cache_directory
from meshserve.roles.processor.models import Models
from meshserve.wire.card import MAX_FILE_BYTES, KVLayout, ModelCard, ModelFile
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.messages import FILE_PART
from meshserve.wire.structs import replace
from tests.engines.trained import files_of, write_directory
from tests.harness import run_async, until

MEET_S = 5.0
DATA = bytes(range(256)) * 1500
FILE = ModelFile("tokenizer.json", len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "meshserve" / "files"


def joined(role: str, card: ModelCard | None = None, seeds: tuple[Mesh, ...] = ()) -> AbstractAsyncContextManager[Mesh]:
    addresses = tuple(f"127.0.0.1:{seed.own.port}" for seed in seeds)
    config = MeshConfig(mesh="files", roles=(role,), interface="127.0.0.1", use_mdns=False, seeds=addresses)
    return observing.joined(Mesh(config, card, KVLayout("files", 16, 64)) if card is not None else Mesh(config))


def plain_card(*files: ModelFile) -> ModelCard:
    return replace(DummyEngine(EngineOptions()).card, tokenizer="huggingface", files=files)


Answer = Callable[[Mesh], None]


@asynccontextmanager
async def processor_and(*workers: Answer) -> AsyncIterator[tuple[Mesh, list[Mesh]]]:
    """A processor's mesh, and workers whose cards name FILE; what each serves is its own affair."""
    async with AsyncExitStack() as stack:
        processor = await stack.enter_async_context(joined("processor"))
        meshes = []
        for serve in workers:
            mesh = await stack.enter_async_context(joined("decode", plain_card(FILE), (processor,)))
            serve(mesh)
            meshes.append(mesh)
            await until(lambda: len(processor.peers_with("decode")) == len(meshes), MEET_S, "they meet")
        yield processor, meshes


def honest(mesh: Mesh) -> None:
    offer_files(mesh, {FILE.sha256: DATA})


def answering(answer: Callable[[str, int], Any]) -> Answer:
    """A worker that says what it likes."""

    def handle(call: IncomingCall) -> None:
        call.end(answer(*call.body))

    return lambda mesh: mesh.serve(FILE_PART, handle)


def failing_after(num_parts: int) -> Answer:
    """Honest for so many parts."""

    def answer(sha256: str, offset: int) -> bytes:
        if offset >= num_parts * mesh_files.PART_BYTES:
            raise MeshserveError("the disk is on fire")
        return DATA[offset : offset + mesh_files.PART_BYTES]

    return answering(answer)


def fetched(processor: Mesh) -> Coroutine[Any, Any, bytes]:
    return fetch_file(processor, FILE.sha256, FILE.size_bytes, lambda: [info.incarnation for info in processor.peers_with("decode")])


def count(mesh: Mesh, name: str) -> int:
    return mesh.counters.snapshot().get(name, 0)


# --- over the mesh


def test_a_file_goes_on_at_another_worker_where_the_first_one_failed() -> None:
    async def run() -> None:
        async with processor_and(failing_after(2), honest) as (processor, _):
            assert await fetched(processor) == DATA
            assert count(processor, "model_file_bytes_fetched") == len(DATA), "no part came twice"

    run_async(run())


@pytest.mark.parametrize(
    "lie",
    [
        lambda sha256, offset: bytes(min(mesh_files.PART_BYTES, len(DATA) - offset)),
        lambda sha256, offset: b"",
        lambda sha256, offset: DATA,
        lambda sha256, offset: {"a": 1},
        lambda sha256, offset: None,
    ],
    ids=["other bytes", "nothing", "too much", "a map", "none"],
)
def test_a_worker_that_gives_out_something_else_is_passed_over(lie: Callable[[str, int], Any]) -> None:
    async def run() -> None:
        async with processor_and(answering(lie), honest) as (processor, _):
            assert await fetched(processor) == DATA
        async with processor_and(answering(lie)) as (processor, _):
            with pytest.raises(TokenizerFailed, match="could not be fetched"):
                await fetched(processor)

    run_async(run())


def test_a_worker_that_dies_in_the_middle_is_replaced() -> None:
    async def run() -> None:
        async with processor_and(lambda mesh: None, honest) as (processor, workers):
            stuck: list[IncomingCall] = []
            workers[0].serve(FILE_PART, stuck.append)
            fetching = asyncio.create_task(fetched(processor))
            await until(lambda: stuck, MEET_S, "the first one was asked")
            await workers[0].close()
            assert await fetching == DATA

    run_async(run())


def test_nobody_who_offers_it_is_an_error_at_once() -> None:
    async def run() -> None:
        async with processor_and() as (processor, _):
            with pytest.raises(TokenizerFailed, match="no live worker offers it"):
                await fetched(processor)

    run_async(run())


@pytest.mark.parametrize("body", [None, [], ["x"], ["x", 0], [FILE.sha256, "0"], [FILE.sha256, -1], [FILE.sha256, len(DATA) + 1], [1, 2]])
def test_questions_for_what_is_not_there_are_refused(body: Any) -> None:
    async def run() -> None:
        async with processor_and(honest) as (processor, workers):
            with pytest.raises((InvalidRequest, ProtocolError)):
                await processor.call(workers[0].incarnation, FILE_PART, body, MEET_S)

    run_async(run())


@pytest.mark.parametrize(
    "files",
    [
        7,
        [7],
        [{"name": "tokenizer.json", "size_bytes": 1}],
        [{"name": "tokenizer.json", "size_bytes": True, "sha256": "a" * 64}],
        [{"name": "tokenizer.json", "size_bytes": MAX_FILE_BYTES + 1, "sha256": "a" * 64}],
        [{"name": "tokenizer.json", "size_bytes": 1, "sha256": "../../../../etc/passwd"}],
        [{"name": "tokenizer.json", "size_bytes": 1, "sha256": "a" * 64}] * 2,
        [{"name": "tokenizer.json", "size_bytes": 1, "sha256": "a" * 64}] * 17,
    ],
)
def test_a_card_that_names_what_is_no_file_is_refused(files: Any) -> None:
    with pytest.raises(ProtocolError):
        ModelCard.from_wire({**plain_card().to_wire(), "files": files})


def test_a_card_keeps_its_files_and_those_of_unknown_names_are_left_out() -> None:
    card = plain_card(FILE, ModelFile("generation_config.json", 0, "0" * 64))
    assert ModelCard.from_wire(card.to_wire()) == card
    newer = {**card.to_wire(), "files": [{"name": "../evil", "size_bytes": 1, "sha256": "a" * 64}]}
    assert ModelCard.from_wire(newer).files == ()


# --- on disk


def test_concurrent_requests_share_one_fetch_and_the_next_start_needs_none(cache: Path) -> None:
    async def run() -> None:
        async with processor_and(honest) as (processor, workers):
            model_files = ModelFiles(processor, FileCache(cache_directory()))
            impatient = asyncio.create_task(model_files.get([FILE]))
            await asyncio.sleep(0)
            impatient.cancel()
            found = await asyncio.gather(*(model_files.get([FILE]) for _ in range(20)))
            assert found == [{"tokenizer.json": DATA}] * 20 and impatient.cancelled()
            assert count(processor, "model_file_bytes_fetched") == len(DATA)
            await workers[0].close()
            assert await ModelFiles(processor, FileCache(cache_directory())).get([FILE]) == {"tokenizer.json": DATA}
            assert count(processor, "model_files_fetched") == 1 and count(processor, "model_files_from_cache") == 1

    run_async(run())
    assert [path.name for path in cache.iterdir()] == [FILE.sha256]


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA + b"x", b"x" + DATA[1:]])
def test_a_damaged_file_is_fetched_again(cache: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with processor_and(honest) as (processor, _):
            assert await ModelFiles(processor, FileCache(cache)).get([FILE]) == {"tokenizer.json": DATA}

    cache.mkdir(parents=True)
    (cache / FILE.sha256).write_bytes(damage)
    run_async(run())
    assert (cache / FILE.sha256).read_bytes() == DATA and "was damaged" in caplog.text


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KB: the write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_a_place_on_disk_files_are_used_all_the_same_and_it_is_said_once(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in the way").write_bytes(b"")
    for directory in (None, tmp_path / "in the way" / "files", cache):
        caplog.clear()
        kept = FileCache(directory)
        with full_disk(), caplog.at_level(logging.WARNING):
            for _ in range(3):
                kept.store(FILE, DATA)
        assert kept.load(FILE) is None
        assert len(caplog.records) == 1 and "cannot be kept" in caplog.text and "None" not in caplog.text
    assert list(cache.iterdir()) == [], "nothing half written is left"


def test_peers_of_one_host_share_a_cache_and_never_trip_over_each_other(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = [bytes([number]) * 1000 for number in range(40)]

    def keep_all() -> None:
        kept = FileCache(cache)
        for data in contents:
            kept.store(ModelFile("tokenizer.json", len(data), hashlib.sha256(data).hexdigest()), data)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(keep_all) for _ in range(4)]:
            done.result()
    assert not caplog.records and len(list(cache.iterdir())) == len(contents)


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/to/be/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "meshserve" / "files"

    def no_home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(no_home))
    assert cache_directory() is None


def test_the_cache_keeps_to_its_size_and_what_was_used_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_CACHE_BYTES", 3000)
    kept = FileCache(cache)
    contents = [bytes([number]) * 1000 for number in range(4)]
    described = [ModelFile("tokenizer.json", 1000, hashlib.sha256(data).hexdigest()) for data in contents]
    for number in range(3):
        kept.store(described[number], contents[number])
        os.utime(cache / described[number].sha256, (number, number))
    assert kept.load(described[0]) == contents[0]
    kept.store(described[3], contents[3])
    assert [kept.load(file) for file in described] == [contents[0], None, contents[2], contents[3]]


# --- tokens of several models


def requested(model: str, **fields: Any) -> CompletionRequest:
    return CompletionRequest(request_id="r", kind="chat" if "messages" in fields else "completion", model=model, **fields)


@asynccontextmanager
async def models_of(directories: Mapping[str, Path]) -> AsyncIterator[Models]:
    """A processor that has nothing, and a worker for each model, which has its tokenizer."""
    async with AsyncExitStack() as stack:
        processor = await stack.enter_async_context(joined("processor"))
        models = Models(processor)
        for name, directory in directories.items():
            engine = DummyEngine(EngineOptions(name, {"tokenizer": str(directory)}))
            offer_files(await stack.enter_async_context(joined("decode", engine.card, (processor,))), engine.files)
        await until(lambda: len(processor.peers_with("decode")) == len(directories), MEET_S, "they meet")
        yield models
        await models.close()


def test_each_model_keeps_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    async def run() -> None:
        directories = {kind: write_directory(tmp_path / kind, files_of(kind)) for kind in ("byte-level", "byte-fallback")}
        async with models_of({**directories, "own": Path("bytes")}) as models:
            for kind in directories:
                card, tokenizer = models.card(kind), HuggingFaceTokenizer(files_of(kind))
                assert models.encode_nowait(requested(kind, prompt="x"), card) is None
                (tokens,), vocabulary = await models.encode(requested(kind, prompt="a prompt"), card)
                assert tokens == tokenizer.encode("a prompt") and vocabulary.vocab_size == tokenizer.vocab_size
                (tokens,), _ = await models.encode(requested(kind, messages=[{"role": "user", "content": "hi"}]), card)
                assert tokens == tokenizer.encode("<s><|user|>hi</s><|assistant|>", add_special_tokens=False)
                assert await models.text(card).decode(tokenizer.encode("and back", False)) == "and back"
                (tokens,), _ = await models.encode(requested(kind, prompt=array("I", [5, 6])), card)
                assert list(tokens) == [5, 6]
            prompt = models.encode_nowait(requested("own", prompt="x"), models.card("own"))
            assert prompt is not None and list(prompt[0][0]) == [120]

    run_async(run())


def test_of_two_models_under_one_name_the_one_of_most_workers_is_served(tmp_path: Path) -> None:
    async def run() -> None:
        tokenizers = ("bytes", str(write_directory(tmp_path / "other", files_of("byte-level"))), "bytes")
        async with AsyncExitStack() as stack:
            processor = await stack.enter_async_context(joined("processor"))
            cards = [DummyEngine(EngineOptions("m", {"tokenizer": tokenizer})).card for tokenizer in tokenizers]
            workers = [await stack.enter_async_context(joined("decode", card, (processor,))) for card in cards]
            await until(lambda: len(processor.peers_with("decode")) == len(workers), MEET_S, "they meet")
            serving = {info.incarnation for info in processor.peers_serving("decode", "m")}
            assert serving == {workers[0].incarnation, workers[2].incarnation}

    run_async(run())


def test_requests_are_refused_for_what_they_say_and_wait_no_longer_than_they_may(tmp_path: Path) -> None:
    async def run() -> None:
        directory = write_directory(tmp_path / "m", files_of("byte-level"))
        async with models_of({"m": directory}) as models:
            card = models.card("m")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.0001):
                    await models.encode(requested("m", prompt="x"), card)
            for bad in (requested("m", prompt=""), requested("m", prompt=array("I"))):
                with pytest.raises(InvalidRequest):
                    await models.encode(bad, card)
            spoilt = replace(card, chat_template="", files=card.files[:1])
            with pytest.raises(InvalidRequest, match="no chat template"):
                await models.encode(requested("m", messages=[{"role": "user", "content": "hi"}]), spoilt)
            missing = replace(card, files=(replace(card.files[0], sha256="0" * 64),))
            for _ in range(2):
                with pytest.raises(TokenizerFailed, match="no live worker offers it"):
                    await models.encode(requested("m", prompt="x"), missing)

    run_async(run())

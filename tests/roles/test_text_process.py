"""The process in which other peers' templates and tokenizers run: what it gives back, and what it is kept from."""

import asyncio
import os
import signal
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshserve.engines.tokenizers.huggingface import HuggingFaceTokenizer
from meshserve.engines.tokenizers.table import TokenTable
from meshserve.errors import InvalidRequest, MeshserveError, Overloaded, TokenizerFailed
from meshserve.mesh.tasks import TaskOwner
from meshserve.roles.processor.text_process import TextProcess, load_request
from tests.engines.trained import CHAT, files_of
from tests.harness import run_async
from tests.harness.pressure import allowance_s

HI = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def process_of(template: str = "", kind: str | None = None) -> AsyncIterator[TextProcess]:
    """The dummy's own tokenizer, or one of the trained."""
    tasks = TaskOwner()
    process = TextProcess(tasks, load_request("huggingface" if kind else "bytes", files_of(kind) if kind else {}, template))
    try:
        yield process
    finally:
        await process.close()
        await tasks.close()


def with_process(body: Callable[[TextProcess], Awaitable[None]], template: str = "", kind: str | None = None) -> None:
    async def run() -> None:
        async with process_of(template, kind) as process:
            await body(process)

    run_async(run())


async def rendered(process: TextProcess, content: str = "hi") -> str:
    """A chat's prompt, by way of the tokenizer whose tokens are bytes."""
    tokens = array("I", await process.ask("chat", [{"role": "user", "content": content}], None, {}))
    return bytes(list(tokens)).decode()


def pid_of(process: TextProcess) -> int:
    assert process._child is not None
    return process._child._process.pid


def test_texts_chats_and_tokens_are_answered_in_order() -> None:
    async def body(process: TextProcess) -> None:
        tokenizer = HuggingFaceTokenizer(files_of("byte-level"))
        texts = [f"text number {number} \U0001f642" for number in range(50)]
        answers = await asyncio.gather(*(process.ask("encode", text, True) for text in texts))
        assert [array("I", answer) for answer in answers] == [tokenizer.encode(text) for text in texts]
        chat = array("I", await process.ask("chat", HI, None, {}))
        assert chat == tokenizer.encode("<s><|user|>hi</s><|assistant|>", add_special_tokens=False)
        assert (await process.ask("decode", tokenizer.encode("so be it").tobytes())).decode() == "so be it"
        table = TokenTable.from_bytes(process.table)
        assert all(table.token_bytes(token) == tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size))

    with_process(body, CHAT, "byte-level")


HOSTILE = {
    "a loop within a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a string that doubles": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a list that doubles": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "one huge number": "{{ (messages | length + 8) ** (9 ** 9) }}",
    "one huge string": "{{ 'x' * 10 ** 11 }}",
    "padding": "{{ '%099999999999d' | format(1) }}",
    "an endless prompt": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_and_the_next_request_is_served(name: str) -> None:
    template = "{% if messages[0].content == 'attack' %}" + HOSTILE[name] + "{% endif %}fine"

    async def body(process: TextProcess) -> None:
        assert await rendered(process) == "fine"
        began = time.monotonic()
        attack, bystander = await asyncio.gather(rendered(process, "attack"), rendered(process), return_exceptions=True)
        assert isinstance(attack, InvalidRequest) and bystander == "fine"
        assert "too long" in attack.message or "too much memory" in attack.message or "does not take" in attack.message
        assert time.monotonic() - began < 40 + allowance_s(began), "a second of processor time"

    with_process(body, template)


def test_a_template_that_is_hostile_from_its_first_line_ends_in_an_error_each_time() -> None:
    async def body(process: TextProcess) -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="too long"):
                await rendered(process)

    with_process(body, "{{ 9 ** (9 ** 9) }}")  # Jinja computes it before anything is rendered


def test_a_template_that_is_not_jinja_or_missing_is_said() -> None:
    for template, words in (("{{ messages[0]", "cannot be read"), ("", "no chat template")):

        async def body(process: TextProcess, words: str = words) -> None:
            with pytest.raises(InvalidRequest, match=words) as caught:
                await rendered(process)
            assert caught.value.param == "messages"

        with_process(body, template)


def test_a_process_that_is_killed_is_replaced_and_nobody_notices() -> None:
    async def body(process: TextProcess) -> None:
        assert await rendered(process) == "hi"
        for _ in range(3):
            os.kill(pid_of(process), signal.SIGKILL)
            assert await asyncio.gather(*(rendered(process, str(number)) for number in range(20))) == [str(number) for number in range(20)]

    with_process(body, "{{ messages[0].content }}")


def test_what_kills_its_process_twice_is_given_up_and_what_waited_behind_it_is_not() -> None:
    async def body(process: TextProcess) -> None:
        assert await rendered(process) == "hi"
        first, second = asyncio.create_task(rendered(process, "1" * 2_000_000)), asyncio.create_task(rendered(process, "2"))
        killed: set[int] = set()
        while not first.done():
            if process._is_loaded and pid_of(process) not in killed and len(killed) < 2:
                killed.add(pid_of(process))
                os.kill(pid_of(process), signal.SIGKILL)
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="crashes"):
            await first
        assert await second == "2"

    with_process(body, "{{ messages[0].content }}")


def test_nothing_of_this_process_is_there_but_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHSERVE_API_KEY", "a secret")

    async def body(process: TextProcess) -> None:
        await rendered(process)
        pid = pid_of(process)
        assert b"secret" not in await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        await rendered(process)
        assert pid_of(process) == pid, "a parent that drains still needs it"

    with_process(body, "x")


@pytest.mark.parametrize("tokenizer", [b"{", b"", b'{"model": 1}'])
def test_files_that_will_not_do_fail_whoever_waits_and_no_process_is_left(tokenizer: bytes) -> None:
    async def run() -> None:
        tasks = TaskOwner()
        process = TextProcess(tasks, load_request("huggingface", {"tokenizer.json": tokenizer}, ""))
        failed = await asyncio.gather(*(process.ask("encode", "x", True) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, TokenizerFailed) and "tokenizer.json" in error.message for error in failed)
        await process.close()
        await tasks.close()

    run_async(run())


def test_the_loop_goes_on_while_a_long_text_is_encoded_and_who_gave_up_costs_nobody() -> None:
    async def body(process: TextProcess) -> None:
        await process.ask("encode", "x", True)
        impatient = asyncio.create_task(process.ask("encode", "many different words " * 50_000, True))
        patient = asyncio.create_task(process.ask("encode", "many different words " * 50_000, True))
        await asyncio.sleep(0)
        impatient.cancel()
        longest_s, before_s = 0.0, time.thread_time()
        while not patient.done():
            await asyncio.sleep(0)
            now_s = time.thread_time()
            longest_s, before_s = max(longest_s, now_s - before_s), now_s
        assert len(await patient) > 4 * 50_000
        assert impatient.cancelled()
        assert longest_s < 0.05, "processor time of one turn of the loop"

    with_process(body, "", "word-piece")


def test_too_many_or_too_long_questions_are_refused_and_closing_ends_those_that_wait() -> None:
    async def body(process: TextProcess) -> None:
        waiting = [asyncio.create_task(process.ask("encode", "x" * 10_000_000, True)) for _ in range(8)]
        await asyncio.sleep(0)
        overloaded = [task for task in waiting if task.done()]
        assert len(overloaded) == 2 and all(isinstance(task.exception(), Overloaded) for task in overloaded)
        await process.close()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, Overloaded) for error in ended)

    with_process(body)


def test_errors_of_a_request_are_its_own() -> None:
    async def body(process: TextProcess) -> None:
        refused, answered = await asyncio.gather(rendered(process, "bad"), rendered(process, "good"), return_exceptions=True)
        assert isinstance(refused, MeshserveError) and refused.message == "not this one" and answered == "good"

    with_process(body, "{% if messages[0].content == 'bad' %}{{ raise_exception('not this one') }}{% endif %}{{ messages[0].content }}")

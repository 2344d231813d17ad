"""The load generator's HTTP client against a scripted server: whatever a response looks like, and wherever it is cut."""

import json
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from meshserve.cli.bench.http_client import parse_url
from meshserve.cli.bench.http_target import HttpSettings, HttpTarget
from meshserve.cli.bench.requests import Request, RequestRecord
from meshserve.errors import StartupFailed, UsageError
from tests.cli.bench_server import FINISH, STREAM_END, STREAM_HEAD, Part, Script, chunked, event, serving, text, tokens, whole
from tests.harness import run_async, until

SETTINGS = HttpSettings(model="scripted")
JOB = Request((("user", "hello"),), 4)


async def ask(target: HttpTarget, job: Request = JOB, deadline_s: float = 5.0) -> RequestRecord:
    record = RequestRecord(job, 0.0, lambda _: None)
    target.start(target.encode(job, False), record)
    await until(lambda: record.ended_s is not None, deadline_s, "an answer")
    return record


def asked_once(script: Script, settings: HttpSettings = SETTINGS, times: int = 1) -> list[RequestRecord]:
    async def course() -> list[RequestRecord]:
        async with serving(script) as server:
            target = HttpTarget(server.url, settings)
            await target.open()
            try:
                return [await ask(target) for _ in range(times)]
            finally:
                await target.close()

    return run_async(course())


def answer_of(parts: Sequence[Part], settings: HttpSettings = SETTINGS) -> RequestRecord:
    return asked_once(lambda asked: parts, settings)[0]


STREAM = b"".join(data for _, data in tokens(5))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40, 100_000])
def test_a_stream_is_the_same_wherever_it_is_cut(size: int) -> None:
    pieces = [STREAM[begin : begin + size] for begin in range(0, len(STREAM), size)]
    found = answer_of([(0.0002 * number, piece) for number, piece in enumerate(pieces)])
    assert found.error is None and len(found.times_s) == 5
    assert (found.ending.num_prompt_tokens, found.ending.num_completion_tokens) == (7, 5)


def test_an_answer_in_one_piece_counts_what_its_usage_says() -> None:
    body = b'{"choices": [{"text": "ab"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    found = answer_of([(0, whole(200, body))], replace(SETTINGS, is_stream=False))
    assert found.error is None and found.num_tokens == 2 and len(found.times_s) == 1


def test_an_answer_that_only_calls_a_tool_is_an_answer() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    fields = {"choices": [{"message": {"content": None, "tool_calls": [call]}}], "usage": {"completion_tokens": 6}}
    found = answer_of([(0, whole(200, json.dumps(fields).encode()))], replace(SETTINGS, is_stream=False, endpoint="chat"))
    assert found.error is None and found.num_tokens == 6


def test_a_stream_of_a_tool_call_with_comments_between_has_the_tokens_that_its_usage_says() -> None:
    def delta(**fields: object) -> bytes:
        return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}])

    calls = [delta(tool_calls=[{"index": 0, "function": {"arguments": part}}]) for part in ('{"a', '": 1', "}")]
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 12})
    noise = b": keep-alive\n\n" + delta(content="") * 20
    end = event(choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]) + usage
    stream = delta(role="assistant", content=None) + noise.join([b"", *calls, end])
    found = answer_of([(0, STREAM_HEAD + chunked(stream) + STREAM_END)], replace(SETTINGS, endpoint="chat"))
    assert found.error is None and len(found.times_s) == 3 and found.num_tokens == 12


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    stream = text("a") + text("b") + FINISH + b"data: [DONE]\n\n"
    found = answer_of([(0, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + stream), (0.01, b"")])
    assert found.error is None and len(found.times_s) == 2


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([(0, whole(503, b'{"error": {"message": "full", "code": "overloaded"}}'))], "HTTP 503 overloaded"),
        ([(0, whole(500, b"<html>"))], "HTTP 500"),
        ([(0, STREAM_HEAD + chunked(text("a") + event(error={"message": "lost", "code": "peer_lost"})) + STREAM_END)], "stream peer_lost"),
        ([(0, STREAM_HEAD + chunked(text("a")) + b"0\r\n\r\n")], "stream cut short"),
        ([(0, STREAM_HEAD + chunked(text("a"))), (0.01, b"")], "connection closed"),
        ([(0, STREAM_HEAD + chunked(FINISH) + STREAM_END)], "empty answer"),
        ([(0, b"SMTP ready\r\n\r\n")], "malformed response"),
        ([(0, b"")], "connection closed"),
    ],
)
def test_an_error_is_told_by_its_kind(parts: list[Part], kind: str) -> None:
    assert answer_of(parts).error == kind


def test_one_connection_serves_one_request_after_the_other() -> None:
    async def course() -> None:
        async with serving(lambda asked: tokens(3)) as server:
            target = HttpTarget(server.url, SETTINGS)
            await target.open()
            for _ in range(5):
                assert (await ask(target)).error is None
            assert server.num_connections == 1
            await target.close()

    run_async(course())


def test_a_response_that_ends_its_connection_is_followed_by_a_new_one() -> None:
    found = asked_once(lambda asked: [(0, whole(200, b'{"choices": [{"text": "a"}]}', "connection: close")), (0, b"")], times=3)
    assert [one.error for one in found] == ["stream cut short"] * 3  # no stream, yet each was answered


def test_a_request_that_meets_a_connection_just_closed_is_sent_again_once() -> None:
    counts: dict[int, int] = {}

    def script(asked: object) -> Sequence[Part]:
        number = getattr(asked, "connection")  # noqa: B009
        counts[number] = counts.get(number, 0) + 1
        # the connection that told the models is closed without a word, as a server does that found it idle for too long
        return [(0, b"")] if number == 1 else tokens(2)

    async def course() -> None:
        async with serving(script) as server:
            target = HttpTarget(server.url, SETTINGS)
            await target.open()
            assert (await ask(target)).error is None
            await target.close()
            assert target.pool.num_repeated == 1 and "sent again" in target.notes[0] and counts == {1: 1, 2: 1}

    run_async(course())


def test_nobody_at_the_port_is_one_clear_error() -> None:
    async def course() -> None:
        async with serving(lambda asked: []) as server:
            url = server.url
        target = HttpTarget(url, SETTINGS)
        with pytest.raises(StartupFailed, match="connection refused; is it running"):
            await target.open()
        await target.close()

    run_async(course())


def test_a_list_of_models_that_is_none_is_one_clear_error() -> None:
    async def course() -> None:
        async with serving(lambda asked: [], models=b'{"data": 5}') as server:
            target = HttpTarget(server.url, HttpSettings())
            with pytest.raises(StartupFailed, match="names no model"):
                await target.open()
            await target.close()

    run_async(course())


def test_requests_say_what_was_asked_for() -> None:
    async def course() -> None:
        async with serving(lambda asked: tokens(2)) as server:
            settings = HttpSettings("chat", None, "secret", ignore_eos=True, extra={"temperature": 0, "meshserve": {"policy": "kv"}})
            target = HttpTarget(server.url + "/base/v1", settings)
            await target.open()
            record = RequestRecord(JOB, 0.0, lambda _: None)
            target.start(target.encode(JOB, True), record)
            await until(lambda: record.ended_s is not None, 5.0, "an answer")
            await target.close()
            asked = server.asked[0]
            assert (asked.method, asked.path, asked.body["model"]) == ("POST", "/base/v1/chat/completions", "scripted")
            assert asked.body["messages"] == [{"role": "user", "content": "hello"}] and asked.body["max_tokens"] == 4
            assert asked.body["ignore_eos"] and asked.body["temperature"] == 0 and asked.body["stream_options"] == {"include_usage": True}
            assert asked.body["meshserve"] == {"policy": "kv", "receipt": True}

    run_async(course())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:99999", "http://host:8000/?a=b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a server"):
        parse_url(url)


def test_a_url_with_a_password_is_refused_without_telling_it() -> None:
    with pytest.raises(UsageError) as caught:
        parse_url("http://me:secret@host:8000")
    assert "--api-key" in caught.value.message and "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, ""),
        ("http://[::1]:8000/v1", "::1", 8000, ""),
        ("http://host/openai/v1/chat/completions", "host", 80, "/openai"),
        ("https://host", "host", 443, ""),
    ],
)
def test_urls_are_taken_as_people_write_them(url: str, host: str, port: int, base: str) -> None:
    origin, _, found = parse_url(url)
    assert (origin.host, origin.port, found) == (host, port, base)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_is_spoken_and_a_certificate_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command = ["openssl", *words.split()]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60.0)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def course() -> None:
        async with serving(lambda asked: tokens(3), tls) as server:
            url = server.url.replace("http", "https")
            target = HttpTarget(url, replace(SETTINGS, is_checking_certificates=False))
            await target.open()
            assert len((await ask(target)).times_s) == 3
            await target.close()
            target = HttpTarget(url, SETTINGS)
            with pytest.raises(StartupFailed, match=r"TLS.*--insecure"):
                await target.open()
            await target.close()

    run_async(course())

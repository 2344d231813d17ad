"""The pure parts of the frontend: deadlines of connections, what JSON costs, keys, sessions, guesses, origins, names."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import FrontendConfig
from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.access import (
    Guesses,
    KeyRing,
    Origins,
    Sessions,
    is_cross_site,
    is_loopback,
    is_name_of_loopback,
    is_preflight,
    is_same_origin,
)
from meshserve.roles.frontend.http.deadlines import Progress, Stage, Verdict
from meshserve.roles.frontend.models.reading import MAX_DEPTH, SHORT_BODY_BYTES, check_json, cost_ns, outside_strings

LIMITS = FrontendConfig(header_timeout_s=5, body_timeout_s=5, min_body_bytes_per_s=1000, write_timeout_s=6, keep_alive_s=8, linger_s=2)


# --- connections


@pytest.mark.parametrize(
    ("stage", "waited_s", "fields", "verdict"),
    [
        (Stage.HEAD, 5.0, {"has_begun": True}, Verdict.WAIT),
        (Stage.HEAD, 5.1, {"has_begun": True}, Verdict.TIMED_OUT),
        (Stage.HEAD, 5.1, {"has_begun": False}, Verdict.CLOSE),
        (Stage.HEAD, 99.0, {"has_begun": True, "is_answering": True}, Verdict.WAIT),
        (Stage.BODY, 5.1, {}, Verdict.TIMED_OUT),
        (Stage.BODY, 9.0, {"num_body_bytes": 5000}, Verdict.WAIT),
        (Stage.BODY, 10.1, {"num_body_bytes": 5000}, Verdict.TIMED_OUT),
        (Stage.ANSWER, 9999.0, {}, Verdict.WAIT),
        (Stage.ANSWER, 6.1, {"stuck_since_s": 0.0}, Verdict.TOO_SLOW),
        (Stage.ANSWER, 6.1, {"stuck_since_s": 5.0}, Verdict.WAIT),
        (Stage.IDLE, 8.0, {}, Verdict.WAIT),
        (Stage.IDLE, 8.1, {}, Verdict.CLOSE),
        (Stage.LINGER, 2.1, {}, Verdict.CLOSE),
    ],
)
def test_each_stage_of_a_connection_has_its_deadline(stage: Stage, waited_s: float, fields: dict[str, Any], verdict: Verdict) -> None:
    progress = Progress(0.0)
    progress.enter(stage, 0.0)
    for name, value in fields.items():
        setattr(progress, name, value)
    assert progress.verdict(waited_s, LIMITS) is verdict


# --- bodies

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def structure(value: Any) -> int:
    """What the scanner charges for, straight from the value."""
    if isinstance(value, list):
        return 200 + 50 * max(0, len(value) - 1) + sum(map(structure, value))
    if isinstance(value, dict):
        return 200 + 50 * max(0, len(value) - 1) + 300 * len(value) + sum(map(structure, value.values()))
    return 0


@given(VALUES, st.booleans())
def test_a_json_text_costs_what_its_values_cost_and_its_strings_cost_nothing(value: Any, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    assert cost_ns(outside_strings(text)) == structure(value)


@given(st.binary(max_size=200))
def test_what_is_no_json_is_checked_without_a_fault(data: bytes) -> None:
    try:
        check_json(data + b" " * SHORT_BODY_BYTES)
    except InvalidRequest as error:
        assert "nested" in error.message


def test_depth_is_counted_outside_of_strings() -> None:
    check_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b'["' + b"[" * 500 + b'"]')
    check_json(b'["' + b'\\"[' * 500 + b'\\\\"]')
    check_json(b"[" + b"[]," * 300 + b"[]]")
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        check_json(b'{"a":' * (MAX_DEPTH + 1))
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        check_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("text", [b"[" + b"1," * 200_000, b"[" + b"[]," * 60_000, b"{" + b'"a":1,' * 30_000, b"[" + b'"",' * 200_000])
def test_many_values_are_too_many_and_as_much_text_is_not(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="too many values"):
        check_json(text)
    check_json(b'"' + text.replace(b'"', b"") + b'"')


# --- keys


def test_a_key_ring_tells_which_key_was_shown_and_takes_no_other() -> None:
    keys = KeyRing(["first", "second", "first", "schlüssel"])
    assert [keys.find(shown.encode()) for shown in ("first", "second", "schlüssel")] == [0, 1, 2]
    assert [keys.find(shown) for shown in (b"", b"firs", b"first ", b"FIRST", b"third" * 100)] == [None] * 5
    assert KeyRing([]).find(b"") is None


def test_a_session_is_good_until_it_is_over_or_ended_and_cannot_be_forged() -> None:
    sessions = Sessions(100.0)
    token = sessions.begin(3, now_s=1000.0)
    assert sessions.find(token, 1099.0) == 3 and sessions.find(token, 1100.0) is None
    claim, _, signature = token.rpartition(".")
    forged = ["", ".", "...", claim, f"{claim}.", f"4{claim[1:]}.{signature}", f"{claim}.{'0' * 64}", f"{claim}.é", token + "0", "é" * 40]
    assert [sessions.find(text, 1001.0) for text in forged] == [None] * len(forged)
    assert Sessions(100.0).find(token, 1001.0) is None, "another process"
    assert token not in sessions.begin(3, 1000.0), "no two are alike"
    sessions.end("nonsense", 1001.0)
    sessions.end(token, 1001.0)
    assert sessions.find(token, 1002.0) is None and len(sessions._ended) == 1
    late = sessions.begin(1, 2000.0)
    sessions.end(late, 2000.0)
    assert len(sessions._ended) == 1, "what is over is forgotten"


def test_five_guesses_are_free_and_then_one_in_ten_seconds() -> None:
    guesses = Guesses()
    for _ in range(5):
        assert guesses.wait_s("mallory", 0.0) == 0
        guesses.was_wrong("mallory", 0.0)
    assert guesses.wait_s("mallory", 0.0) == 10.0 and guesses.wait_s("alice", 0.0) == 0
    assert guesses.wait_s("mallory", 10.0) == 0
    guesses.was_wrong("mallory", 10.0)
    assert guesses.wait_s("mallory", 10.0) == 10.0
    guesses.was_right("mallory")
    assert guesses.wait_s("mallory", 10.0) == 0
    for number in range(10_000):
        guesses.was_wrong(str(number), 10.0)
    assert len(guesses._debts_s) <= 4096


# --- pages and names


def test_only_named_origins_are_allowed_and_every_answer_depends_on_the_origin() -> None:
    origins = Origins(["https://chat.example.org"])
    assert origins.headers(None) == origins.headers(b"https://evil.example") == [(b"vary", b"Origin")]
    allowed = dict(origins.headers(b"https://chat.example.org"))
    assert allowed[b"access-control-allow-origin"] == b"https://chat.example.org" and b"access-control-allow-credentials" not in allowed
    assert origins.preflight_headers({b"origin": b"https://evil.example"}) == []
    asked = {b"origin": b"https://chat.example.org", b"access-control-request-headers": b"x-stainless-os"}
    assert (b"access-control-allow-headers", b"x-stainless-os") in origins.preflight_headers(asked)
    assert Origins(["*"]).allows(b"null") and not Origins([]).allows(b"")


@pytest.mark.parametrize(
    ("headers", "is_same"),
    [
        ({b"sec-fetch-site": b"same-origin", b"origin": b"http://here:1", b"host": b"here:1"}, True),
        ({b"sec-fetch-site": b"same-origin"}, True),
        ({b"origin": b"http://here:1", b"host": b"here:1"}, True),
        ({b"origin": b"https://here:1", b"host": b"here:1"}, False),
        ({b"sec-fetch-site": b"same-origin", b"origin": b"http://there", b"host": b"here:1"}, False),
        ({b"sec-fetch-site": b"same-site", b"host": b"here:1"}, False),
        ({b"sec-fetch-site": b"none"}, False),
        ({b"origin": b"null", b"host": b"here:1"}, False),
        ({b"host": b"here:1"}, False),
    ],
)
def test_a_request_is_of_the_same_origin_if_the_browser_says_so_and_nothing_speaks_against_it(
    headers: dict[bytes, bytes], is_same: bool
) -> None:
    assert is_same_origin("http", headers) is is_same


def test_what_the_browser_sends_for_another_site_is_known() -> None:
    assert is_cross_site({b"sec-fetch-site": b"cross-site"}) and is_cross_site({b"sec-fetch-site": b"same-site"})
    assert not is_cross_site({}) and not is_cross_site({b"sec-fetch-site": b"none"})
    assert is_preflight("OPTIONS", {b"origin": b"x", b"access-control-request-method": b"POST"})
    assert not is_preflight("OPTIONS", {b"origin": b"x"}) and not is_preflight("POST", {b"origin": b"x"})


@pytest.mark.parametrize(
    ("host", "is_fine"),
    [
        (b"localhost:8000", True),
        (b"127.0.0.1:8000", True),
        (b"[::1]:8000", True),
        (b"10.1.2.3", True),
        (b"mybox", True),
        (b"chat.localhost", True),
        (b"host.docker.internal:8000", True),
        (b"llm.example.org", True),
        (b"", True),
        (b"evil.example", False),
        (b"evil.example.:8000", False),
        (b"127.0.0.1.evil.example", False),
        (b"localhost.evil.example:8000", False),
        (b"box.local", False),
    ],
)
def test_a_website_s_name_is_no_name_of_loopback(host: bytes, is_fine: bool) -> None:
    assert is_name_of_loopback(host, ("llm.example.org",)) is is_fine


def test_loopback_is_known_by_its_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "box.example")))

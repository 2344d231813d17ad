"""The dashboard in a real browser, on a mesh of real processes: what its viewers see, and what its keys do."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import meshserve.observe.dashboard
from bench.watching import Turns
from tests.harness import Process, meshserve_command, run_async, run_command
from tests.harness.browser import CHROMIUM, Page, open_browser

FILES = Path(meshserve.observe.dashboard.__file__).parent
LONG_PROMPT = "The prompt of a long document that is worth handing over. " * 20
FAST = "?pace=0.2"
STORY_S = 20.0
"""A request is shown in slow motion, on a machine that may be busy."""

OBSERVE = """
window.told = [];
new MutationObserver(() => {
  const { request, step } = narrator.dataset;
  const tones = [...document.querySelectorAll("#links [data-tone]")].map((link) => link.dataset.tone);
  told.push({ request, step, tones, words: caption.textContent, numBids: document.querySelectorAll(".bid").length });
}).observe(document.getElementById("mesh-title").closest("section"), { subtree: true, childList: true, attributes: true });
"""
"""Keeps in the page all that is told in words, so that no step is missed between two looks."""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: Debian's package of that name")


@dataclass
class Shown:
    """A mesh (frontend with processor and router, 2 decode, 1 prefill) and a page that shows it."""

    url: str
    page: Page
    join: tuple[str, ...]
    """Options of `run` that lead into this mesh."""

    def ask_when_quiet(self, prompt: str) -> str:
        """A prompt by some other client, when nothing else is told in words; returns the request's name."""
        self.page.wait_for("document.getElementById('narrator').dataset.request === undefined", STORY_S)
        answer = httpx.post(f"{self.url}/v1/completions", json={"model": "dummy", "prompt": prompt, "max_tokens": 12}, timeout=60.0)
        assert answer.status_code == 200, answer.text
        return str(answer.headers["x-request-id"])


def start(role: str, name: str, *options: str) -> Process:
    command = meshserve_command("run", "--role", role, "--name", name, "--interface", "127.0.0.1", "--no-mdns", "--mesh", "dashboard")
    return Process([*command, *options])


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    """Everything started once; the page is opened anew by each test that needs it fresh."""
    front = start("frontend,processor,router", "front", "--http", "127.0.0.1:0")
    workers: list[Process] = []
    try:
        ready = front.ready(20.0)
        join = ("--peer", ready["address"].removeprefix("tcp://"))
        workers += [start(role, name, *join) for role, name in (("decode", "decode-1"), ("decode", "decode-2"), ("prefill", "prefill-1"))]
        front.wait_for_line("^2 decode, 1 prefill ready", 20.0)
        with open_browser() as page:
            page.resize(1920, 1080)
            page.open(f"{ready['http']}/{FAST}")
            page.wait_for("document.querySelectorAll('#peers li').length === 4", 20.0)
            yield Shown(ready["http"], page, join)
    finally:
        for process in [*workers, front]:
            process.close()


@needs_chromium
def test_the_topology_is_complete_within_two_seconds_of_load(shown: Shown) -> None:
    shown.page.open("about:blank")
    shown.page.open(f"{shown.url}/{FAST}")
    shown.page.wait_for("location.search && document.readyState === 'complete'", 10.0)
    shown.page.wait_for("document.querySelectorAll('#peers li').length === 4", 2.0)
    names = shown.page.evaluate("[...document.querySelectorAll('#peers .peer-name')].map((name) => name.textContent)")
    assert names == ["front", "decode-1", "decode-2", "prefill-1"]
    # a client, two decode workers, and a prefill worker for each of them
    assert shown.page.evaluate("document.querySelectorAll('#links .link').length") == 5
    assert shown.page.evaluate("document.getElementById('num-decode').textContent") == "2"


@needs_chromium
def test_a_request_is_seen_passing_through_the_mesh(shown: Shown) -> None:
    shown.page.evaluate(OBSERVE)
    request_id = shown.ask_when_quiet(f"{LONG_PROMPT} for other eyes")
    shown.page.wait_for(f"told.some((word) => word.request === '{request_id}' && word.step === 'done')", STORY_S)
    told = [word for word in shown.page.evaluate("told") if word.get("request") == request_id]
    steps = list(dict.fromkeys(word["step"] for word in told))
    assert steps == ["prompt", "route", "ticket", "claim", "blocks", "tokens", "done"]
    words = {word["step"]: word["words"] for word in told}
    assert words["route"].startswith("The router picks decode-") and "KV blocks" in words["blocks"] and "12 tokens" in words["done"]
    assert max(word["numBids"] for word in told) == 2 and {"prompt", "ticket", "blocks", "tokens"} <= {
        tone for word in told for tone in word["tones"]
    }
    row = shown.page.evaluate(f"document.querySelector('#requests [data-request=\"{request_id}\"] button').textContent")
    assert re.search(r"decode-\d ← prefill-1", row)


@needs_chromium
def test_the_prompt_box_shows_text_then_the_waterfall_and_keys_do_all_of_it(shown: Shown) -> None:
    page = shown.page
    page.evaluate("document.querySelector('[data-example=long]').click()")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.press("Enter", modifiers=2)
    page.wait_for("document.querySelectorAll('#answer-receipt .waterfall li').length > 1", 20.0)
    assert page.evaluate("document.getElementById('answer').textContent.length") > 10
    page.wait_for("document.querySelector('#requests .mine') !== null", 5.0)

    page.evaluate("document.querySelector('#requests .mine button').focus()")
    page.press("Enter")
    page.wait_for("document.getElementById('detail').open", 5.0)
    phases = page.evaluate("[...document.querySelectorAll('#detail .phase')].map((phase) => phase.textContent)")
    assert {"route", "prefill", "KV transfer", "decode", "other"} <= set(phases)
    tables = page.evaluate("[...document.querySelectorAll('#detail table')].map((table) => table.querySelectorAll('tbody tr').length)")
    assert tables == [2, 1]  # of decode workers, and of prefill workers
    name = page.evaluate("document.querySelector('#requests .mine').dataset.request")
    assert page.evaluate("document.querySelector('#detail .name code').textContent") == name
    page.press("Escape")
    page.wait_for("!document.getElementById('detail').open", 5.0)
    assert page.evaluate("document.activeElement.closest('.mine') !== null")

    page.evaluate("document.querySelector('#peers button[tabindex=\"0\"]').focus()")
    page.press("ArrowDown")
    page.press("Enter")
    page.wait_for("document.getElementById('detail').open", 5.0)
    assert page.evaluate("document.getElementById('detail-title').textContent") == "decode-1"
    page.press("Escape")


@needs_chromium
def test_a_workers_details_say_how_long_its_clients_wait(shown: Shown) -> None:
    body = {"model": "dummy", "prompt": "A prompt", "max_tokens": 12, "meshserve": {"receipt": True}}
    worker = httpx.post(f"{shown.url}/v1/completions", json=body, timeout=60.0).json()["meshserve"]["peers"]["decode"]
    shown.page.evaluate(f"[...document.querySelectorAll('#peers button')].find((peer) => peer.textContent.includes('{worker}')).click()")
    facts = "[...document.querySelectorAll('#detail dt')].map((name) => [name.textContent, name.nextSibling.textContent])"
    shown.page.wait_for(f"{facts}.filter(([name, value]) => /token/.test(name) && value.startsWith('p50')).length === 2", 5.0)
    found = dict(shown.page.evaluate(facts))
    pattern = r"p50\s[\d.,]+\sm?s, p99\s[\d.,]+\sm?s"
    assert all(re.fullmatch(pattern, found[name]) for name in ("Time to first token", "Between tokens")), found
    shown.page.press("Escape")
    shown.page.wait_for("!document.getElementById('detail').open", 5.0)


@needs_chromium
def test_a_request_that_failed_says_why_when_it_is_opened(shown: Shown) -> None:
    body = {"model": "dummy", "prompt": "A prompt", "max_tokens": 60_000, "ignore_eos": True}
    late = {"x-request-timeout": "0.3"}
    answer = httpx.post(f"{shown.url}/v1/completions", json=body, headers=late, timeout=60.0)
    assert answer.status_code == 504, answer.text
    row = f"document.querySelector('#requests [data-request=\"{answer.headers['x-request-id']}\"][data-state=failed] button')"
    shown.page.wait_for(f"{row} !== null", 5.0)
    assert shown.page.evaluate(f"{row}.querySelector('.row-time').textContent") == "deadline_exceeded"
    shown.page.evaluate(f"{row}.click()")
    shown.page.wait_for("document.querySelector('#detail .failure') !== null", 5.0)
    told = shown.page.evaluate("document.querySelector('#detail .failure').textContent")
    # each hop has the deadline, and names whom it waited for
    assert re.fullmatch(r"deadline_exceeded: no answer from (front|decode-\d) within the deadline", told), told
    shown.page.press("Escape")
    shown.page.wait_for("!document.getElementById('detail').open", 5.0)


@needs_chromium
def test_prompts_that_were_refused_are_counted_with_the_reason(shown: Shown) -> None:
    shown.page.evaluate("document.getElementById('max-tokens').value = '100000000'; document.getElementById('burst').click()")
    shown.page.wait_for("document.getElementById('answer').dataset.state === 'failed'", 10.0)
    words = shown.page.evaluate("document.getElementById('answer').textContent")
    shown.page.evaluate("document.getElementById('max-tokens').value = '32'")
    assert words.startswith("20 of 20 prompts were not answered: ") and "max_tokens must be" in words
    shown.page.wait_for("!document.getElementById('burst').disabled", 5.0)
    shown.page.errors[:] = [error for error in shown.page.errors if " 400 " not in error]  # which Chromium notes of every such answer


@needs_chromium
def test_a_page_whose_frontend_was_started_again_with_keys_asks_for_one(shown: Shown) -> None:
    page, keyed = shown.page, ("--role", "all", "--interface", "127.0.0.1", "--no-mdns", "--mesh", "keyed", "--api-key", "sesame")
    errors, addresses = page.errors[:], page.addresses[:]
    with Process(meshserve_command("run", *keyed, "--http", "127.0.0.1:0")) as first:
        url = first.ready(20.0)["http"]
        page.open(f"{url}/")
        page.wait_for("document.getElementById('key') !== null", 10.0)
        page.evaluate("document.getElementById('key').value = 'sesame'; document.forms[0].submit()")
        page.wait_for("document.querySelectorAll('#peers li').length === 1", 10.0)
    with Process(meshserve_command("run", *keyed, "--http", url.removeprefix("http://"))) as again:
        again.ready(20.0)
        page.wait_for("document.getElementById('key') !== null", 15.0)
    page.open(f"{shown.url}/{FAST}")
    page.wait_for("document.querySelectorAll('#peers li').length === 4", 20.0)
    page.errors[:], page.addresses[:] = errors, addresses  # this test's own are of another mesh, with refusals that were meant


@needs_chromium
def test_a_peer_that_joins_appears_and_one_that_is_killed_is_shown_dead_within_three_seconds(shown: Shown) -> None:
    state = "document.querySelector('#peers li:has(button b)') && [...document.querySelectorAll('#peers li')]"
    state = f"({state}.find((item) => item.textContent.includes('decode-3'))?.dataset.state)"
    with start("decode", "decode-3", *shown.join) as worker:
        worker.ready(20.0)
        shown.page.wait_for(f"{state} === 'alive'", 3.0)
        worker.kill()
        shown.page.wait_for(f"{state} === 'dead'", 3.0)
    lines = shown.page.evaluate("document.getElementById('log').textContent")
    assert "decode-3 joined as decode" in lines and "decode-3 died" in lines


@needs_chromium
def test_a_phone_sees_it_all_without_scrolling_sideways(shown: Shown) -> None:
    try:
        shown.page.resize(390, 844, is_phone=True)
        shown.page.wait_for("document.getElementById('stage').clientWidth < 390", 5.0)
        assert shown.page.evaluate("document.documentElement.scrollWidth") == 390
        shown.page.evaluate(
            "for (const id of ['num-decode', 'requests-per-s', 'tokens-per-s']) document.getElementById(id).textContent = '1,250k'"
        )
        assert shown.page.evaluate("document.documentElement.scrollWidth") == 390, "whatever the load"
        outside = "[...document.querySelectorAll('#peers li')].filter((item) => item.getBoundingClientRect().right > 390).length"
        shown.page.wait_for(f"{outside} === 0", 5.0)
    finally:
        shown.page.resize(1920, 1080)


@needs_chromium
def test_who_wants_no_motion_gets_the_same_words(shown: Shown) -> None:
    try:
        shown.page.prefer(reduced_motion="reduce")
        shown.page.evaluate(OBSERVE)
        request_id = shown.ask_when_quiet("A short one")
        shown.page.wait_for(f"told.some((word) => word.request === '{request_id}' && word.step === 'done')", STORY_S)
        drawn = "new Uint32Array(moving.getContext('2d').getImageData(0, 0, moving.width, moving.height).data.buffer).some(Boolean)"
        assert shown.page.evaluate(f"const moving = document.getElementById('moving'); {drawn}") is False
    finally:
        shown.page.prefer()


@needs_chromium
def test_after_all_that_the_console_is_clean_and_no_other_origin_was_asked(shown: Shown) -> None:
    assert shown.page.errors == []
    assert {address for address in shown.page.addresses if not address.startswith((f"{shown.url}/", "about:"))} == set()
    policy = httpx.get(shown.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy


@pytest.mark.full
@needs_chromium
def test_no_task_of_the_page_takes_fifty_milliseconds_under_two_thousand_requests_a_second(shown: Shown) -> None:
    async def load() -> float:
        turns = Turns(shown.url, [], 8.0)
        turns.open(16, 4)
        _, per_s = await turns.take()
        await turns.close()
        return per_s

    shown.page.begin_trace()
    per_s = run_async(load())
    tasks_ms = shown.page.end_trace()
    assert shown.page.evaluate("document.getElementById('requests-note').textContent").startswith("a few of")
    print(f"{per_s:.0f} requests/s, {len(tasks_ms)} tasks, {sum(tasks_ms):.0f} ms of CPU time in all, the longest {max(tasks_ms):.1f} ms")
    assert per_s > 500 and len(tasks_ms) > 100
    assert max(tasks_ms) < 50.0


def test_without_observation_there_is_neither_page_nor_feed() -> None:
    with start("all", "alone", "--http", "127.0.0.1:0", "--no-observe") as peer:
        url = peer.ready(20.0)["http"]
        assert {httpx.get(f"{url}{path}").status_code for path in ("/", "/mesh/events", "/dashboard/app.js")} == {404}


def test_the_files_are_served_by_name_and_nothing_else_is() -> None:
    with start("all", "alone", "--http", "127.0.0.1:0") as peer:
        url = peer.ready(20.0)["http"]
        for path in FILES.iterdir():
            if path.suffix != ".py" and path.is_file():
                assert httpx.get(f"{url}/dashboard/{path.name}").content == path.read_bytes()
        for name in ("__init__.py", "..%2Ffeed.py", "none"):
            assert httpx.get(f"{url}/dashboard/{name}").status_code == 404
        peer.terminate()
        assert peer.wait() == 0 and "Traceback" not in peer.stderr_text


def test_a_peer_stops_at_once_though_somebody_reads_its_events() -> None:
    with start("all", "alone", "--http", "127.0.0.1:0") as peer:
        url = peer.ready(20.0)["http"]
        with httpx.stream("GET", f"{url}/mesh/events", timeout=60.0) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert httpx.head(f"{url}/mesh/events").status_code == 200 and httpx.post(f"{url}/mesh/events").status_code == 405
            lines = stream.iter_lines()
            assert "event: snapshot" in [next(lines) for _ in range(3)]
            peer.terminate()
            for _ in lines:
                pass
        assert peer.wait() == 0
        assert [line.text for line in peer.stderr if "OPEN MESH" not in line.text] == []


def schemes() -> dict[str, dict[str, str]]:
    """Colours by name, of both schemes."""
    blocks = re.findall(r":root(\S*) \{(.*?)\n\}", (FILES / "style.css").read_text(), re.DOTALL)
    colours = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", body)) for _, body in blocks]
    return {"light": colours[0], "dark": colours[1]}


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, section 1.4.3."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(scheme: str) -> None:
    colours = schemes()[scheme]
    for text in ("text", "muted", "prompt", "route", "ticket", "claim", "blocks", "tokens", "ok", "bad"):
        for ground in ("panel", "back", "sunk"):
            assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    for ground in ("prompt", "route"):
        assert contrast(colours["on-accent"], colours[ground]) >= 4.5


def test_the_scripts_hold_no_syntax_error_and_no_foreign_address() -> None:
    for path in FILES.glob("*.[jhc]*[sl]"):
        text = path.read_text()
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], path.name
        assert len(text.splitlines()) <= 400 and "innerHTML" not in text


def test_the_package_holds_the_dashboards_files() -> None:
    assert run_command(["grep", "-c", "meshserve.observe.dashboard = ", "setup.cfg"]).stdout == "1"

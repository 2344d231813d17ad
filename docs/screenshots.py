"""`python -m docs.screenshots`: writes docs/pictures/dashboard.png from a mesh of the dummy engine, in a headless Chromium."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread

import httpx

from tests.harness import Process, meshserve_command, pace
from tests.harness.browser import Page, open_browser
from tests.harness.leaks import prepare

PICTURE = Path(__file__).with_name("pictures") / "dashboard.png"
MAX_BYTES = 200_000
WIDTH, HEIGHT = 1280, 880
TIMING = {"MESHSERVE_ENGINE_OPT": "profile=reference"}
"""Of the demo's workers: an engine without delays has nothing to show in the charts."""
START_S, STORY_S = 60.0, 20.0
CHARTS_S, REQUESTS_PER_S = 15.0, 6.0
"""Load before the picture is taken: the charts show the last minute."""
MOVING_S = 0.5
"""From the step's beginning: its KV blocks are half-way."""
TOPICS = ("harbours", "rivers", "lighthouses", "bridges", "canals")
ASK = """
const box = document.getElementById("prompt");
box.value = %r;
box.form.requestSubmit();
"""
OWN_BLOCKS = """
(() => {
  const own = document.querySelector("#requests .mine")?.closest("[data-request]");
  const { request, step } = document.getElementById("narrator").dataset;
  return own && request === own.dataset.request && step === "blocks";
})()
"""
"""Whether the newest of the page's own requests is at this step."""


def document(topic: str, num_sentences: int) -> str:
    """A prompt that is worth a handoff if it is long."""
    return " ".join(f"Paragraph {number} of a report on {topic}." for number in range(1, num_sentences + 1))


def put_load_on(url: str, is_over: Event) -> None:
    """Requests of several clients, long and short, some of them with a common beginning, until it is over."""

    def ask(number: int) -> None:
        prompt = document(TOPICS[number % len(TOPICS)], 4 + 9 * (number % 4)) + f" Question {number // 7}?"
        httpx.post(f"{url}/v1/completions", json={"model": "dummy", "prompt": prompt, "max_tokens": 48}, timeout=30.0).raise_for_status()

    with ThreadPoolExecutor(8) as clients:
        for number in count():
            clients.submit(ask, number)
            if is_over.wait(1 / REQUESTS_PER_S):
                clients.shutdown(cancel_futures=True)
                return


def take_picture(page: Page, url: str) -> None:
    """Of a request of the page's own, while its KV blocks are on their way. Not every long prompt is handed over: then another is sent."""
    page.resize(WIDTH, HEIGHT)
    page.prefer(color_scheme="light")
    page.open(f"{url}/?pace=1")
    page.wait_for("document.querySelectorAll('#peers li').length === 4", START_S)
    pace(CHARTS_S)
    for topic in TOPICS:
        page.evaluate(f"{{ {ASK % document(f'the sea and its {topic}', 40)} }}")
        with suppress(AssertionError):
            page.wait_for(OWN_BLOCKS, STORY_S)
            pace(MOVING_S)
            page.screenshot(PICTURE)
            return
    raise AssertionError("no prompt was handed over")


def main() -> None:
    """Start a mesh, look at it under load, and end it."""
    prepare()  # the harness's processes are adopted by the one that adopts orphans
    PICTURE.parent.mkdir(exist_ok=True)
    is_over = Event()
    with Process(meshserve_command("demo", "--http", "127.0.0.1:0"), env=TIMING) as demo, open_browser() as page:
        url = demo.wait_for_line(r"^\s*(http://\S+?)/?$", START_S)[1]
        load = Thread(target=put_load_on, args=(url, is_over))
        load.start()
        try:
            take_picture(page, url)
        finally:
            is_over.set()
            load.join()
            demo.terminate()
            demo.wait()
    size_bytes = PICTURE.stat().st_size
    assert size_bytes <= MAX_BYTES, f"{PICTURE} has {size_bytes} bytes: fewer pixels, please"
    print(f"{PICTURE}: {size_bytes:,} bytes")


if __name__ == "__main__":
    main()

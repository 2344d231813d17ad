"""`python -m docs.screenshots`: writes docs/pictures/dashboard.png from a mesh of the dummy engine, in a headless Chromium."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.harness import Process, meshserve_command, pace
from tests.harness.browser import Page, open_browser

PICTURE = Path(__file__).with_name("pictures") / "dashboard.png"
MAX_BYTES = 200_000
WIDTH, HEIGHT = 1280, 760
START_S, STORY_S = 60.0, 90.0
LOAD_S, REQUESTS_PER_S = 12.0, 6.0
"""Before the picture is taken: the charts show the last minute."""
MOVING_S = 0.6
"""From the step's beginning: its KV blocks are half-way."""
TOPICS = ("harbours", "rivers", "lighthouses", "bridges", "canals")
ASK = """
const box = document.getElementById("prompt");
box.value = %r;
box.form.requestSubmit();
"""


def document(topic: str, num_sentences: int) -> str:
    """A prompt that is worth a handoff if it is long."""
    return " ".join(f"Paragraph {number} of a report on {topic}." for number in range(1, num_sentences + 1))


def put_load_on(url: str) -> None:
    """Requests of several clients, long and short, some of them with a common beginning."""

    def ask(number: int) -> None:
        prompt = document(TOPICS[number % len(TOPICS)], 4 + 9 * (number % 4)) + f" Question {number // 7}?"
        httpx.post(f"{url}/v1/completions", json={"model": "dummy", "prompt": prompt, "max_tokens": 24}, timeout=30.0).raise_for_status()

    with ThreadPoolExecutor(4) as clients:
        for number in range(round(LOAD_S * REQUESTS_PER_S)):
            clients.submit(ask, number)
            pace(1 / REQUESTS_PER_S)


def take_picture(page: Page, url: str) -> None:
    """Of a request of the page's own, while its KV blocks are on their way."""
    page.resize(WIDTH, HEIGHT)
    page.prefer(color_scheme="light")
    page.open(f"{url}/?pace=1")
    page.wait_for("document.querySelectorAll('#peers li').length === 4", START_S)
    put_load_on(url)
    page.evaluate(ASK % document("the sea", 40))
    page.wait_for("document.getElementById('narrator').dataset.step === 'blocks'", STORY_S)
    pace(MOVING_S)
    page.screenshot(PICTURE)


def main() -> None:
    """Start a mesh, look at it, and end it."""
    PICTURE.parent.mkdir(exist_ok=True)
    with Process(meshserve_command("demo", "--http", "127.0.0.1:0")) as demo, open_browser() as page:
        take_picture(page, demo.wait_for_line(r"^\s*(http://\S+?)/?$", START_S)[1])
    size_bytes = PICTURE.stat().st_size
    assert size_bytes <= MAX_BYTES, f"{PICTURE} has {size_bytes} bytes: fewer pixels, please"
    print(f"{PICTURE}: {size_bytes:,} bytes")


if __name__ == "__main__":
    main()

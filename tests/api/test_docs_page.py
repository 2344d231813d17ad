"""The page at `/docs` in a real browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import meshserve.roles.frontend.openapi.page
from tests.harness import ALL_ROLES, Process, meshserve_command
from tests.harness.browser import Page, page_or_skip

FILES = Path(meshserve.roles.frontend.openapi.page.__file__).parent
SHOWN_S = 20.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Process(meshserve_command(*ALL_ROLES, "--mesh", "docs", "--no-observe")) as peer:
        yield peer.ready()["http"]
        peer.terminate()
        assert peer.wait() == 0


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    yield from page_or_skip()


def test_every_route_can_be_read_on_a_desk_and_on_a_phone_and_nothing_comes_from_outside(url: str, page: Page) -> None:
    num_routes = sum(map(len, httpx.get(f"{url}/openapi.json").json()["paths"].values()))
    for width, height, is_phone, scheme in ((1200, 900, False, "light"), (390, 844, True, "dark")):
        page.resize(width, height, is_phone=is_phone)
        page.prefer(color_scheme=scheme)
        page.open(f"{url}/docs?{scheme}#createChat")  # another query, so that it is read anew
        page.wait_for(f"location.search === '?{scheme}' && document.querySelectorAll('.operation').length === {num_routes}", SHOWN_S)
        page.wait_for("document.querySelector('#createChat[open] .fields') !== null", SHOWN_S)
        page.evaluate("document.querySelectorAll('.operation').forEach((operation) => { operation.open = true; })")
        page.wait_for(f"document.querySelectorAll('.operation > .body').length === {num_routes}", SHOWN_S)
        page.evaluate("document.querySelectorAll('.nested').forEach((nested) => { nested.open = true; })")
        page.wait_for("[...document.querySelectorAll('.nested')].some((nested) => nested.querySelector('.nested'))", SHOWN_S)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("filter = document.getElementById('filter'); filter.value = 'models'; filter.dispatchEvent(new Event('input'))")
    shown = page.evaluate("[...document.querySelectorAll('.operation:not([hidden])')].map(({ id }) => id)")
    assert shown == ["listModels", "getModel", "ollamaModels", "ollamaRunning"]
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.errors == [] and all(address.startswith((url, "about:blank")) for address in page.addresses)


def test_the_page_is_kept_to_itself(url: str) -> None:
    response = httpx.get(f"{url}/docs")
    assert response.headers["content-type"].startswith("text/html") and "default-src 'none'" in response.headers["content-security-policy"]
    for path in FILES.glob("*.[jhcs]*[slg]"):
        text = path.read_text()
        assert httpx.get(f"{url}/docs/{path.name}").content == path.read_bytes()
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], path.name
        assert len(text.splitlines()) <= 400 and "innerHTML" not in text
    for name in ("__init__.py", "..%2Fdocument.py", "none"):
        assert httpx.get(f"{url}/docs/{name}").status_code == 404

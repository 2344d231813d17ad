"""The server held against its own OpenAPI document by schemathesis, with and without keys."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import ALL_ROLES, Process, meshserve_command, run_command

SMALL = ("--engine-opt", "context_length=4096")
KEY = "Authorization: Bearer secret"
CHECKS = ("--checks", "all", "--exclude-checks", "positive_data_acceptance")
"""Instead of the one that is left out, `openapi_hooks` has its own, which knows the rules between fields."""
SETTINGS = (
    *("--continue-on-failure", "--suppress-health-check", "all", "--generation-database", "none"),
    *("--no-color", "--output-sanitize", "false"),
)
ENDLESS = ("--exclude-path", "/mesh/events")


def started(mesh: str, *options: str) -> Iterator[str]:
    with Process(meshserve_command(*ALL_ROLES, *SMALL, "--mesh", mesh, *options)) as peer:
        yield peer.ready()["http"]
        peer.terminate()
        assert peer.wait() == 0
        assert "Traceback" not in peer.stderr_text


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from started("openapi")


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    yield from started("openapi-keys", "--api-key", "secret")


def num_cases(url: str, *options: str, deadline_s: float = 100.0) -> int:
    """Run schemathesis; every check of every case must hold. It runs in a process of its own, with its own idea of warnings."""
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", program, "run", f"{url}/openapi.json", *CHECKS, *SETTINGS, *ENDLESS, *options]
    told = run_command(command, deadline_s, env={"SCHEMATHESIS_HOOKS": "tests.api.openapi_hooks"})
    assert told.exit_code == 0, told.stdout[-20_000:] + told.stderr[-2_000:]
    found = re.search(r"(\d+) generated, (\d+) passed", told.stdout)
    assert found is not None and found[1] == found[2], told.stdout[-2_000:]
    return int(found[1])


def test_a_short_run_finds_nothing_outside_the_document(url: str) -> None:
    assert num_cases(url, "--phases", "fuzzing", "--max-examples", "10", "--seed", "1") >= 100


def test_with_keys_nothing_passes_without_one(guarded_url: str) -> None:
    options = ("--phases", "fuzzing", "--max-examples", "4", "--seed", "1", "--header", KEY)
    assert num_cases(guarded_url, *options) >= 40


@pytest.mark.full
@pytest.mark.timeout(700)
def test_thousands_of_cases_find_nothing_outside_the_document(url: str, guarded_url: str) -> None:
    options = ("--phases", "examples,coverage,fuzzing", "--seed", "7")
    plain = num_cases(url, *options, "--max-examples", "150", deadline_s=300.0)
    with_keys = num_cases(guarded_url, *options, "--max-examples", "30", "--header", KEY, deadline_s=300.0)
    print(f"{plain} cases without keys, {with_keys} with: no server error, and no response outside the document")
    assert plain >= 2000 and with_keys >= 2000


def test_every_path_takes_the_methods_that_the_document_names(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    for path, item in document["paths"].items():
        refused = httpx.put(url + re.sub(r"\{\w+\}", "x", path))
        assert refused.status_code == 405, path
        assert {method.lower() for method in refused.headers["allow"].split(", ")} - {"head"} == set(item), path


def test_the_document_is_that_of_the_settings(url: str, guarded_url: str) -> None:
    plain = httpx.get(f"{url}/openapi.json").json()
    assert "security" not in plain and "/login" not in plain["paths"] and "/metrics" in plain["paths"]
    assert httpx.get(f"{guarded_url}/openapi.json").status_code == 401
    closed = httpx.get(f"{guarded_url}/openapi.json", headers={"x-api-key": "secret"}).json()
    assert [list(way) for way in closed["security"]] == [["bearer"], ["apiKey"], ["azureKey"], ["session"]]
    assert closed["paths"]["/health"]["get"]["security"] == [] and "401" not in closed["paths"]["/health"]["get"]["responses"]
    assert "401" in closed["paths"]["/v1/models"]["get"]["responses"] and "/login" in closed["paths"]


def test_under_anthropics_routes_every_error_is_anthropics(url: str, guarded_url: str) -> None:
    path = "/v1/messages"
    answers = (
        httpx.post(guarded_url + path, json={}),
        httpx.put(url + path),
        httpx.get(f"{url}{path}/nowhere"),
        httpx.post(url + path, headers={"x": "y" * 20_000}),
        httpx.post(url + path, headers={"sec-fetch-site": "cross-site"}),
    )
    assert [answer.status_code for answer in answers] == [401, 405, 404, 431, 403]
    for answer in answers:
        assert answer.json().keys() == {"type", "error"} and answer.json()["type"] == "error"


def test_a_program_with_a_key_is_shown_the_form_and_no_other_method(guarded_url: str) -> None:
    headers = {"x-api-key": "secret"}
    assert httpx.get(f"{guarded_url}/login", headers=headers).status_code == 200
    for method, path, allowed in (("PUT", "/login", "GET, HEAD, POST"), ("GET", "/logout", "POST")):
        refused = httpx.request(method, guarded_url + path, headers=headers)
        assert refused.status_code == 405 and refused.headers["allow"] == allowed


def test_the_document_is_made_when_somebody_asks() -> None:
    program = "import sys, meshserve.app, meshserve.roles.frontend.server as _; print([n for n in sys.modules if '.openapi.' in n])"
    rooms = {"meshserve.roles.frontend.openapi.page"}
    assert set(ast.literal_eval(run_command([sys.executable, "-c", program]).stdout)) == rooms


def test_the_package_holds_the_pages_files() -> None:
    assert "meshserve.roles.frontend.openapi.page = " in (Path(__file__).parents[2] / "setup.cfg").read_text()

"""Engines on one host know what the others take: two processes, a killed one, and places where no file can be."""

import contextlib
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshserve.engines.claims import Claim, Share
from meshserve.engines.host import num_engine_threads
from tests.harness import Process

OTHER = """
import sys, pathlib
from meshserve.engines.claims import Claim, Share
claim = Claim(pathlib.Path(sys.argv[1]))
claim.make(lambda others: print("others", *others, flush=True) or Share(1000, 3))
print("claimed", flush=True)
sys.stdin.read()
"""


def others_of(claim: Claim) -> Share:
    found = []

    def decide(others: Share) -> Share:
        found.append(others)
        return Share(500, 1)

    assert claim.make(decide) == Share(500, 1)
    return found[0]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "claims"


@contextlib.contextmanager
def other_engine(place: Path) -> Iterator[Process]:
    with Process([sys.executable, "-c", OTHER, str(place)]) as process:
        process.wait_for_line("^claimed", 20.0)
        yield process


def test_what_one_process_claims_another_is_told_until_it_gives_it_back(place: Path) -> None:
    own = Claim(place)
    assert others_of(own) == Share(0, 0)
    with other_engine(place) as other:
        assert "others 500 1" in other.stdout_text
        own.update(None)
        assert others_of(Claim(place)) == Share(1000, 3)


def test_memory_that_is_allocated_is_pending_no_more_and_threads_stay_taken(place: Path) -> None:
    own = Claim(place)
    others_of(own)
    own.update(Share(0, 1))
    assert others_of(Claim(place)) == Share(0, 1)


def test_claims_of_a_killed_process_count_no_more(place: Path) -> None:
    with other_engine(place) as other:
        other.kill()
        other.wait()
        assert others_of(Claim(place)) == Share(0, 0)
    assert len(json.loads(place.read_text())) == 1


def test_a_process_of_the_same_number_is_not_taken_for_the_one_that_claimed(place: Path) -> None:
    place.write_text(json.dumps({f"{os.getpid()}/1/0": [1000, 3]}))
    assert others_of(Claim(place)) == Share(0, 0)


def test_the_file_is_the_users_own(place: Path) -> None:
    others_of(Claim(place))
    assert place.stat().st_mode & 0o777 == 0o600


HUGE = "9" * 400
DAMAGED = [
    "",
    "{",
    "[1, 2]",
    '{"x": 1}',
    '{"x/y": [1, 2]}',
    '{"1": ["a", "b"]}',
    '{"1/2/3": [1]}',
    '{"1": [1, 1]}',
    '{"1/2/3": [1e999, 1]}',
]
DAMAGED += [f'{{"{HUGE}/2/3": [1, 1]}}', f'{{"{2**70}/-/3": [1, 1]}}', "[" * 200_000, '{"a":' * 100_000, '{"1/2/3": [NaN, 1]}']


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:20])
def test_a_damaged_file_holds_no_claims_and_is_written_anew(place: Path, text: str) -> None:
    place.write_text(text)
    own = Claim(place)
    assert others_of(own) == Share(0, 0)
    assert list(json.loads(place.read_text()).values()) == [[500, 1]]


def test_an_engine_that_is_refused_has_claimed_nothing(place: Path) -> None:
    def refuse(others: Share) -> Share:
        raise ValueError

    with pytest.raises(ValueError):
        Claim(place).make(refuse)
    assert others_of(Claim(place)) == Share(0, 0)


def check_goes_without(place: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """It decides as if alone, and says so once."""
    with caplog.at_level(logging.WARNING, "meshserve"):
        own = Claim(place)
        assert others_of(own) == Share(0, 0)
        own.update(Share(0, 1))
        own.update(None)
    (line,) = caplog.messages
    assert words in line and str(place) in line


def test_where_no_file_can_be_an_engine_goes_without_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_goes_without(tmp_path / "none" / "claims", "No such file", caplog)


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "link"
    place.symlink_to(tmp_path / "target")
    check_goes_without(place, "symbolic links", caplog)
    assert not (tmp_path / "target").exists()


def test_a_file_of_another_user_is_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    place.write_text("{}")
    try:
        os.chown(place, 12345, -1)
    except PermissionError:
        pytest.skip("only root can give files away")
    check_goes_without(place, "another user's", caplog)


def test_a_lock_that_is_never_given_back_is_waited_for_only_a_moment(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with place.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        check_goes_without(place, "its lock hangs", caplog)


def test_threads_that_others_claimed_are_left_to_them_but_for_one() -> None:
    assert num_engine_threads(0) >= num_engine_threads(1) >= num_engine_threads(1000) == 1


def test_a_place_that_takes_nothing_is_gone_without(caplog: pytest.LogCaptureFixture) -> None:
    if not os.access("/dev/full", os.W_OK) or os.getuid():
        pytest.skip("no file that is always full here, and one's own")
    check_goes_without(Path("/dev/full"), "", caplog)

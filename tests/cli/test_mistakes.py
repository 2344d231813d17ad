"""What users get wrong: one clear line, the exit code of the contract, no traceback."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import Completed, run_command
from tests.harness.processes import meshserve_command

ALONE = ("--interface", "127.0.0.1", "--no-mdns")


def meshserve(*arguments: str) -> Completed:
    return run_command(meshserve_command(*arguments), 10.0)


def assert_one_line(done: Completed, exit_code: int, words: str) -> None:
    assert done.exit_code == exit_code, done
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--role is missing"),
        (("--role", "chef"), "unknown role 'chef'"),
        (("--role", "decode", "--interface", "nope0"), "no interface or address 'nope0'"),
        (("--role", "decode", "--engine", "warp"), "no engine 'warp'; there are dummy"),
        (("--role", "decode", "--engine-opt", "colour=red"), "no option 'colour'"),
        (("--role", "decode", "--engine-opt", "block_size=-1"), "block_size"),
        (("--role", "decode", "--engine-opt", "block_size"), "not KEY=VALUE"),
        (("--role", "decode", "--engine-opt", "num_blocks=9", "--kv-cache-tokens", "99"), "leave one of them out"),
        (("--role", "decode", "--kv-cache-tokens", "15"), "less than the dummy engine's one block of 16 tokens"),
        (("--role", "decode", "--kv-cache-tokens", "0"), "0 is not in the range x>=1"),
        (("--role", "decode", "--kv-type", "q8_0"), "the dummy engine has no --kv-type"),
        (("--role", "decode", "--kv-type", "Q8_0"), "the dummy engine has no --kv-type"),
        (("--role", "decode", "--kv-type", "q4_0"), "'q4_0' is not one of 'q8_0', 'f16'"),
        (("--role", "decode", "--served-model-name", "one,,two"), "is not NAME[,NAME]"),
        (("--role", "decode", "--served-model-name", ",".join(map(str, range(18)))), "a model has up to 17"),
        (("--role", "frontend", "--http", "here"), "not HOST:PORT"),
        (("--role", "decode", *ALONE, "--peer", "host:99999"), "not HOST or HOST:PORT"),
        (("--role", "decode", "--mesh", "two words"), "without spaces"),
    ],
)
def test_a_usage_error_says_what_is_wrong_and_exits_with_two(arguments: tuple[str, ...], words: str) -> None:
    assert_one_line(meshserve("run", *arguments), 2, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--name", "x"), "--name is of one"),
        (("--lan", "--port", "9000"), "--port is of one"),
        (("--peer", "10.0.0.1"), "add --lan"),
        (("--no-mdns",), "add --lan"),
        (("--interface", "lo"), "add --lan"),
    ],
)
def test_an_option_that_a_demo_cannot_follow_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert_one_line(meshserve("demo", *arguments), 2, words)


def test_an_unknown_option_is_refused() -> None:
    done = meshserve("run", "--role", "decode", "--warp", "9")
    assert done.exit_code == 2 and "No such option" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--role", "decode", "--warp", "9"), "meshserve run --help`"),
        (("pers",), "No such command 'pers'; there are bench, demo, "),
        (("run", "--port", "high"), "meshserve run --help`"),
        (("run", "--policy", "fair"), "'fair' is not one of 'kv', 'round-robin'"),
        (("key", "new"), "meshserve key new --help`"),
        (("trace", "one", "two"), "meshserve trace --help`"),
        (("trace",), "or ask for --last"),
    ],
)
def test_what_no_command_takes_is_said_in_one_line_with_where_to_read_on(arguments: tuple[str, ...], words: str) -> None:
    assert_one_line(meshserve(*arguments), 2, words)


@pytest.mark.parametrize("option", ["--port", "--http"])
def test_a_taken_port_is_named(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        value = str(min(port, 65532)) if option == "--port" else f"127.0.0.1:{port}"
        assert_one_line(meshserve("run", "--role", "frontend", *ALONE, option, value), 1, "taken")


def test_a_key_file_that_others_can_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    made = meshserve("key", "new", str(path))
    shown = meshserve("key", "show", str(path))
    assert made.exit_code == shown.exit_code == 0 and made.stdout.strip().endswith(shown.stdout.strip())
    assert path.stat().st_mode & 0o777 == 0o600
    assert_one_line(meshserve("key", "new", str(path)), 1, "exists already")
    path.chmod(0o644)
    assert_one_line(meshserve("run", "--role", "decode", *ALONE, "--key-file", str(path)), 1, "chmod 600")
    assert_one_line(meshserve("run", "--role", "decode", *ALONE, "--key-file", str(tmp_path / "none")), 1, "No such file")


def test_looking_at_a_mesh_that_is_not_there_ends_in_one_line() -> None:
    with ThreadPoolExecutor(2) as pool:  # each waits for three seconds before it says so
        asked, done = pool.map(lambda arguments: meshserve(*arguments, *ALONE), (("generate", "hi"), ("peers",)))
    assert_one_line(asked, 1, "try --peer HOST")
    assert done.exit_code == 1 and "no peer of mesh" in done.stdout and not done.stderr

"""The demo's command and its course."""

import asyncio
import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from meshserve.cli.demo.asking import Client
from meshserve.cli.demo.children import Children
from meshserve.cli.demo.prompts import dummy_questions, real_questions
from meshserve.cli.demo.view import View
from meshserve.cli.model_options import LLAMA, MODEL_HELP, engine_for, fetch_model, say_dummy
from meshserve.cli.options import mesh_options, option
from meshserve.cli.running import execute
from meshserve.errors import StartupFailed, UsageError

_SLOWEST_LOAD_BYTES_PER_S = 20e6
"""Of a model, by several workers at once: a slow disk."""
_CHECK_S, _WATCH_S = 0.02, 0.2
"""Between two looks at the peers: until they are ready, and afterwards."""
_PAUSE_S = 0.6
"""Before each prompt, for the eyes of an audience."""
_SHORT_PAUSE_S = 0.1
"""The same without an audience: routers have heard by then what workers hold."""
_HTTP = "127.0.0.1:8000"
_DECIDED_HERE = {"name": "--name", "port": "--port"}
_OF_THE_LAN = {"interface": "--interface", "seeds": "--peer", "no_mdns": "--no-mdns"}


@click.command()
@option("--decode", type=click.IntRange(1, 16), default=2, help="Decode workers.")
@option("--prefill", type=click.IntRange(0, 16), default=1, help="Prefill workers; 0 is the aggregated deployment.")
@option("--http", metavar="[HOST:]PORT", help=f"Where to listen.  [default: {_HTTP}, or a free port]")
@option("--model", metavar="SPEC", help=f"{MODEL_HELP}  [default: the dummy engine's]")
@click.option("--once", is_flag=True, help="End after the prompts.")
@click.option("--lan", is_flag=True, help="Open the mesh and its HTTP side to this network.")
@mesh_options
def demo(**settings: Any) -> None:
    """Show a whole disaggregated mesh on this machine: who serves each prompt, why, and where its time goes."""
    sources = click.get_current_context().get_parameter_source
    given = {name for name in settings if sources(name) is ParameterSource.COMMANDLINE}

    def run() -> Any:
        _check_options(given, settings["lan"])
        return _demo(settings, _model(settings["model"], settings["decode"] + settings["prefill"]))

    execute(settings, run)


def _check_options(given: set[str], is_lan: bool) -> None:
    """Raises UsageError for an option of the command line that has no effect here. In the environment it may be meant for others."""
    for name, flag in _DECIDED_HERE.items():
        if name in given:
            raise UsageError(f"demo starts several peers, and {flag} is of one: leave it out, or start each peer with `meshserve run`")
    for name, flag in _OF_THE_LAN.items():
        if name in given and not is_lan:
            raise UsageError(f"without --lan the demo stays on this machine's loopback: leave {flag} out, or add --lan")


@dataclass(frozen=True, slots=True)
class _Model:
    """What the workers serve."""

    name: str
    """For clients."""
    worker_options: tuple[str, ...] = ()
    is_real: bool = False
    start_timeout_s: float = 20.0
    answer_timeout_s: float = 30.0
    note: str = ""
    """For people, while they wait."""


def _model(spec: str | None, num_workers: int) -> _Model:
    """A file is fetched here, once for all workers, and memory and threads are divided among them."""
    if spec is None:
        return _Model("dummy")
    if (engine := engine_for(spec)) != LLAMA:
        say_dummy(spec)
        return _Model(spec, ("--engine", engine, "--model", spec))
    source = fetch_model(spec)
    from meshserve.engines.llama.options import fair_share  # what only real models need, and is there now

    tokens, threads = fair_share(source.path, num_workers)
    size_bytes = source.path.stat().st_size
    options = ("--model", str(source.path), "--served-model-name", source.name, "--kv-cache-tokens", str(tokens))
    note = (
        f"{num_workers} workers load {source.name} ({size_bytes / 1e6:,.0f} MB), each with room for {tokens:,} tokens and {threads} thread"
    )
    return _Model(
        source.name,
        ("--engine", LLAMA, *options, "--engine-opt", f"threads={threads}"),
        is_real=True,
        start_timeout_s=60.0 + size_bytes / _SLOWEST_LOAD_BYTES_PER_S,
        answer_timeout_s=300.0,
        note=note + ("s" if threads > 1 else ""),
    )


async def _demo(settings: dict[str, Any], model: _Model) -> int:
    """Returns the exit code; an interrupt is how a demo ends."""
    main = asyncio.current_task()
    assert main is not None
    children, view = Children(_common_options(settings)), View()
    course = asyncio.create_task(_course(settings, children, view, model))

    def on_signal() -> None:
        if not course.cancel():  # it has ended: its peers are being stopped, and now are killed
            main.cancel()

    # SIGHUP: the terminal was closed, which the peers would not notice
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        await course
    except asyncio.CancelledError:
        if main.cancelling():
            raise
    finally:
        try:
            view.close()
        finally:
            await children.stop()
    return 0


def _common_options(settings: dict[str, Any]) -> list[str]:
    options = ["--mesh", _mesh(settings), "--log-level", settings["log_level"], "--drain-timeout", "2"]
    if not settings["lan"]:
        options += ["--interface", "127.0.0.1", "--no-mdns"]
    else:
        options += ["--interface", settings["interface"]] if settings["interface"] else []
        options += ["--no-mdns"] if settings["no_mdns"] else []
        options += [part for address in settings["seeds"] for part in ("--peer", address)]
    if settings["log_json"]:
        options.append("--log-json")
    if settings["key_file"]:
        options += ["--key-file", settings["key_file"]]
    return options


def _mesh(settings: dict[str, Any]) -> str:
    """On loopback one of its own, unless a name was given: it should meet no other."""
    return str(settings["mesh"]) if settings["lan"] or settings["mesh"] != "default" else f"demo-{os.getpid()}"


def _http_address(settings: dict[str, Any]) -> str:
    """The one that was asked for, else the usual one if it is free, else any."""
    if settings["http"]:
        return str(settings["http"])
    host = "0.0.0.0" if settings["lan"] else "127.0.0.1"
    try:
        with socket.create_server((host, 8000)):
            return f"{host}:8000"
    except OSError:
        return f"{host}:0"


async def _course(settings: dict[str, Any], children: Children, view: View, model: _Model) -> None:
    began_s = time.monotonic()
    view.begins(model.note)
    frontend = await children.start("front", "frontend,processor,router", "--http", _http_address(settings))
    await _wait_for(children, view, lambda: frontend.ready_s is not None, model.start_timeout_s)
    # the frontend's own choice of a port: one chosen here could be taken by the time it starts
    seed = frontend.fields["address"].removeprefix("tcp://")
    workers = [f"{role}-{number + 1}" for role in ("decode", "prefill") for number in range(settings[role])]
    await asyncio.gather(*(children.start(name, name.partition("-")[0], "--peer", seed, *model.worker_options) for name in workers))
    wanted = f"{settings['decode']} decode, {settings['prefill']} prefill ready"
    await _wait_for(
        children,
        view,
        lambda: children.workers_line.startswith(wanted) and all(child.ready_s for child in children.all),
        model.start_timeout_s,
    )
    url = frontend.fields["http"].replace("0.0.0.0", "127.0.0.1").replace("[::]", "127.0.0.1")
    async with aclosing(Client(url)) as client:
        await _all_linked(client, len(children.all))
        view.started(children.all, time.monotonic() - began_s)
        await _ask_all(client, view, model)
    view.finished()
    if not settings["once"]:
        view.serving(url, _example(model), _watching(settings, seed), _joining(settings))
    while not settings["once"]:
        children.check()
        await asyncio.sleep(_WATCH_S)


async def _all_linked(client: Client, count: int) -> None:
    """Wait until each peer reaches all others: the prompts are to show a mesh that has settled."""
    for _ in range(200):
        peers = await client.list_peers()
        if len(peers) >= count and all((peer["num_reached"] or 0) >= count - 1 for peer in peers):
            return
        await asyncio.sleep(_CHECK_S)


async def _wait_for(children: Children, view: View, condition: Callable[[], bool], timeout_s: float) -> None:
    """Raises StartupFailed if a peer ends, or the condition does not come true in time."""
    for _ in range(round(timeout_s / _CHECK_S)):
        children.check()
        view.starting(children.all)
        if condition():
            return
        await asyncio.sleep(_CHECK_S)
    raise StartupFailed(f"the demo's peers did not find each other in {timeout_s:.0f} s; --log-level info says more")


def _watching(settings: dict[str, Any], seed: str) -> str:
    key = f" --key-file {settings['key_file']}" if settings["key_file"] else ""
    return f"--mesh {_mesh(settings)}{'' if settings['lan'] else f' --peer {seed}'}{key}"


def _joining(settings: dict[str, Any]) -> str:
    model = f" --model {shlex.quote(settings['model'])}" if settings["model"] else ""
    if settings["lan"]:
        return f"meshserve run --role decode --mesh {settings['mesh']}{model}    # on any machine of this network: one more worker"
    return f"meshserve demo --lan{model}    # the same, open to this network"


def _example(model: _Model) -> str:
    """The rest of a curl command."""
    path, fields = "/v1/completions", {"prompt": "Hello", "max_tokens": 32}
    if model.is_real:
        messages = [{"role": "user", "content": "Why do we sleep?"}]
        path, fields = "/v1/chat/completions", {"messages": messages, "max_tokens": 80}
    body = json.dumps({"model": model.name, **fields, "stream": True})
    return f"{path} -d {shlex.quote(body)}"


async def _ask_all(client: Client, view: View, model: _Model) -> None:
    pause_s = _PAUSE_S if view.console.is_terminal else _SHORT_PAUSE_S
    for question in real_questions() if model.is_real else dummy_questions():
        view.asking(question)
        await asyncio.sleep(pause_s)
        answered = await client.ask(question, model.name, model.answer_timeout_s, view.text)
        view.answered(answered)

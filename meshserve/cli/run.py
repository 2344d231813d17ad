"""`meshserve run`: one peer, until it is told to stop."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any

import click

from meshserve.cli.frontend_options import api_keys, frontend_config, frontend_options, http_address
from meshserve.cli.model_options import model_options, model_settings, say_dummy, with_model
from meshserve.cli.options import mesh_config, mesh_options, option, parse_roles, pick
from meshserve.cli.otlp_options import otlp_config
from meshserve.cli.outputs import queued_outputs
from meshserve.cli.running import declare, declared, execute
from meshserve.config import ROLES, HandoffConfig, MeshConfig, ServeConfig
from meshserve.telemetry import printable

_HANDOFF, _SERVE, _MESH = HandoffConfig(), ServeConfig(), MeshConfig()
_POLICIES = ("kv", "round-robin", "random", "least-loaded", "power-of-two")


@click.command()
@option(
    "--role", "roles", multiple=True, metavar="ROLE",
    help=f"{', '.join(ROLES)}, or all; repeatable or comma-separated.",
)
@frontend_options
@model_options
@option("--policy", type=click.Choice(_POLICIES), default="kv", help="How the router chooses.")
@option(
    "--max-local-prefill-tokens", type=click.IntRange(0), default=_HANDOFF.max_local_prefill_tokens,
    help="No hand-over of prompts with at most so many uncached tokens. By default expected times decide, and 256 until they are known.",
)
@option("--max-prefill-queue", type=click.IntRange(0), default=_HANDOFF.max_prefill_queue, help="No hand-over to a queue as long as this.")
@option(
    "--failure-timeout", "failure_timeout_s",
    type=click.FloatRange(0.1, 60), default=_MESH.failure_timeout_s,
    help="Seconds of silence until a peer gets no new work.",
)
@option(
    "--drain-timeout", "drain_timeout_s", type=click.FloatRange(0), default=_SERVE.drain_timeout_s,
    help="Seconds that running requests get to finish.",
)
@option(
    "--max-migrations", type=click.IntRange(0), default=_SERVE.max_migrations,
    help="How often a request whose output has begun may continue at another worker or processor, after the loss of one.",
)
@option(
    "--stall-timeout", "stall_timeout_s", type=click.FloatRange(0.1), default=_SERVE.stall_timeout_s,
    help="Seconds that progress on a request may be overdue, by the worker's forecast, before another decode worker takes over.",
)
@option(
    "--bulk-limit", "bulk_limit_mb_per_s", type=click.FloatRange(0), default=0.0,
    help="Megabytes of KV that this peer sends in a second, so that tokens stay smooth on a slow link; 0 is no limit.",
)
@option("--record", type=click.Path(), metavar="FILE", help="Append what happens to each request, as lines of JSON.")
@option("--no-observe", is_flag=True, help="No spans and no metrics.")
@option("--metrics-vllm", is_flag=True, help="Add vLLM's metric names to /metrics, for tools that know only those names.")
@option("--otlp", "otlp_url", metavar="URL", help="Send spans to the OpenTelemetry collector here, as OTLP over HTTP.")
@mesh_options
def run(**settings: Any) -> None:
    """Run one peer of a mesh, with one or more roles."""
    roles = parse_roles(settings["roles"], ROLES)
    config = serve_config(settings)

    def start() -> Coroutine[Any, Any, int]:
        if settings["engine"] is None and {"decode", "prefill"} & set(roles):
            say_dummy(settings["model"])
        return serve(mesh_config(settings, roles), with_model(config, roles))

    with queued_outputs(declared):
        execute(settings, start)


def serve_config(settings: dict[str, Any]) -> ServeConfig:
    """What the flags of `run` say about serving. Raises UsageError."""
    host, port = http_address(settings["http"])
    found = {
        **settings,
        **model_settings(settings),
        "http_host": host,
        "http_port": port,
        "api_keys": api_keys(settings),
        "observe": not settings["no_observe"],
        "otlp": otlp_config(settings["otlp_url"], os.environ, not settings["no_observe"]),
        "handoff": pick(HandoffConfig, settings),
        "frontend": frontend_config(settings),
    }
    return pick(ServeConfig, found)


async def serve(mesh: MeshConfig, config: ServeConfig) -> int:
    """Start a peer, serve until the first signal, drain, stop. A second signal ends at once."""
    from meshserve.app import Peer  # the whole house: not needed to print a usage error
    from meshserve.roles.frontend.access import is_loopback

    told_to_stop = asyncio.Event()

    def on_signal() -> None:
        if told_to_stop.is_set():
            os._exit(130)
        told_to_stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup: the terminal's end is to change nothing
            loop.add_signal_handler(number, on_signal)
    peer = Peer(mesh, config, lambda line: click.echo(printable(line)))
    await peer.start()
    if peer.engine_description:
        declare("engine", peer.engine_description)
    if mesh.key_file is None:
        where = "this machine" if mesh.interface is not None and is_loopback(mesh.interface) else "this network"
        declare("open_mesh", f"OPEN MESH: no --key-file, so everyone on {where} can join {mesh.mesh!r}")
    if "frontend" in mesh.roles and not config.api_keys and not is_loopback(config.http_host):
        declare("open_http", f"OPEN HTTP: no --api-key, so everyone who reaches {peer.http_url} can use this mesh")
    try:
        await told_to_stop.wait()
        await peer.drain()
    finally:
        await peer.stop()
    return 0

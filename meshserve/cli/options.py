"""Options that commands share. Every one can be set in the environment as MESHSERVE_ and its name."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from meshserve.config import MeshConfig, TransportConfig
from meshserve.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """click's option, with its variable in the environment and its default in the help."""
    long_name = next(name for name in names if name.startswith("--"))
    settings.setdefault("envvar", "MESHSERVE_" + long_name.split("/")[0].lstrip("-").replace("-", "_").upper())
    settings.setdefault("show_default", True)
    return click.option(*names, **settings)


_MESH_OPTIONS = [
    option("--mesh", default="default", help="Only peers of the same mesh see each other."),
    option("--name", default=None, help="What people call this peer.  [default: HOST-xxxx]", show_default=False),
    option("--interface", default=None, help="Use only this interface or address.  [default: all]", show_default=False),
    option(
        "--port",
        type=click.IntRange(1, 65532),
        default=None,
        help="First of four ports in a row.  [default: the first free four from 7800]",
    ),
    option(
        "--peer",
        "peers",
        multiple=True,
        metavar="HOST[:PORT]",
        envvar="MESHSERVE_PEER",
        help="A peer to join through, where mDNS does not reach.",
    ),
    option("--no-mdns", is_flag=True, help="Neither announce this peer by mDNS nor look for others."),
    option("--key-file", type=click.Path(), default=None, help="Admit only peers with the same key; see `meshserve key`."),
    option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", help="What goes to stderr."),
    option("--log-json", is_flag=True, help="Log lines as JSON."),
]


def mesh_options(command: Command) -> Command:
    """The options of all commands that join a mesh."""
    for add in reversed(_MESH_OPTIONS):
        command = add(command)
    return command


def mesh_config(settings: dict[str, Any], roles: tuple[str, ...] = ()) -> MeshConfig:
    """What :func:`mesh_options` said."""
    for name in ("mesh", "name"):
        text = settings[name]
        if text is not None and (not 0 < len(text) <= 63 or not text.isprintable() or " " in text):
            raise UsageError(f"--{name} {text!r}: up to 63 printable characters, without spaces")
    failure_timeout_s = settings.get("failure_timeout")
    return MeshConfig(
        mesh=settings["mesh"],
        name=settings["name"],
        roles=roles,
        interface=settings["interface"],
        port=settings["port"],
        seeds=tuple(settings["peers"]),
        use_mdns=not settings["no_mdns"],
        key_file=settings["key_file"],
        transport=TransportConfig(bulk_bytes_per_s=settings.get("bulk_limit_mb_per_s", 0.0) * 1e6),
        **(
            {}
            if failure_timeout_s is None
            else {"failure_timeout_s": failure_timeout_s, "heartbeat_interval_s": min(0.3, failure_timeout_s / 5)}
        ),
    )


def parse_roles(values: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """`--role a,b --role c`, or `all`. Raises UsageError for an unknown one, or none."""
    named = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if "all" in named:
        return known
    unknown = [role for role in named if role not in known]
    if unknown:
        raise UsageError(f"unknown role {unknown[0]!r}; there are: {', '.join(known)}, all")
    if not named:
        raise UsageError(f"--role is missing; there are: {', '.join(known)}, all")
    return tuple(role for role in known if role in named)

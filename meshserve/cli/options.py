"""Options that commands share. Each can be set in the environment as MESHSERVE_ and its name.

An option's value is stored under the name of the config field that it sets: :func:`pick`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from meshserve.config import MeshConfig, TransportConfig
from meshserve.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = TypeVar("Command", bound=Callable[..., Any])
Config = TypeVar("Config", bound="DataclassInstance")


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """click's option, with its variable in the environment and its default in the help."""
    long_name = next(name for name in names if name.startswith("--"))
    variable = long_name.split("/")[0].lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=f"MESHSERVE_{variable}", **{"show_default": True, **settings})


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator for several options, in the order in which the help shows them."""

    def add_all(command: Command) -> Command:
        for add in reversed(options):
            command = add(command)
        return command

    return add_all


def pick(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """The config whose fields are named like options, with the values of these."""
    names = (field.name for field in fields(kind))
    return kind(**{name: settings[name] for name in names if name in settings})


mesh_options = together(
    option("--mesh", default="default", help="Only peers of the same mesh see each other."),
    option("--name", help="What people call this peer.  [default: HOST-xxxx]"),
    option("--interface", help="Use only this interface or address.  [default: all]"),
    option(
        "--port", type=click.IntRange(1, 65532),
        help="First of four ports in a row.  [default: the first free four from 7800]",
    ),
    option(
        "--peer", "seeds", multiple=True, metavar="HOST[:PORT]",
        help="A peer to join through, where mDNS does not reach.",
    ),
    option("--no-mdns", is_flag=True, help="Neither announce this peer by mDNS nor look for others."),
    option("--key-file", type=click.Path(), help="Admit only peers with the same key; see `meshserve key`."),
    option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", help="What goes to stderr."),
    option("--log-json", is_flag=True, help="Log lines as JSON."),
)


def mesh_config(settings: Mapping[str, Any], roles: tuple[str, ...] = ()) -> MeshConfig:
    """The config by the values of :func:`mesh_options`. Raises UsageError."""
    for name in ("mesh", "name"):
        text = settings[name]
        if text is not None and (not 0 < len(text) <= 63 or not text.isprintable() or " " in text):
            raise UsageError(f"--{name} {text!r}: up to 63 printable characters, without spaces")
    found = {**settings, "roles": roles, "use_mdns": not settings["no_mdns"]}
    if "failure_timeout_s" in settings:
        found["heartbeat_interval_s"] = min(0.3, settings["failure_timeout_s"] / 5)
    if "bulk_limit_mb_per_s" in settings:
        found["transport"] = TransportConfig(bulk_bytes_per_s=settings["bulk_limit_mb_per_s"] * 1e6)
    return pick(MeshConfig, found)


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

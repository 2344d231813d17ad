"""`meshserve key`: the one file that closes a mesh."""

from pathlib import Path

import click


@click.group()
def key() -> None:
    """Make or show the key that closes a mesh."""


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Write a new key to FILE, readable by you only. Copy it to every machine of the mesh."""
    from meshserve.mesh.keys import create_key_file

    click.echo(f"{file}: {create_key_file(file).fingerprint}")


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print the fingerprint of the key in FILE: equal on all machines of a mesh."""
    from meshserve.mesh.keys import read_key_file

    click.echo(read_key_file(file).fingerprint)

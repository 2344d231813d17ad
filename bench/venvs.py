"""Virtual environments of other programs, each in a directory that the user names: kept, so that the next run finds them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click


def ensure(directory: Path, *steps: Sequence[str]) -> Path:
    """The interpreter of the environment in `directory`, made and filled by these `pip install` steps if it is not there.

    Raises ClickException with pip's last words.
    """
    python, mark = directory / "venv/bin/python", directory / "installed"
    if mark.exists():
        return python
    directory.mkdir(parents=True, exist_ok=True)
    click.echo(f"installing into {directory} ...", err=True)
    _run([sys.executable, "-m", "venv", str(directory / "venv")])
    for step in steps:
        _run([str(python), "-m", "pip", "install", "-q", *step])
    # -P: without this directory, whose modules are named like the standard library's
    _run([str(python), "-P", str(Path(__file__).with_name("tiny_model.py")), str(directory / "tiny")])
    mark.touch()
    return python


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise click.ClickException(f"{' '.join(command[:5])} ...: {words[-1] if words else done.returncode}")

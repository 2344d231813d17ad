"""What is printed for people: rich's console, but for how it ends when nobody reads on."""

from rich.console import Console


class Output(Console):
    """stdout or stderr. A reader that has seen enough, such as `head`, is a BrokenPipeError; rich's own would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich where it meets one."""
        raise BrokenPipeError

"""How the demo looks: on a terminal a live view, elsewhere plain lines."""

import sys
from typing import Any

from rich.cells import cell_len
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from meshserve.cli.columns import Output
from meshserve.cli.demo.asking import Answered
from meshserve.cli.demo.children import Child
from meshserve.cli.demo.prompts import Question
from meshserve.cli.trace import PHASES

_FIGURES = ("PROMPT", "CACHED", "KV SENT", "TTFT", "TOKENS/S")
_INDENT = 11
_PLAIN_WIDTH = 110
"""Without a terminal."""


class View:
    """Prints to stdout."""

    def __init__(self) -> None:
        self.console = Output(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        self._live: Live | None = None
        self._all: list[Answered] = []
        self._paragraph = Paragraph(self.console.width, _INDENT)

    # --- peers becoming ready

    def begins(self, note: str) -> None:
        """Peers are about to be started; `note` says what takes long, if something does."""
        if self.console.is_terminal:
            self.console.print("\n[bold]meshserve[/]: a disaggregated mesh, every peer a process of its own, no broker\n")
        if note:
            self.console.print(f"{note}\n")

    def starting(self, children: list[Child]) -> None:
        """Called again and again until all are ready."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=20, transient=False)
            self._live.start()
        self._live.update(self._table(children))

    def _table(self, children: list[Child]) -> Table:
        table = _table("PEER", "ROLES", "", "ADDRESS")
        for child in children:
            state: Spinner | Text = Spinner("dots", text="starting")
            if child.ready_s is not None:
                state = Text(f"ready in {child.ready_s:.2f} s", "green")
            address = child.fields.get("address", "").removeprefix("tcp://")
            table.add_row(Text(child.name, "bold"), child.roles.replace(",", " "), state, address)
        return table

    def started(self, children: list[Child], seconds: float) -> None:
        """All are ready, and know each other."""
        if self._live is not None:
            self._live.update(self._table(children))
            self.close()
        else:
            self.console.print(self._table(children))
        self.console.print(f"\n{len(children)} peers found each other and serve after [bold]{seconds:.2f} s[/]\n")

    # --- prompts

    def asking(self, question: Question) -> None:
        """A prompt is about to be sent."""
        self.console.print(f"[bold]{len(self._all) + 1}. {question.title}[/]")
        self.console.print(Text.assemble("   prompt  ", (question.shown, "italic")))
        self.console.print("   answer  ", end="")
        self._paragraph = Paragraph(self.console.width, _INDENT)

    def text(self, text: str) -> None:
        """A piece of the answer, as it comes."""
        self._print_answer(self._paragraph.add(text))

    def _print_answer(self, text: str) -> None:
        if text:
            self.console.print(Text(text, "bold green"), end="", soft_wrap=True)

    def answered(self, answered: Answered) -> None:
        """The path that it took, and where its time went."""
        self._print_answer(self._paragraph.end())
        self.console.print()
        receipt, self._all = answered.receipt, [*self._all, answered]
        peers, kv, tokens = receipt["peers"], receipt["kv"], receipt["tokens"]
        path = Text.assemble("   path    ", (peers["frontend"] or "?", "bold"), " -> ", (peers["decode"] or "?", "bold"))
        if peers["prefill"]:
            path.append(" <- ").append(peers["prefill"], "bold")
            path.append(f"  {kv['blocks']} KV blocks, {kv['bytes'] / 1e6:.2f} MB")
        else:
            path.append("  prefilled locally")
        if tokens["cached"]:
            path.append(f", {tokens['cached']} of {tokens['prompt']} tokens cached")
        self.console.print(path)
        for chosen in receipt["candidates"][:1]:
            self.console.print(Text(f"   why     {chosen['peer']}: {chosen['reason']}"))
        self.console.print(self._bar(receipt))
        self.console.print()

    def _bar(self, receipt: dict[str, Any]) -> Text:
        total_ms = receipt["total_ms"] or 1.0
        width = max(10, min(40, self.console.width - 40))
        line = Text(f"   time    {total_ms:7.2f} ms ")
        spent = [(phase, style, receipt["phases_ms"].get(phase, 0.0)) for phase, (style, _) in PHASES.items()]
        if self.console.is_terminal:
            for _, style, took_ms in spent:
                line.append("█" * round(took_ms / total_ms * width), style)
            line.append("\n           ")
        for phase, style, took_ms in sorted(spent, key=lambda phase: -phase[2])[:4]:
            if took_ms >= total_ms * 0.05:
                line.append(f" {phase.replace('_', ' ')}", style).append(f" {took_ms:.2f}")
        return line

    def finished(self) -> None:
        """All answers in one table."""
        table = _table("", "DECODED BY", "PREFILLED BY", *_FIGURES)
        for number, answered in enumerate(self._all, 1):
            table.add_row(str(number), *_cells(answered))
        self.console.print(table)
        self.console.print(f"\n{len(self._all)} of {len(self._all)} prompts answered.")

    def serving(self, url: str, example: str, watching: str, joining: str) -> None:
        """What next; `example` is a request, `watching` the options that lead other commands into this mesh, `joining` how to add to it."""
        sections = {
            "Watch it, in a browser or here:": (f"{url}/", f"meshserve top {watching}"),
            "Ask it yourself:": (f"curl {url}{example}", f"meshserve trace --last {watching}", joining),
        }
        for title, commands in sections.items():
            self.console.print(Text(f"\n{title}", "bold"))
            for command in commands:
                self.console.print(Text(f"  {command}"), soft_wrap=True)
        self.console.print("\nCtrl-C ends it.")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in _FIGURES else "left")
    return table


def _cells(answered: Answered) -> tuple[str, ...]:
    peers, tokens, sent_bytes = answered.receipt["peers"], answered.receipt["tokens"], answered.receipt["kv"]["bytes"]
    return (
        peers["decode"] or "?",
        peers["prefill"] or "itself",
        str(tokens["prompt"]),
        str(tokens["cached"]),
        f"{sent_bytes / 1e6:.2f} MB" if sent_bytes else "-",
        f"{answered.ttft_s * 1000:,.0f} ms" if answered.ttft_s >= 0.01 else f"{answered.ttft_s * 1000:.1f} ms",
        f"{answered.tokens_per_s:,.0f}" if answered.tokens_per_s else "-",
    )


class Paragraph:
    """An answer that comes in pieces. Gives out each word once its end is known; lines after the first are indented."""

    def __init__(self, width: int, indent: int) -> None:
        """`width` and `indent` in columns; the first line begins at the indent, with what stands there already."""
        self._width, self._indent = max(10, width - indent), indent
        self._column = 0
        self._space = self._word = ""

    def add(self, text: str) -> str:
        """What is to be printed now. Spaces and empty lines before the first word are left out."""
        out = []
        for letter in text:
            if not letter.isspace():
                self._word += letter
                continue
            out.append(self.end())
            if self._column or self._space:
                self._space = "\n" if letter == "\n" or self._space == "\n" else " "
        return "".join(out)

    def end(self) -> str:
        """The last word."""
        word, space, self._word = self._word, self._space, ""
        if not word:
            return ""
        width = cell_len(word)
        if space == "\n" or (self._column and self._column + len(space) + width > self._width):
            space, self._column = "\n" + " " * self._indent, 0
        self._column += width + (len(space) if space == " " else 0)
        self._space = ""
        return space + word

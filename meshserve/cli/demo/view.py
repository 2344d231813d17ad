"""How the demo looks: on a terminal a live view, elsewhere plain lines."""

from typing import Any

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from meshserve.cli.demo.children import Child
from meshserve.cli.printing import Output

_PHASES = {
    "http": "blue",
    "process": "cyan",
    "route": "magenta",
    "queue": "yellow",
    "prefill": "green",
    "kv_transfer": "bright_red",
    "decode": "bright_green",
    "network": "bright_blue",
    "other": "bright_black",
}


class View:
    """Prints to stdout."""

    def __init__(self) -> None:
        self.console = Output(highlight=False, soft_wrap=False)
        self._live: Live | None = None
        if not self.console.is_terminal:
            self.console = Output(highlight=False, width=110)

    # --- peers becoming ready

    def starting(self, children: list[Child]) -> None:
        """Called again and again until all are ready."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            self.console.print("\n[bold]meshserve[/]: a disaggregated mesh, every peer a process of its own, no broker\n")
            self._live = Live(console=self.console, refresh_per_second=20, transient=False)
            self._live.start()
        self._live.update(self._table(children))

    def _table(self, children: list[Child]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("PEER", "ROLES", "", "ADDRESS"):
            table.add_column(column, no_wrap=True)
        for child in children:
            state: Any = Spinner("dots", text="starting") if child.ready_s is None else Text(f"ready in {child.ready_s:.2f} s", "green")
            table.add_row(
                Text(child.name, "bold"), child.roles.replace(",", " "), state, child.fields.get("address", "").removeprefix("tcp://")
            )
        return table

    def started(self, children: list[Child], seconds: float) -> None:
        """All are ready, and know each other."""
        if self._live is not None:
            self._live.update(self._table(children))
            self.close()
        else:
            for child in children:
                self.console.print(
                    f"{child.name:12} {child.roles:26} ready in {child.ready_s or 0:.2f} s  {child.fields.get('address', '')}"
                )
        self.console.print(f"\n{len(children)} peers found each other and serve after [bold]{seconds:.2f} s[/]\n")

    # --- prompts

    def asking(self, number: int, title: str, prompt: str) -> None:
        """A prompt is about to be sent."""
        shown = prompt if len(prompt) <= 48 else f"{prompt[:45]}..."
        self.console.print(f"[bold]{number}. {title}[/]")
        self.console.print(Text.assemble("   prompt  ", (shown, "italic"), (f"  ({len(prompt)} characters)", "dim")))
        self.console.print("   answer ", end="")

    def text(self, text: str) -> None:
        """A piece of the answer, as it comes."""
        self.console.print(Text(text, "bold green" if self.console.is_terminal else ""), end="")

    def answered(self, receipt: dict[str, Any]) -> None:
        """The path that it took, and where its time went."""
        self.console.print()
        peers, kv, tokens = receipt["peers"], receipt["kv"], receipt["tokens"]
        path = Text.assemble("   path    http -> ", (peers["frontend"] or "?", "bold"), " -> ", (peers["decode"] or "?", "bold"))
        if peers["prefill"]:
            path.append_text(Text.assemble(" <- ", (peers["prefill"], "bold"), f"  {kv['blocks']} KV blocks, {kv['bytes'] / 1e6:.2f} MB"))
        else:
            path.append("  prefilled locally")
        if tokens["cached"]:
            path.append(f", {tokens['cached']} of {tokens['prompt']} tokens cached")
        self.console.print(path)
        chosen = receipt["candidates"][0] if receipt["candidates"] else None
        if chosen:
            self.console.print(Text.assemble("   why     ", f"{chosen['peer']}: {chosen['reason']}"))
        self.console.print(self._bar(receipt))
        self.console.print()

    def _bar(self, receipt: dict[str, Any]) -> Text:
        total_ms = receipt["total_ms"] or 1.0
        width = max(10, min(40, self.console.width - 40))
        line = Text(f"   time    {total_ms:7.2f} ms ")
        spent = [(phase, receipt["phases_ms"].get(phase, 0.0)) for phase in _PHASES]
        if self.console.is_terminal:
            for phase, milliseconds in spent:
                line.append("█" * round(milliseconds / total_ms * width), _PHASES[phase])
            line.append("\n           ")
        shares = sorted((item for item in spent if item[1] >= total_ms * 0.05), key=lambda item: -item[1])[:4]
        for phase, milliseconds in shares:
            line.append(f" {phase.replace('_', ' ')}", _PHASES[phase] if self.console.is_terminal else "")
            line.append(f" {milliseconds:.2f}")
        return line

    def finished(self, url: str, model: str, num_answered: int, is_serving: bool, watching: str, joining: str) -> None:
        """What next; `watching` are the options that lead other commands into this mesh, `joining` is how to start more of it."""
        self.console.print(f"{num_answered} of {num_answered} prompts answered.")
        if not is_serving:
            return
        body = f'{{"model": "{model}", "prompt": "Hello", "max_tokens": 32, "stream": true}}'
        sections = {
            "Watch it, in a browser or here:": (f"{url}/", f"meshserve top {watching}"),
            "Ask it yourself:": (f"curl {url}/v1/completions -d '{body}'", f"meshserve trace --last {watching}", joining),
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

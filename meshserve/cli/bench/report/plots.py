"""Which plots a report has, by what was run."""

from collections.abc import Callable, Mapping, Sequence

from meshserve.cli.bench.compare import Compared
from meshserve.cli.bench.outcome import Outcome
from meshserve.cli.bench.report.svg import Axis, Plot, Points, axis_for
from meshserve.cli.bench.session import Run
from meshserve.cli.bench.sweep import Knee
from meshserve.cli.bench.tables import LABELS
from meshserve.cli.bench.tally import Second
from meshserve.telemetry import Histogram

_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_MAX_POINTS = 400


def plots(outcome: Outcome) -> list[str]:
    """As SVG figures; none where nothing was answered."""
    if not any(run.tally.num_done for run in outcome.runs):
        return []
    if outcome.kind == "compare":
        names = ["A", "B"]
        sides = [outcome.side_times(0), outcome.side_times(1)]
        found = [ratios(outcome.compared)] if outcome.compared else []
        found += _distributions(list(zip(names, sides, strict=True)))
        return [*found, turns(names, outcome.runs)]
    if outcome.knee is not None:
        found = [throughput_against_latency(outcome.runs, outcome.knee)]
        return found + _distributions([(run.label, run.tally.times) for run in outcome.runs])
    run = outcome.runs[0]
    return [all_distributions(run), *timeline(run), seconds(run)]


_KINDS = ("ttft", "itl", "e2e")


def _distributions(series: Sequence[tuple[str, Mapping[str, Histogram]]]) -> list[str]:
    """A plot for each kind of time that any of them has: without a stream there are no gaps."""
    kinds = [kind for kind in _KINDS if any(times[kind].count for _, times in series)]
    return [distribution(LABELS[kind], [(name, times[kind]) for name, times in series]) for kind in kinds]


def distribution(title: str, series: Sequence[tuple[str, Histogram]]) -> str:
    """Cumulative distributions of one kind of time."""
    known = [(name, _thinned(histogram)) for name, histogram in series if histogram.count]
    plot = Plot(f"{title}: distribution", axis_for((x for _, line in known for x, _ in line), "ms", is_log=True), _SHARE)
    for number, (name, line) in enumerate(known):
        colour = _COLOURS[number % len(_COLOURS)] + (" again" if number >= len(_COLOURS) else "")
        plot.line([(line[0][0], 0.0), *line] if line else [], colour, name, is_stepped=True)
    return plot.render()


_SHARE = Axis(0, 1, "share of all", is_share=True)


def all_distributions(run: Run) -> str:
    """Of all times of one run in one plot."""
    return distribution("latencies", [(LABELS[kind], run.tally.times[kind]) for kind in (*_KINDS, "queue")])


def _thinned(histogram: Histogram) -> list[tuple[float, float]]:
    steps = [(x, share) for x, share in histogram.steps() if x > 0] or [(1e-6, 1.0)]
    stride = max(1, len(steps) // _MAX_POINTS)
    return [*steps[::stride], steps[-1]]


def timeline(run: Run) -> list[str]:
    """What each second brought: rates, then latencies."""
    found = [(float(number), second) for number, second in _under_load(run)]

    def points(figure: Callable[[Second], float]) -> Points:
        return [(number, figure(second)) for number, second in found]

    rates = {
        "due": points(lambda second: second.num_due),
        "answered": points(lambda second: second.num_done),
        "failed": points(lambda second: second.num_errors),
    }
    if not any(second.num_errors for _, second in found):
        del rates["failed"]
    times = {
        "TTFT p50": points(lambda second: second.ttft.quantile_ms(0.5)),
        "TTFT max": points(lambda second: second.ttft.quantile_ms(1.0)),
        "E2E latency p50": points(lambda second: second.e2e.quantile_ms(0.5)),
        "E2E latency max": points(lambda second: second.e2e.quantile_ms(1.0)),
    }
    return [
        _by_second("requests in each second", "requests", rates, ("c0", "c1", "c4")),
        _by_second("latency in each second", "ms", times, _COLOURS, is_log=True),
    ]


def _by_second(
    title: str,
    unit: str,
    lines: Mapping[str, Points],
    colours: Sequence[str],
    is_log: bool = False,
) -> str:
    known = [point for line in lines.values() for point in line]
    x = axis_for([*(x for x, _ in known), 1.0], "seconds")
    plot = Plot(title, x, axis_for((y for _, y in known), unit, is_log=is_log))
    for colour, (name, line) in zip(colours, lines.items(), strict=False):
        plot.line(line, colour, name)
    return plot.render()


def _under_load(run: Run) -> list[tuple[int, Second]]:
    """Without what came after the window, when no more was sent."""
    tally = run.tally
    return [(number, second) for number, second in sorted(tally.seconds.items()) if tally.ends_s is None or number < tally.window_s]


def seconds(run: Run) -> str:
    """Each second of a run as a dot: its throughput and its latency."""
    found = [(number, second) for number, second in _under_load(run) if second.e2e.count]
    points = [(float(second.num_done), second.e2e.quantile_ms(0.5)) for _, second in found]
    titles = [f"second {number}" for number, _ in found]
    return _dots("throughput against latency, each second", "answers in a second", {"": points}, titles)


def throughput_against_latency(runs: Sequence[Run], knee: Knee) -> str:
    """Each step of a sweep, with the knee."""
    throughputs = [run.tally.requests_per_s for run in runs]
    lines = {name: [run.tally.times["e2e"].quantile_ms(share) for run in runs] for name, share in (("p50", 0.5), ("p99", 0.99))}
    x, y = axis_for(throughputs, "requests/s"), axis_for((y for line in lines.values() for y in line), "E2E latency, ms", is_log=True)
    plot = Plot("throughput against latency", x, y)
    for colour, (name, line) in zip(_COLOURS, lines.items(), strict=False):
        points = list(zip(throughputs, line, strict=True))
        plot.line(points, colour, name)
        plot.dots(points, colour, titles=[run.label for run in runs])
    word = runs[knee.index].label
    plot.mark(throughputs[knee.index], lines["p50"][knee.index], f"knee: {word}" if knee.is_inside else f"{word}, no knee yet")
    return plot.render()


def turns(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Each turn of a comparison as a dot."""
    points = [(run.tally.requests_per_s, run.tally.times["e2e"].quantile_ms(0.5)) for run in runs]
    sides = {name: points[side::2] for side, name in enumerate(names)}
    return _dots("throughput against latency, each turn", "requests/s", sides)


def _dots(title: str, x_label: str, sides: Mapping[str, Points], titles: Sequence[str] = ()) -> str:
    known = [point for side in sides.values() for point in side]
    x = axis_for((x for x, _ in known), x_label, is_from_zero=False)
    plot = Plot(title, x, axis_for((y for _, y in known), "E2E latency p50, ms", is_from_zero=False))
    for colour, (name, side) in zip(_COLOURS, sides.items(), strict=False):
        plot.dots(side, colour, name, titles)
    return plot.render()


def ratios(compared: Sequence[Compared]) -> str:
    """The interval of each figure's ratio."""
    x = axis_for([1.0, *(end for one in compared for end in (one.ratio.low, one.ratio.high))], "B / A", is_log=True)
    plot = Plot("B to A, with 95 % intervals", x, Axis(-0.6, len(compared) - 0.4, ""), height=60 + 26 * len(compared))
    plot.vertical(1.0)
    names = []
    for row, one in enumerate(reversed(compared)):
        ratio = one.ratio
        plot.interval(ratio.low, ratio.high, ratio.median, float(row), "c1" if ratio.is_different else "c0")
        names.append((float(row), _short(one.name)))
    return plot.render(names)


def _short(name: str) -> str:
    return name.replace("end-to-end", "e2e").replace("output tokens", "tokens")

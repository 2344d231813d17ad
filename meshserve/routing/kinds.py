"""How fast workers are: by what each measured, and by what the others of its kind measured. Pure."""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from meshserve.routing.workers import LoadForecast, Rates, Worker

_ALIKE = 1.5
"""Times within this factor are taken for equal: the prompts that a worker happened to see make as much difference, and say
nothing about its speed. Workers that are taken for equal get equal shares, to the last request; lower lets noise
choose between them, higher sends more to those that are slower."""
_ALIKE_MS = 0.2
"""The same of the shortest times, of which the operating system's share is large."""

_ENOUGH_MEASURED = 8
"""Prompts after which a worker's figures count for its kind, unless no worker of the kind has as many."""
_SURE_MEASURED = 100
"""Prompts after which figures are as sure as they get. Higher asks slower workers less often, and
finds out later that they are slow no more."""

_REFRESH_S = 0.25
"""Between two looks at all workers of a kind. Lower follows changes sooner, and costs some microseconds for each
worker each time."""
_FOLLOW = 0.02
"""Weight of the newest in a running mean: it follows the last fifty reports."""


class Kind:
    """The workers of one engine and model.

    Until its own figures say otherwise, a worker is as fast as the fastest of its kind, and those that are
    about as fast as them. A worker that joins is so asked at once, at its turn among equals. Nothing else
    would do where one request runs at a time: a worker that was held to be slower than the others, if by a
    little, would never be asked, and never measure that it is not.

    Figures by which a worker is slower are believed for a number of choices, which grows with the prompts that
    they are of and with the factor by which the worker is slower. Then the worker counts as one of its kind
    again, until its next report. If it was always slower, asking it costs one part in `_SURE_MEASURED` of all time.
    """

    def __init__(self) -> None:
        self.rates = Rates()
        """Of those workers, or a guess before any worker measured its own."""
        self.num_choices = 0
        """Among workers of this kind."""
        self._workers: dict[str, Worker] = {}
        self._heard_at: dict[str, int] = {}
        """By incarnation: the number of choices at its last report."""
        self._mean_used_blocks = 0.0
        self._refreshed_s = 0.0

    def join(self, worker: Worker) -> None:
        """From now on it is one of this kind."""
        self._workers[worker.incarnation] = worker
        worker.rates, worker.breakdown = self.rates, None

    def leave(self, incarnation: str) -> None:
        """It is gone. What it measured counts until the others measure again."""
        del self._workers[incarnation]
        self._heard_at.pop(incarnation, None)

    def __len__(self) -> int:
        return len(self._workers)

    def measured(self, worker: Worker, is_first: bool, forecast: LoadForecast, now_s: float) -> None:
        """A worker's load has figures of its speed. `is_first`: its load had none of its prefill, or none of its
        decode steps, until now.
        """
        self._heard_at[worker.incarnation] = self.num_choices
        self._mean_used_blocks += (worker.load.used_blocks - self._mean_used_blocks) * _FOLLOW
        if not is_first and now_s - self._refreshed_s < _REFRESH_S:
            self._decide(worker, forecast)
            return
        self._refreshed_s = now_s
        self.rates = self._rates_of_the_fastest(forecast)
        for other in self._workers.values():
            self._decide(other, forecast)

    def _rates_of_the_fastest(self, forecast: LoadForecast) -> Rates:
        """Of prefill and of decode steps apart: a worker may do only one of them, on hardware that suits it."""
        found, workers = self.rates, list(self._workers.values())
        computing = [worker for worker in workers if worker.load.prefill_ns_per_token]
        if computing:
            num_tokens = _num_tokens(forecast)
            rates = self._mean_of_fastest(computing, lambda rates: rates.prefill_ms(num_tokens))
            base_ms, token_ms = rates.prefill_base_ms, rates.prefill_ms_per_token
            found = replace(found, prefill_base_ms=base_ms, prefill_ms_per_token=token_ms)
        decoding = [worker for worker in workers if worker.load.decode_base_us]
        if decoding:
            used_blocks = round(self._mean_used_blocks)
            rates = self._mean_of_fastest(decoding, lambda rates: rates.decode_ms(used_blocks))
            base_ms, block_ms = rates.decode_base_ms, rates.decode_ms_per_block
            found = replace(found, decode_base_ms=base_ms, decode_ms_per_block=block_ms)
        handoffs_ns = [ns for worker in workers if (ns := worker.load.handoff_ns_per_token)]
        return replace(found, handoff_ms_per_token=fmean(handoffs_ns) / 1e6) if handoffs_ns else found

    def _mean_of_fastest(self, workers: list[Worker], time_ms: Callable[[Rates], float]) -> Rates:
        """Of those that are about as fast as the fastest of which enough is known, each by how much is known of it."""
        rates = [Rates.reported(worker.load, self.rates) for worker in workers]
        times_ms = list(map(time_ms, rates))
        nums_measured = list(map(_num_measured, workers))
        known_ms = [ms for ms, num in zip(times_ms, nums_measured, strict=True) if num >= _ENOUGH_MEASURED]
        least_ms = min(known_ms or times_ms)
        total, mean = 0, self.rates
        for own, own_ms, num_measured in zip(rates, times_ms, nums_measured, strict=True):
            if _is_like(own_ms, least_ms):
                total += num_measured
                mean = mean.towards(own, num_measured / total)
        return mean

    def _decide(self, worker: Worker, forecast: LoadForecast) -> None:
        """Whether a worker has rates of its own, or those of its kind."""
        own, kind = Rates.reported(worker.load, self.rates), self.rates
        num_tokens, used_blocks = _num_tokens(forecast), round(self._mean_used_blocks)
        prompts_ms = own.prefill_ms(num_tokens), kind.prefill_ms(num_tokens)
        steps_ms = own.decode_ms(used_blocks), kind.decode_ms(used_blocks)
        worker.breakdown, worker.rates = None, kind
        if _is_like(*prompts_ms) and _is_like(*steps_ms):
            return
        factor = max(own_ms / max(kind_ms, _ALIKE_MS) for own_ms, kind_ms in (prompts_ms, steps_ms))
        num_choices = self.num_choices - self._heard_at.get(worker.incarnation, 0)
        if num_choices <= _num_measured(worker) * (factor - 1):
            worker.rates = own


def _num_measured(worker: Worker) -> int:
    """Prompts that a worker's figures are of. A worker of an earlier version does not say: it is believed."""
    return min(_SURE_MEASURED, worker.load.num_measured or _SURE_MEASURED)


def _num_tokens(forecast: LoadForecast) -> int:
    """At which prompts are compared: lines through the times of short prompts say nothing of long ones."""
    return max(1, round(forecast.mean_uncached_tokens))


def _is_like(one_ms: float, other_ms: float) -> bool:
    return max(one_ms, other_ms) <= _ALIKE * min(one_ms, other_ms) + _ALIKE_MS

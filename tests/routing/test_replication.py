"""Rent or buy: when a prefix gets a second home."""

from hypothesis import given
from hypothesis import strategies as st

from meshserve.routing.demand import Replication


def test_a_copy_is_made_once_the_rent_has_reached_its_price() -> None:
    replication = Replication()
    answers = [replication.is_due(7, rent_ms=10.0, price_ms=35.0) for _ in range(5)]
    assert answers == [False] * 4 + [True]


def test_the_next_copy_of_a_prefix_in_demand_is_made_sooner() -> None:
    replication = Replication()
    answers = [replication.is_due(7, rent_ms=10.0, price_ms=35.0) for _ in range(20)]
    bought = [number for number, answer in enumerate(answers) if answer]
    gaps = [later - earlier for earlier, later in zip([-1, *bought], bought, strict=False)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < gaps[0]


def test_prefixes_pay_their_own_rent() -> None:
    replication = Replication()
    assert not any(replication.is_due(prefix, rent_ms=30.0, price_ms=35.0) for prefix in range(100))


def test_rent_that_was_paid_a_cache_lifetime_ago_is_worth_nothing() -> None:
    replication = Replication()
    for _ in range(4):
        replication.is_due(7, rent_ms=10.0, price_ms=35.0)
    replication.evicted(1.0)
    assert not replication.is_due(7, rent_ms=10.0, price_ms=35.0)


@given(st.lists(st.floats(0, 100), max_size=200), st.floats(1, 1000))
def test_rent_and_price_are_at_most_twice_what_knowing_the_demand_would_cost(rents: list[float], price_ms: float) -> None:
    replication, paid_ms = Replication(), 0.0
    for rent_ms in rents:
        if replication.is_due(7, rent_ms, price_ms):
            paid_ms += price_ms
            break  # from here on there is a copy, and nobody waits
        paid_ms += rent_ms
    best_ms = min(sum(rents), price_ms)
    assert paid_ms <= 2 * best_ms + max(rents, default=0.0) + 1e-6

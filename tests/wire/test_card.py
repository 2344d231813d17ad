"""Model cards on the wire."""

from typing import Any

import pytest

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import ProtocolError
from meshserve.wire.card import MAX_ALIASES, ModelCard
from meshserve.wire.frames import pack_body, unpack_body
from meshserve.wire.generation import SamplingDefaults
from meshserve.wire.structs import replace

CARD = DummyEngine(EngineOptions()).card


def test_a_card_arrives_with_all_its_names() -> None:
    card = CARD.served_as(("first", "second", "third"))
    arrived = ModelCard.from_wire(unpack_body(pack_body(card.to_wire())))
    assert arrived.model == "first" and arrived.names == ("first", "second", "third")


def test_cards_that_differ_in_more_names_alone_are_equal() -> None:
    assert CARD.served_as(("dummy", "other")) == CARD == CARD.served_as(())
    assert CARD.served_as(("other", "dummy")) != CARD


def test_a_card_of_an_older_peer_has_one_name() -> None:
    older = CARD.to_wire()
    older.pop("aliases", None)
    assert ModelCard.from_wire(older).names == ("dummy",)


def test_sampling_defaults_arrive_and_those_that_an_older_peer_leaves_out_ask_for_nothing() -> None:
    defaults = SamplingDefaults(0.7, 0.9, 40, 0.05, 1.1)
    card = replace(CARD, sampling_defaults=defaults)
    wire = unpack_body(pack_body(card.to_wire()))
    assert ModelCard.from_wire(wire).sampling_defaults == defaults
    for name in ("min_p", "repetition_penalty"):
        del wire["sampling_defaults"][name]
    assert ModelCard.from_wire(wire).sampling_defaults == SamplingDefaults(0.7, 0.9, 40)


@pytest.mark.parametrize(
    "defaults",
    [
        *({name: value} for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty") for value in ("1", True, None, -1)),
        *({"top_p": 0}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"top_k": 1.5}, {"temperature": float("nan")}),
        *([], "x"),
    ],
)
def test_sampling_defaults_that_no_sampler_can_use_are_refused(defaults: Any) -> None:
    with pytest.raises(ProtocolError):
        ModelCard.from_wire({**CARD.to_wire(), "sampling_defaults": defaults})


@pytest.mark.parametrize("aliases", ["name", [1], None, ["x"] * (MAX_ALIASES + 1)])
def test_malformed_names_are_refused(aliases: Any) -> None:
    with pytest.raises(ProtocolError):
        ModelCard.from_wire({**CARD.to_wire(), "aliases": aliases})

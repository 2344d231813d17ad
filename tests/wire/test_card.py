"""Model cards on the wire."""

from typing import Any

import pytest

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import ProtocolError
from meshserve.wire.card import MAX_ALIASES, ModelCard
from meshserve.wire.frames import pack_body, unpack_body

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
    del older["aliases"]
    assert ModelCard.from_wire(older).names == ("dummy",)


@pytest.mark.parametrize("aliases", ["name", [1], None, ["x"] * (MAX_ALIASES + 1)])
def test_malformed_names_are_refused(aliases: Any) -> None:
    with pytest.raises(ProtocolError):
        ModelCard.from_wire({**CARD.to_wire(), "aliases": aliases})

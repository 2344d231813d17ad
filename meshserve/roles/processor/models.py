"""What a processor needs of each model in the mesh: its card and its tokenizer."""

from meshserve.engines.tokenizers import Tokenizer, load_tokenizer
from meshserve.errors import ModelNotFound, NoWorker
from meshserve.mesh.mesh import Mesh
from meshserve.wire.card import ModelCard


class Models:
    """The models that live decode workers serve."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._tokenizers: dict[str, Tokenizer] = {}

    def card(self, model: str) -> ModelCard:
        """Raises NoWorker if there is no decode worker at all, ModelNotFound if none serves this model."""
        cards = [info.card for info in self._mesh.peers_with("decode") if info.card is not None]
        for card in cards:
            if card.model == model:
                return card
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        names = ", ".join(sorted({card.model for card in cards}))
        raise ModelNotFound(f"the model {model!r} is not served here; there are: {names}", param="model")

    def tokenizer(self, card: ModelCard) -> Tokenizer:
        """Loaded once for each model."""
        tokenizer = self._tokenizers.get(card.model_hash)
        if tokenizer is None:
            tokenizer = self._tokenizers[card.model_hash] = load_tokenizer(card)
        return tokenizer

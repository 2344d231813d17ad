"""What a processor needs of each model in the mesh: its card, its tokenizer, and prompts made of requests."""

from array import array

from meshserve.engines.tokenizers import Tokenizer, load_tokenizer
from meshserve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NoWorker
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.templating import render_chat
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.generation import Sampling


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

    def encode(self, request: CompletionRequest, card: ModelCard) -> "array[int]":
        """The prompt's tokens. Raises InvalidRequest for an empty one, ContextLengthExceeded for one that leaves no room."""
        if request.kind == "chat":
            tokens = self.tokenizer(card).encode(render_chat(card.chat_template, request.messages or []))
        elif isinstance(request.prompt, str):
            tokens = self.tokenizer(card).encode(request.prompt)
        else:
            tokens = array("I", request.prompt or ())
        param = "messages" if request.kind == "chat" else "prompt"
        if not tokens:
            raise InvalidRequest("the prompt is empty", param=param)
        wanted = request.max_tokens or 1
        if len(tokens) + wanted > card.context_length:
            raise ContextLengthExceeded(
                f"this model's context is {card.context_length} tokens; {len(tokens)} of prompt and {wanted} of completion are too many",
                param=param,
            )
        return tokens

    @staticmethod
    def sampling(request: CompletionRequest, card: ModelCard, num_prompt_tokens: int, drawn_seed: int) -> Sampling:
        """What the client left open is filled in by the model's card, the room that is left, and a seed that was drawn for it."""
        return Sampling(
            max_tokens=request.max_tokens if request.max_tokens is not None else card.context_length - num_prompt_tokens,
            min_tokens=request.min_tokens,
            temperature=request.temperature if request.temperature is not None else card.default_temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed if request.seed is not None else drawn_seed,
            ignore_eos=request.ignore_eos,
        )

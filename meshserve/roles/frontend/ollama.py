"""Ollama's API without completions: the lists of models, and the routes that are not supported."""

import time
from typing import Any

from meshserve import __version__
from meshserve.errors import ModelNotFound, Unsupported
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.models.ollama import LATEST, parse_embed, parse_show
from meshserve.roles.frontend.models.reading import read_json
from meshserve.roles.frontend.ollama_writers import opening_of, time_text
from meshserve.roles.frontend.routes import Routes, json_response
from meshserve.wire.card import ModelCard
from meshserve.wire.generation import SamplingDefaults
from meshserve.wire.structs import asdict

Json = dict[str, Any]

SPOKEN_VERSION = "0.12.11"
"""Version of Ollama with the same API: programs check it for features."""
_FOREVER = "2300-01-01T00:00:00Z"
"""When a model will be unloaded. Ollama writes a year near this one; later ones overflow in some clients."""
_ARCHITECTURE = "meshserve"
"""Under this name programs look for a model's context length."""
_TOOLS = {"tools", "tool_text"}


def loaded(completions: Completions, model: str, nothing: Json) -> Response:
    """The answer to a request for a model to be loaded, or unloaded: all are loaded. Raises ModelNotFound."""
    _card(completions, model)
    told = {**opening_of(model, int(time.time())), **nothing, "done": True, "done_reason": "load"}
    return json_response(told)


def _card(completions: Completions, model: str) -> ModelCard:
    """Of the model that a client calls so. Raises ModelNotFound."""
    serving = completions.mesh.peers_serving("decode", completions.served_name(model))
    if not serving or serving[0].card is None:
        raise ModelNotFound(f"the model {model[:64]!r} is not served here", param="model")
    return serving[0].card


class OllamaModels:
    """The routes."""

    def __init__(self, completions: Completions, started_s: int) -> None:
        self._completions, self._started = completions, time_text(started_s)

    def add_routes(self, routes: Routes) -> None:
        """To the frontend's table."""
        routes.add("GET", "/api/version", lambda request: json_response(_VERSION))
        routes.add("GET", "/api/tags", lambda request: json_response({"models": self._listed({"modified_at": self._started})}))
        routes.add("GET", "/api/ps", lambda request: json_response({"models": self._listed({"expires_at": _FOREVER})}))
        routes.add_async("POST", "/api/show", self._show)
        routes.add_async("POST", "/api/embed", self._embed)
        routes.add_async("POST", "/api/embeddings", self._embed)

    def _listed(self, more: Json) -> list[Json]:
        """One entry for each name of a model."""
        infos = self._completions.mesh.peers_with("decode")
        cards = {name: info.card for info in infos if info.card is not None for name in info.card.names}
        return [{**_entry(name, card), **more} for name, card in cards.items()]

    async def _show(self, request: Request) -> Response:
        name = await read_json(request.body, parse_show)
        card = _card(self._completions, name)
        capabilities = ["completion", *(["tools"] if _TOOLS.intersection(card.features) else [])]
        return json_response({**_shown(card), "capabilities": capabilities, "modified_at": self._started})

    async def _embed(self, request: Request) -> Response:
        _card(self._completions, await read_json(request.body, parse_embed))
        raise Unsupported("no engine here makes embeddings", param="model")


_VERSION = {"version": SPOKEN_VERSION, "meshserve": __version__}
_DETAILS = {
    **dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), ""),
    "families": [],
}
"""Of which model cards say nothing."""


def _entry(name: str, card: ModelCard) -> Json:
    """A name has a tag in this API; sizes are not known."""
    tagged = name if ":" in name else name + LATEST
    sizes = {"size": 0, "size_vram": 0, "context_length": card.context_length}
    return {"name": tagged, "model": tagged, **sizes, "digest": card.model_hash, "details": _DETAILS}


def _shown(card: ModelCard) -> Json:
    defaults, plain = asdict(card.sampling_defaults), asdict(SamplingDefaults())
    parameters = [f"{name} {value}" for name, value in defaults.items() if value != plain[name]]
    info = {
        "general.architecture": _ARCHITECTURE,
        "general.basename": card.model,
        f"{_ARCHITECTURE}.context_length": card.context_length,
    }
    return {
        "modelfile": f"FROM {card.model}\n",
        "parameters": "\n".join(parameters),
        "template": card.chat_template,
        "details": _DETAILS,
        "model_info": info,
    }

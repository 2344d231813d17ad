"""The routes that only count: `/tokenize`, `/detokenize`, and Anthropic's count of a message's tokens."""

from typing import Any

from meshserve.config import ServeConfig
from meshserve.errors import MeshserveError
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend import anthropic_writers
from meshserve.roles.frontend.asgi import ClientGone, Receive, Scope, Send, error_headers, send_whole
from meshserve.roles.frontend.bodies import read_json
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.models.anthropic import parse_count
from meshserve.roles.frontend.models.chat import parse_tokenize
from meshserve.roles.frontend.models.completions import parse_detokenize
from meshserve.roles.frontend.shapes import dump, error_body
from meshserve.wire.completion import CompletionRequest, Tokenized, TokenizeRequest
from meshserve.wire.messages import DETOKENIZE, TOKENIZE, Method
from meshserve.wire.structs import Message

_TIMEOUT_S = 30.0
"""Tokenizing takes a processor milliseconds; one that does not answer is lost."""
_JSON = [(b"content-type", b"application/json")]


class Tokenizing:
    """Asks a processor, which has the tokenizers."""

    def __init__(self, mesh: Mesh, config: ServeConfig, completions: Completions) -> None:
        self._mesh, self._config, self._completions = mesh, config, completions

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /tokenize`: `{"prompt"}` or `{"messages"}` to tokens."""
        await self._serve(receive, send, self._tokens_of, error_body)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /detokenize`: `{"tokens"}` to text."""
        await self._serve(receive, send, self._text_of, error_body)

    async def count_message(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/messages/count_tokens`."""
        await self._serve(receive, send, self._count_of, anthropic_writers.error_body)

    async def _serve(self, receive: Receive, send: Send, answer: Any, error_body: Any) -> None:
        try:
            shape = await answer(await read_json(receive, self._config.max_body_bytes))
            await send_whole(send, 200, dump(shape).encode(), _JSON)
        except ClientGone:
            self._mesh.counters.add("clients_gone")
        except MeshserveError as error:
            await send_whole(send, error.http_status, error_body(error), error_headers(error))

    async def _tokens_of(self, body: bytes) -> dict[str, Any]:
        request, wants_texts = parse_tokenize(body, self._completions.new_id())
        request.model = request.model or self._completions.first_model()
        found = await self._tokenize(request, wants_texts)
        shape = {"count": len(found.tokens), "max_model_len": found.context_length, "tokens": list(found.tokens)}
        return {**shape, "token_strs": found.texts() if wants_texts else None}

    async def _count_of(self, body: bytes) -> dict[str, Any]:
        found = await self._tokenize(parse_count(body, self._completions.new_id()), False)
        return {"input_tokens": len(found.tokens)}

    async def _text_of(self, body: bytes) -> dict[str, Any]:
        request = parse_detokenize(body)
        request.model = request.model or self._completions.first_model()
        return {"prompt": await self._ask(DETOKENIZE, request)}

    async def _tokenize(self, request: CompletionRequest, wants_texts: bool) -> Tokenized:
        found: Tokenized = await self._ask(TOKENIZE, TokenizeRequest(request, wants_texts))
        return found

    async def _ask(self, method: Method, body: Message) -> Any:
        return await self._mesh.call(self._completions.processor(), method, body, _TIMEOUT_S)


def hot_routes(completions: Completions, tokenizing: Tokenizing) -> dict[str, Any]:
    """Everything that is asked of models with POST."""
    return {
        **{path: completions.route(path) for path in completions.apis},
        "/v1/messages/count_tokens": tokenizing.count_message,
        "/tokenize": tokenizing.tokenize,
        "/detokenize": tokenizing.detokenize,
    }

"""The routes that only count: `/tokenize`, `/detokenize`, and the counts of OpenAI's responses and of Anthropic's messages."""

import asyncio
from typing import Any

from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.kept_responses import KeptResponses
from meshserve.roles.frontend.models.anthropic import parse_count
from meshserve.roles.frontend.models.chat import parse_tokenize
from meshserve.roles.frontend.models.completions import parse_detokenize
from meshserve.roles.frontend.models.fields import header_line
from meshserve.roles.frontend.models.reading import read_json
from meshserve.roles.frontend.models.responses import parse_response
from meshserve.roles.frontend.routes import Routes, json_response
from meshserve.wire.completion import Tokenized, TokenizeRequest
from meshserve.wire.messages import DETOKENIZE, TOKENIZE, Method
from meshserve.wire.structs import Message, replace

_TIMEOUT_S = 30.0
"""Tokenizing takes a processor milliseconds; one that does not answer is lost."""


class Tokenizing:
    """Asks a processor, which has the tokenizers."""

    def __init__(self, mesh: Mesh, completions: Completions, kept: KeptResponses) -> None:
        self._mesh, self._completions, self._kept = mesh, completions, kept

    def add_routes(self, routes: Routes) -> None:
        """To the frontend's table."""
        routes.add_async("POST", "/tokenize", self._tokens_of)
        routes.add_async("POST", "/detokenize", self._text_of)
        routes.add_async("POST", "/v1/messages/count_tokens", self._count_of)
        routes.add_async("POST", "/v1/responses/input_tokens", self._count_of_input)

    async def _tokens_of(self, http: Request) -> Response:
        """`{"prompt"}` or `{"messages"}` to tokens."""
        request, wants_texts = await read_json(http.body, lambda body: parse_tokenize(body, self._completions.new_id()))
        request.model = request.model or self._completions.first_model()
        found: Tokenized = await self._ask(TOKENIZE, TokenizeRequest(request, wants_texts))
        shape = {"count": len(found.tokens), "max_model_len": found.context_length, "tokens": list(found.tokens)}
        return json_response({**shape, "token_strs": found.texts() if wants_texts else None})

    async def _count_of(self, http: Request) -> Response:
        """Anthropic's count of a message's tokens."""
        request, options = await read_json(http.body, lambda body: parse_count(body, self._completions.new_id()))
        if options.ignored:
            http.extra_headers += header_line(options.ignored)
        found: Tokenized = await self._ask(TOKENIZE, TokenizeRequest(request))
        return json_response({"input_tokens": len(found.tokens)})

    async def _count_of_input(self, http: Request) -> Response:
        """OpenAI's count of what a response would be an answer to, with what its request refers to."""
        before = await self._kept.referred_to(http)
        request_id = self._completions.new_id()
        request, options = await asyncio.to_thread(parse_response, http.body, request_id, "", before)
        if options.ignored:
            http.extra_headers += header_line(options.ignored)
        found: Tokenized = await self._ask(TOKENIZE, TokenizeRequest(replace(request, keep=None)))
        return json_response({"object": "response.input_tokens", "input_tokens": len(found.tokens)})

    async def _text_of(self, http: Request) -> Response:
        """`{"tokens"}` to text."""
        request = await read_json(http.body, parse_detokenize)
        request.model = request.model or self._completions.first_model()
        return json_response({"prompt": await self._ask(DETOKENIZE, request)})

    async def _ask(self, method: Method, body: Message) -> Any:
        return await self._mesh.call(self._completions.processor(), method, body, _TIMEOUT_S)

"""The APIs that complete: how each is parsed, written, and told an error. One table, read by one driver."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from meshserve.errors import MeshserveError
from meshserve.roles.frontend import anthropic_writers, ollama_writers, responses_writers
from meshserve.roles.frontend.http.messages import JSON, Response
from meshserve.roles.frontend.kept_items import PREFIX
from meshserve.roles.frontend.models import anthropic, chat, completions, ollama, responses
from meshserve.roles.frontend.openai_writers import ChatChunkWriter, ChunkWriter, LineWriter, WholeChat, WholeCompletion
from meshserve.roles.frontend.shapes import error_body
from meshserve.roles.frontend.writers import Api, Parse


class ErrorShape(NamedTuple):
    """How clients of some routes expect an error."""

    name: str
    """In the OpenAPI document; that of all other routes has none."""
    prefix: str
    """Of the routes' paths."""
    body: Callable[[MeshserveError], bytes]


OPENAI_ERRORS = ErrorShape("", "/", error_body)
ANTHROPIC_ERRORS = ErrorShape("Anthropic", "/v1/messages", anthropic_writers.error_body)
OLLAMA_ERRORS = ErrorShape("Ollama", "/api/", ollama_writers.error_body)
ERROR_SHAPES = (ANTHROPIC_ERRORS, OLLAMA_ERRORS, OPENAI_ERRORS)
"""The first one whose prefix a path has counts."""

COMPLETIONS = Api("/v1/completions", "cmpl-", completions.parse_completion, ChunkWriter, WholeCompletion)
CHATS = Api("/v1/chat/completions", "chatcmpl-", chat.parse_chat, ChatChunkWriter, WholeChat)
RESPONSES = Api(
    "/v1/responses",
    PREFIX,
    responses.parse_response,
    responses_writers.ResponseEvents,
    responses_writers.WholeResponse,
    params=responses.PARAMS,
)
MESSAGES = Api(
    "/v1/messages",
    "msg_",
    anthropic.parse_message,
    anthropic_writers.MessageEvents,
    anthropic_writers.WholeMessage,
    anthropic_writers.error_body,
    anthropic.PARAMS,
)


APIS = (COMPLETIONS, CHATS, RESPONSES, MESSAGES)


def lines(parse: Parse) -> Api:
    """`/generate`, whose parser must know the first model there is."""
    return Api("/generate", "", parse, LineWriter, LineWriter)


def ollama_chats(served: ollama.Served) -> Api:
    """`/api/chat`, whose parser must know the names of models."""
    return Api(
        "/api/chat",
        "",
        partial(ollama.parse_chat, served=served),
        ollama_writers.MessageLines,
        ollama_writers.WholeMessage,
        ollama_writers.error_body,
        ollama.CHAT_PARAMS,
    )


def ollama_prompts(served: ollama.Served) -> Api:
    """`/api/generate`, likewise."""
    return Api(
        "/api/generate",
        "",
        partial(ollama.parse_generate, served=served),
        ollama_writers.ResponseLines,
        ollama_writers.WholeResponse,
        ollama_writers.error_body,
        ollama.GENERATE_PARAMS,
    )


def error_body_for(path: str, error: MeshserveError) -> bytes:
    """The error as clients of this route expect it."""
    return error_shape_of(path).body(error)


def error_shape_of(path: str) -> ErrorShape:
    """What errors of this route look like."""
    return next((shape for shape in ERROR_SHAPES if path.startswith(shape.prefix)), OPENAI_ERRORS)


def error_headers(error: MeshserveError) -> bytes:
    """Headers of an error's response: when to come back, if that is known, and how to send a key, if none was sent."""
    headers = JSON
    if error.http_status in (429, 503):
        headers += b"retry-after: %d\r\n" % max(1, math.ceil(getattr(error, "retry_after_s", 1.0)))
    if error.http_status == 401:
        headers += b"www-authenticate: Bearer\r\n"
    return headers


def error_response(path: str, error: MeshserveError) -> Response:
    """The whole response to a request that failed, as clients of this route expect it."""
    return Response(error.http_status, error_body_for(path, error), error_headers(error))

"""The APIs that complete: how each is parsed, written, and told an error. One table, read by one driver."""

from collections.abc import Callable
from dataclasses import dataclass, field

from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.roles.frontend import anthropic_writers, responses_writers
from meshserve.roles.frontend.models import anthropic, chat, completions, responses
from meshserve.roles.frontend.models.common import Parsed, ResponseOptions
from meshserve.roles.frontend.openai_writers import ChatChunkWriter, ChunkWriter, LineWriter, WholeChat, WholeCompletion
from meshserve.roles.frontend.shapes import error_body
from meshserve.roles.frontend.writers import Reply, Writer
from meshserve.wire.completion import CompletionRequest

Parse = Callable[[bytes, str, str], Parsed]
"""Body, the mesh's name of the request, the client's; raises InvalidRequest that names the field."""
ANTHROPIC_PREFIX = "/v1/messages"
"""Of the routes whose errors are Anthropic's."""


@dataclass(frozen=True, slots=True)
class Api:
    """One way of asking for completions."""

    path: str
    prefix: str
    """Of the response's id."""
    parse: Parse
    events: Callable[[Reply], Writer]
    whole: Callable[[Reply], Writer]
    error_body: Callable[[MeshserveError], bytes] = error_body
    params: dict[str, str] = field(default_factory=dict)
    """How this API calls what a processor finds fault with, where it has another name."""

    def writer(self, created_s: int, request: CompletionRequest, options: ResponseOptions) -> Writer:
        """Of the answer, streamed or whole. The response's id has the mesh's name of the request in it."""
        name = request.request_id if self.prefix.endswith("-") else request.request_id.replace("-", "")
        reply = Reply(self.prefix + name, created_s, request, options)
        return self.events(reply) if options.is_stream else self.whole(reply)

    def named(self, error: MeshserveError) -> MeshserveError:
        """The error, with the field's name as this API has it."""
        if isinstance(error, InvalidRequest) and error.param in self.params:
            error.param = self.params[error.param]
        return error


COMPLETIONS = Api("/v1/completions", "cmpl-", completions.parse_completion, ChunkWriter, WholeCompletion)
CHATS = Api("/v1/chat/completions", "chatcmpl-", chat.parse_chat, ChatChunkWriter, WholeChat)
RESPONSES = Api(
    "/v1/responses",
    "resp_",
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


def error_body_for(path: str, error: MeshserveError) -> bytes:
    """The error as clients of this route expect it."""
    return (anthropic_writers.error_body if path.startswith(ANTHROPIC_PREFIX) else error_body)(error)

"""What begins an exchange, by path."""

from collections.abc import Callable
from functools import partial
from typing import Any

from meshserve.roles.frontend import apis, ollama_writers
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.exchange import Exchange
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.kept_responses import KeptResponses, ResponseExchange
from meshserve.roles.frontend.models.common import Parsed
from meshserve.roles.frontend.models.completions import parse_generate
from meshserve.roles.frontend.models.ollama import (
    OllamaBody,
    OllamaChatBody,
    OllamaGenerateBody,
    read_load,
)
from meshserve.roles.frontend.ollama import loaded
from meshserve.roles.frontend.request_headers import timeout_s
from meshserve.roles.frontend.routes import Handler
from meshserve.roles.frontend.writers import Api


def handlers_of(completions: Completions, kept: KeptResponses) -> dict[str, Handler]:
    """Of all APIs that complete; all with POST."""

    def parse(body: bytes, request_id: str, client_id: str) -> Parsed:
        return parse_generate(body, request_id, client_id, completions.first_model())

    found: dict[str, Handler] = {api.path: partial(Exchange, completions, api) for api in (*apis.APIS, apis.lines(parse))}
    for api, kind, said in (
        (apis.ollama_chats(completions.served_name), OllamaChatBody, ollama_writers.message_of),
        (apis.ollama_prompts(completions.served_name), OllamaGenerateBody, ollama_writers.response_of),
    ):
        found[api.path] = partial(_loaded_or_answered, completions, api, kind, said)
    found[apis.RESPONSES.path] = partial(ResponseExchange, kept, completions, apis.RESPONSES)
    return found


def _loaded_or_answered(
    completions: Completions,
    api: Api,
    kind: type[OllamaBody],
    said: Callable[[str], dict[str, Any]],
    http: Request,
) -> Exchange | Response:
    """A client of Ollama's API may ask for a model to be loaded, and for nothing else. Raises InvalidRequest, ModelNotFound."""
    asked, exchange = read_load(kind, http.body), Exchange(completions, api, http)
    if asked is None:
        return exchange
    timeout_s(http.headers, completions.config.request_timeout_s)  # as of all that are answered
    told = loaded(completions, asked.model, said(""))
    return Response(told.status, told.body, told.headers + exchange.id_header)

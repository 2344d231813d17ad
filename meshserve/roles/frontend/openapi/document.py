"""The OpenAPI document (3.1, https://spec.openapis.org/oas/v3.1.1.html) of a frontend: its routes, and the structs' schemas. Pure."""

from collections.abc import Iterable
from typing import Any

from meshserve import __version__
from meshserve.roles.frontend.access import SESSION_COOKIE
from meshserve.roles.frontend.apis import ANTHROPIC_PREFIX
from meshserve.roles.frontend.guard import OPEN_PATHS
from meshserve.roles.frontend.models import anthropic, chat, completions, responses
from meshserve.roles.frontend.models.answers import ANSWERS, DESCRIPTIONS, ref, schema_of
from meshserve.roles.frontend.models.common import Body, Schema
from meshserve.roles.frontend.models.schemas import components, name_of
from meshserve.roles.frontend.openapi.failures import ERRORS, EVERYWHERE, failures, responses_by_name
from meshserve.roles.frontend.shapes import dump
from meshserve.roles.frontend.timeouts import MIN_TIMEOUT_S

_ABOUT = """LLM requests, served by a mesh of peers. OpenAI's and Anthropic's clients work with their base URL changed.

Fields that nobody knows are ignored. Fields that are known elsewhere and cannot be done here are refused by name where they ask for
something. A field that is null is a field that is not there. Besides what schemas can say, refused with 400 are: prompts that are empty
or do not fit into the model's context, token ids above the model's last, calls of tools that are not answered, and schemas that the
model's engine cannot keep to."""
_TAGS = {
    "Completing": "Text that follows. OpenAI's shapes, and Anthropic's under `/v1/messages`.",
    "Counting": "Tokens of prompts and texts, without an answer.",
    "Models": "What is served.",
    "Mesh": "Who serves.",
    "Pages": "For people.",
}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
BODIES: tuple[type[Body], ...] = (
    chat.ChatBody,
    completions.CompletionBody,
    responses.ResponseBody,
    anthropic.MessageBody,
    anthropic.CountBody,
    completions.GenerateBody,
    completions.DetokenizeBody,
)
"""What routes take; `/tokenize` takes one of two more."""


def document(has_keys: bool, observes: bool) -> Schema:
    """The whole document: `has_keys` if an API key is asked for, `observes` if there are metrics and the dashboard."""
    routes = _Routes(has_keys)
    _add_completing(routes)
    _add_counting(routes)
    _add_mesh(routes, observes)
    _add_pages(routes, observes, has_keys)
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "meshserve",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": routes.paths,
        "components": {
            "schemas": schemas(),
            "responses": responses_by_name(),
            "parameters": {"RequestId": _REQUEST_ID, "Timeout": _TIMEOUT, "Session": _SESSION},
        },
    }
    if has_keys:
        made["components"]["securitySchemes"] = _SECURITY
        made["security"] = [{name: []} for name in _SECURITY]
    return made


def document_bytes(has_keys: bool, observes: bool) -> bytes:
    """The same as JSON."""
    return dump(document(has_keys, observes)).encode()


def schemas() -> dict[str, Schema]:
    """All schemas, by name."""
    found = components([*BODIES, completions.TokenizePrompt, chat.TokenizeChat])
    ways = [found.pop("TokenizePrompt"), found.pop("TokenizeChat")]
    answers = {name: schema_of(shape) for name, shape in {**ANSWERS, **ERRORS}.items()}
    for name, words in DESCRIPTIONS.items():
        answers[name]["description"] = words
    model = {"type": "string", "minLength": 1, "description": "Of `/v1/models`.", "examples": ["dummy"]}
    return {"Model": model, **found, "TokenizeRequest": {"anyOf": ways}, **answers}


def _header(name: str, words: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "description": words, "schema": schema}


_REQUEST_ID = _header("x-request-id", "The client's own name for the request: a label, which comes back.", _TEXT)
_TIMEOUT = _header(
    "x-request-timeout",
    "Seconds for the whole request, and no more than the server allows.",
    {"type": "number", "minimum": MIN_TIMEOUT_S},
)
_SESSION = _header("x-session-id", "Requests of one session go where the last one went, if that costs nothing.", _TEXT)
_SECURITY: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE, "description": "Of the login form, for this server's pages."},
}


class _Routes:
    """Collects routes, with what all have in common."""

    def __init__(self, has_keys: bool) -> None:
        self._has_keys = has_keys
        self.paths: dict[str, Schema] = {}

    def add(
        self, route: str, name: str, tag: str, summary: str, responses: Schema, statuses: Iterable[int] = (), **more: object
    ) -> None:
        """One route, as method and path. `statuses` are those of its failures, besides those of every route."""
        method, path = route.split()
        is_open = path in OPEN_PATHS
        if self._has_keys and not is_open:
            statuses = (*statuses, 401)
            if method == "get":
                responses = {**responses, "303": {"description": "A browser without a key is sent to the login form."}}
        told = {**failures({*EVERYWHERE, *statuses}, path.startswith(ANTHROPIC_PREFIX)), **responses}
        operation: Schema = {"operationId": name, "summary": summary, "tags": [tag], **more, "responses": dict(sorted(told.items()))}
        if self._has_keys and is_open:
            operation["security"] = []
        self.paths.setdefault(path, {})[method] = operation


def _content(media: str, schema: Schema) -> Schema:
    return {media: {"schema": schema}}


def _ok(words: str, content: Schema, **more: Schema) -> Schema:
    return {"200": {"description": words, "content": content, **more}}


def _json(words: str, name: str) -> Schema:
    return _ok(words, _content("application/json", ref(name)))


def _body(name: str, example: Any) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": ref(name), "example": example}}}


def _taken(body: type[Body]) -> Schema:
    return _body(name_of(body.__name__), body.EXAMPLE)


def _in_path(name: str, words: str) -> list[Schema]:
    return [{"name": name, "in": "path", "required": True, "description": words, "schema": _TEXT}]


_ID = {"x-request-id": {"description": "The request's id, or the client's own.", "required": True, "schema": _TEXT}}
_ANSWER = "The answer, whole or as server-sent events. A stream that fails ends with an error event, and never as if it were whole."


def _add_completing(routes: _Routes) -> None:
    """The four APIs, each streamed and whole, and the simple form."""
    events: Schema = {"text/event-stream": {}}
    lines = _ok("A JSON object a line, as the text comes.", _content("application/x-ndjson", _TEXT), headers=_ID)
    headers = [{"$ref": f"#/components/parameters/{name}"} for name in ("RequestId", "Timeout", "Session")]
    for path, name, body, answer, summary in (
        ("/v1/chat/completions", "createChat", chat.ChatBody, "Chat", "The next message of a chat"),
        ("/v1/completions", "createCompletion", completions.CompletionBody, "Completion", "Text that follows a prompt"),
        ("/v1/responses", "createResponse", responses.ResponseBody, "Response", "OpenAI's Responses API; nothing is stored"),
        ("/v1/messages", "createMessage", anthropic.MessageBody, "AnthropicAnswer", "Anthropic's Messages API"),
        ("/generate", "generate", completions.GenerateBody, "", "The simple form"),
    ):
        found = _ok(_ANSWER, {**_content("application/json", ref(answer)), **events}, headers=_ID) if answer else lines
        statuses = (404, 429, 499, 502, 503, 504)
        routes.add(f"post {path}", name, "Completing", summary, found, statuses, parameters=headers, requestBody=_taken(body))


def _add_counting(routes: _Routes) -> None:
    tokenize = _body("TokenizeRequest", completions.TokenizePrompt.EXAMPLE)
    for path, name, taken, answer, summary in (
        ("/v1/messages/count_tokens", "countTokens", _taken(anthropic.CountBody), "Count", "Tokens of a message, counted"),
        ("/tokenize", "tokenize", tokenize, "Tokenized", "Tokens of a prompt or a chat"),
        ("/detokenize", "detokenize", _taken(completions.DetokenizeBody), "Detokenized", "Text of tokens"),
    ):
        routes.add(f"post {path}", name, "Counting", summary, _json("Counted.", answer), (404, 502, 503, 504), requestBody=taken)
    routes.add("get /v1/models", "listModels", "Models", "The models that are served", _json("All of them.", "Models"))
    found, named = _json("It is served.", "ModelEntry"), _in_path("model", "Its name.")
    routes.add("get /v1/models/{model}", "getModel", "Models", "One model", found, (404,), parameters=named)


def _add_mesh(routes: _Routes, observes: bool) -> None:
    add, named = routes.add, _in_path("id", "Its id, or the client's label.")
    not_ready = {"description": "Not yet, or no more: what is missing.", "content": _content("application/json", ref("NotReady"))}
    add("get /health", "health", "Mesh", "Whether this peer lives", _json("It does.", "Health"))
    add("get /ready", "ready", "Mesh", "Whether a request could be served", {**_json("It could.", "Ready"), "503": not_ready})
    add("get /mesh/peers", "listPeers", "Mesh", "Who is in the mesh, and what each peer says of itself", _json("All.", "Peers"))
    ended = _json("It was ended, at every hop.", "Cancelled")
    add("delete /mesh/requests/{id}", "cancelRequest", "Mesh", "End a request, wherever it is", ended, (404,), parameters=named)
    if not observes:
        return
    add("get /metrics", "metrics", "Mesh", "Figures of all peers, for Prometheus", _ok("They.", _content("text/plain", _TEXT)))
    events = _ok("Server-sent events, without end.", {"text/event-stream": {}})
    receipt = _ok("Who served it, why, and where its time went.", _content("application/json", _OBJECT))
    words = "The receipt of one of the last requests"
    add("get /mesh/requests/{id}", "receipt", "Mesh", words, receipt, (404,), parameters=named)
    add("get /mesh/events", "events", "Mesh", "What happens in the mesh: the dashboard's data", events, (503,))


def _add_pages(routes: _Routes, observes: bool, has_keys: bool) -> None:
    add, page = routes.add, _content("text/html", _TEXT)
    add("get /openapi.json", "openapi", "Pages", "This document", _ok("It.", _content("application/json", _OBJECT)))
    add("get /docs", "docs", "Pages", "This document, to read", _ok("The page.", page))
    if observes:
        add("get /", "dashboard", "Pages", "The dashboard", _ok("The page.", page))
    if not has_keys:
        return
    wrong = {"description": "The form again: this is no key.", "content": {**page, **_content("application/json", ref("Error"))}}
    target = [{"name": "next", "in": "query", "description": "Where to go then: a path of this server.", "schema": _TEXT}]
    key = {"type": "object", "properties": {"key": _TEXT}, "required": ["key"]}
    form = {"required": True, "content": _content("application/x-www-form-urlencoded", key)}
    moved = {"303": {"description": "Let in, with a cookie that is not the key."}, "401": wrong}
    add("get /login", "loginForm", "Pages", "A form for browsers", _ok("The form.", page), parameters=target)
    add("post /login", "logIn", "Pages", "A key for a cookie", moved, (429,), parameters=target, requestBody=form)
    add("post /logout", "logOut", "Pages", "The end of a session", {"303": {"description": "The form is next."}})

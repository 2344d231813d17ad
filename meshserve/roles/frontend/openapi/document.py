"""The OpenAPI document (3.1, https://spec.openapis.org/oas/v3.1.1.html) of a frontend: routes, and the structs' schemas. Pure."""

from collections.abc import Iterable
from typing import Any

from meshserve import __version__
from meshserve.roles.frontend.access import SESSION_COOKIE
from meshserve.roles.frontend.apis import ANTHROPIC_PREFIX
from meshserve.roles.frontend.guard import OPEN_PATHS
from meshserve.roles.frontend.models import anthropic, chat, completions, responses
from meshserve.roles.frontend.models.answers import ANSWERS, ref, schema_of
from meshserve.roles.frontend.models.common import Body, Schema
from meshserve.roles.frontend.models.schemas import components, name_of
from meshserve.roles.frontend.openapi.failures import ERRORS, EVERYWHERE, failures, responses_by_name
from meshserve.roles.frontend.shapes import dump
from meshserve.roles.frontend.timeouts import MIN_TIMEOUT_S

_ABOUT = """LLM requests, served by a mesh of peers. OpenAI's and Anthropic's clients work with their base URL changed.

Fields that nobody knows are ignored. Fields that are known elsewhere and cannot be done here are refused by
name where they ask for something. A field that is null is a field that is not there. Besides what schemas can
say, refused with 400 are: prompts that are empty or do not fit into the model's context, token ids above the
model's last, calls of tools that are not answered, and schemas that the model's engine cannot keep to."""
_TAGS = {
    "Completing": "Text that follows. OpenAI's shapes, and Anthropic's under `/v1/messages`.",
    "Counting": "Tokens of prompts and texts, without an answer.",
    "Models": "What is served.",
    "Mesh": "Who serves.",
    "Pages": "For people.",
}
_TEXT: Schema = {"type": "string"}
_SECONDS: Schema = {"type": "number", "minimum": MIN_TIMEOUT_S}
_PARAMETERS = {
    "RequestId": ("header", "x-request-id", "The client's own name for the request: it comes back.", _TEXT),
    "Timeout": ("header", "x-request-timeout", "For all of the request, up to the server's limit.", _SECONDS),
    "Session": ("header", "x-session-id", "Where the session's last request went, the next one goes.", _TEXT),
    "Id": ("path", "id", "The request's id, or the client's label.", _TEXT),
    "ModelName": ("path", "model", "The model's name.", _TEXT),
    "Next": ("query", "next", "Where to go then: a path of this server.", _TEXT),
}
_SECURITY: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE, "description": "Of the login form."},
}
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
    _add_others(routes, observes)
    parameters = {
        key: {"in": place, "name": name, "description": words, "schema": schema, "required": place == "path"}
        for key, (place, name, words, schema) in _PARAMETERS.items()
    }
    parts: Schema = {"schemas": _schemas(), "responses": responses_by_name(), "parameters": parameters}
    licence = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    made: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "meshserve", "version": __version__, "description": _ABOUT, "license": licence},
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": routes.paths,
        "components": parts,
    }
    if has_keys:
        _add_login(routes)
        parts["securitySchemes"] = _SECURITY
        made["security"] = [{name: []} for name in _SECURITY]
    return made


def document_bytes(has_keys: bool, observes: bool) -> bytes:
    """The same as JSON."""
    return dump(document(has_keys, observes)).encode()


def _schemas() -> dict[str, Schema]:
    found = components([*BODIES, completions.TokenizePrompt, chat.TokenizeChat])
    ways = [found.pop("TokenizePrompt"), found.pop("TokenizeChat")]
    model = {**_TEXT, "minLength": 1, "description": "Of `/v1/models`.", "examples": ["dummy"]}
    answers = {name: schema_of(shape) for name, shape in {**ANSWERS, **ERRORS}.items()}
    return {"Model": model, **found, "TokenizeRequest": {"anyOf": ways}, **answers}


class _Routes:
    """Collects routes, with what all have in common."""

    def __init__(self, has_keys: bool) -> None:
        self._has_keys = has_keys
        self.paths: dict[str, Schema] = {}

    def add(
        self,
        route: str,
        name: str,
        tag: str,
        summary: str,
        responses: Schema,
        *statuses: int,
        parameters: Iterable[str] = (),
        **more: object,
    ) -> None:
        """One route, as method and path. `statuses` are those of its failures, besides those of every route."""
        method, path = route.split()
        is_open = path in OPEN_PATHS
        if self._has_keys and not is_open:
            statuses = (*statuses, 401)
            if method == "get":
                moved = {"description": "A browser without a key is sent to the login form."}
                responses = {"303": moved, **responses}
        told = {**failures({*EVERYWHERE, *statuses}, path.startswith(ANTHROPIC_PREFIX)), **responses}
        if parameters:
            more["parameters"] = [{"$ref": f"#/components/parameters/{key}"} for key in parameters]
        if self._has_keys and is_open:
            more["security"] = []
        operation = {"operationId": name, "summary": summary, "tags": [tag], **more}
        self.paths.setdefault(path, {})[method] = {**operation, "responses": dict(sorted(told.items()))}


def _ok(content: Schema, words: str = "Done.") -> Schema:
    return {"200": {"description": words, "content": content}}


def _content(media: str, schema: Schema) -> Schema:
    return {media: {"schema": schema}}


def _json(name: str, words: str = "Done.") -> Schema:
    return _ok(_content("application/json", ref(name)), words)


def _body(name: str, example: Any) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": ref(name), "example": example}}}


_ID = {"x-request-id": {"description": "The request's id, or the client's own.", "required": True, "schema": _TEXT}}
_ANSWER = (
    "The answer, whole or as server-sent events. "
    "A stream that fails ends with an error event, and never as if it were whole."
)


def _add_completing(routes: _Routes) -> None:
    """The four APIs, each streamed and whole, and the simple form."""
    for path, name, body, answer, summary in (
        ("/v1/chat/completions", "createChat", chat.ChatBody, "Chat", "The next message of a chat"),
        ("/v1/completions", "createCompletion", completions.CompletionBody, "Completion", "Text that follows"),
        ("/v1/responses", "createResponse", responses.ResponseBody, "Response", "OpenAI's Responses API"),
        ("/v1/messages", "createMessage", anthropic.MessageBody, "AnthropicAnswer", "Anthropic's Messages API"),
        ("/generate", "generate", completions.GenerateBody, "", "The simple form: a JSON object a line"),
    ):
        lines = _content("application/x-ndjson", _TEXT)
        content = {**_content("application/json", ref(answer)), "text/event-stream": {}} if answer else lines
        found = _ok(content, _ANSWER)
        found["200"]["headers"] = _ID
        taken = _body(name_of(body.__name__), body.EXAMPLE)
        statuses, headers = (404, 429, 499, 502, 503, 504), ("RequestId", "Timeout", "Session")
        routes.add(
            f"post {path}", name, "Completing", summary, found, *statuses, parameters=headers, requestBody=taken
        )


def _add_counting(routes: _Routes) -> None:
    for path, name, request, example, answer, summary in (
        ("/v1/messages/count_tokens", "countTokens", "CountRequest", anthropic.CountBody.EXAMPLE, "Count", "Tokens of a message"),
        ("/tokenize", "tokenize", "TokenizeRequest", completions.TokenizePrompt.EXAMPLE, "Tokenized", "Tokens of a prompt or a chat"),
        ("/detokenize", "detokenize", "DetokenizeRequest", completions.DetokenizeBody.EXAMPLE, "Detokenized", "Text of tokens"),
    ):
        taken = _body(request, example)
        routes.add(f"post {path}", name, "Counting", summary, _json(answer), 404, 502, 503, 504, requestBody=taken)


def _add_others(routes: _Routes, observes: bool) -> None:
    add, page, anything = routes.add, _content("text/html", _TEXT), _content("application/json", {"type": "object"})
    not_ready = {"description": "What is missing.", "content": _content("application/json", ref("NotReady"))}
    add("get /v1/models", "listModels", "Models", "The models that are served", _json("Models"))
    add("get /v1/models/{model}", "getModel", "Models", "One model", _json("ModelEntry"), 404, parameters=["ModelName"])
    add("get /health", "health", "Mesh", "Whether this peer lives", _json("Health"))
    add("get /ready", "ready", "Mesh", "Whether a request could be served", {**_json("Ready"), "503": not_ready})
    add("get /mesh/peers", "listPeers", "Mesh", "Peers, and what each says of itself", _json("Peers"))
    route, words = "delete /mesh/requests/{id}", "End a request, at every hop"
    add(route, "cancelRequest", "Mesh", words, _json("Cancelled"), 404, parameters=["Id"])
    add("get /openapi.json", "openapi", "Pages", "This document", _ok(anything))
    add("get /docs", "docs", "Pages", "This document, to read", _ok(page))
    if observes:
        figures, events = _content("text/plain", _TEXT), _content("text/event-stream", {})
        add("get /metrics", "metrics", "Mesh", "Figures of all peers, for Prometheus", _ok(figures))
        route, words = "get /mesh/requests/{id}", "Who served a request, why, and where its time went"
        add(route, "receipt", "Mesh", words, _ok(anything), 404, parameters=["Id"])
        add("get /mesh/events", "events", "Mesh", "The dashboard's data, without end", _ok(events), 503)
        add("get /", "dashboard", "Pages", "The dashboard", _ok(page))


def _add_login(routes: _Routes) -> None:
    add, page = routes.add, _content("text/html", _TEXT)
    wrong = {"description": "No such key.", "content": {**page, **_content("application/json", ref("Error"))}}
    key = {"type": "object", "properties": {"key": _TEXT}, "required": ["key"]}
    form = {"required": True, "content": _content("application/x-www-form-urlencoded", key)}
    moved: Schema = {"303": {"description": "On, or back to the form."}}
    add("get /login", "loginForm", "Pages", "A form for browsers", _ok(page), parameters=["Next"])
    words, answers = "A key for a cookie", {**moved, "401": wrong}
    add("post /login", "logIn", "Pages", words, answers, 429, parameters=["Next"], requestBody=form)
    add("post /logout", "logOut", "Pages", "The end of a session", moved)

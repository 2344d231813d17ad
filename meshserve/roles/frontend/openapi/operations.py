"""Every route with what it takes and gives. Pure."""

from collections.abc import Iterable

from meshserve.roles.frontend.apis import ANTHROPIC_PREFIX
from meshserve.roles.frontend.guard import OPEN_PATHS
from meshserve.roles.frontend.openapi.examples import EXAMPLES
from meshserve.roles.frontend.openapi.failures import EVERYWHERE, failures
from meshserve.roles.frontend.openapi.schemas import TEXT, Schema, record, ref
from meshserve.roles.frontend.timeouts import MIN_TIMEOUT_S

_COMPLETING = (404, 429, 499, 502, 503, 504)
_COUNTING = (404, 502, 503, 504)
_JSON_ERROR = {"application/json": {"schema": ref("Error")}}
_ID = {"x-request-id": {"description": "The request's id, or the client's own.", "required": True, "schema": TEXT}}
_ANSWER = "The answer, whole or as server-sent events. A stream that fails ends with an error event, and never as if it were whole."
_REQUEST_HEADERS = [{"$ref": f"#/components/parameters/{name}"} for name in ("RequestId", "Timeout", "Session")]


def parameters() -> dict[str, Schema]:
    """Headers of requests that complete."""
    said = {
        "RequestId": ("x-request-id", "The client's own name for the request: a label, which comes back.", TEXT),
        "Timeout": (
            "x-request-timeout",
            "Seconds for the whole request, and no more than the server allows.",
            {"type": "number", "minimum": MIN_TIMEOUT_S},
        ),
        "Session": ("x-session-id", "Requests of one session go where the last one went, if that costs nothing.", TEXT),
    }
    return {key: {"name": name, "in": "header", "description": words, "schema": schema} for key, (name, words, schema) in said.items()}


class Operations:
    """Collects them, with what all have in common."""

    def __init__(self, has_keys: bool) -> None:
        self._has_keys = has_keys
        self.paths: dict[str, Schema] = {}

    def add(self, route: str, name: str, summary: str, responses: Schema, statuses: Iterable[int] = (), **more: object) -> None:
        """One route, as method and path. `statuses` are those of its failures, besides those of every route."""
        method, path = route.split()
        is_open = path in OPEN_PATHS
        if self._has_keys and not is_open:
            statuses = (*statuses, 401)
            if method == "get":
                responses = {**responses, "303": {"description": "A browser without a key is sent to the login form."}}
        told = {**failures({*EVERYWHERE, *statuses}, path.startswith(ANTHROPIC_PREFIX)), **responses}
        operation: Schema = {"operationId": name, "summary": summary, **more, "responses": dict(sorted(told.items()))}
        if self._has_keys and is_open:
            operation["security"] = []
        self.paths.setdefault(path, {})[method] = operation


def answer(words: str, content: str | None, schema: Schema, **more: Schema) -> Schema:
    """A response with status 200."""
    kinds = {content: {"schema": schema}} if content else {}
    return {"200": {"description": words, "content": kinds, **more}}


def json_answer(words: str, name: str) -> Schema:
    """The same, of a schema of the document's own."""
    return answer(words, "application/json", ref(name))


def _body(name: str) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": ref(name), "example": EXAMPLES[name]}}}


def _add_completing(operations: Operations) -> None:
    """The four APIs, each streamed and whole."""
    for path, name, request, schema, summary in (
        ("/v1/chat/completions", "createChat", "ChatRequest", "Chat", "The next message of a chat"),
        ("/v1/completions", "createCompletion", "CompletionRequest", "Completion", "Text that follows a prompt"),
        ("/v1/responses", "createResponse", "ResponseRequest", "Response", "OpenAI's Responses API; nothing is stored"),
        ("/v1/messages", "createMessage", "MessageRequest", "AnthropicAnswer", "Anthropic's Messages API"),
    ):
        content = {"application/json": {"schema": ref(schema)}, "text/event-stream": {}}
        responses = {"200": {"description": _ANSWER, "headers": _ID, "content": content}}
        asked = {"tags": ["Completing"], "parameters": _REQUEST_HEADERS, "requestBody": _body(request)}
        operations.add(f"post {path}", name, summary, responses, _COMPLETING, **asked)
    lines = answer("A JSON object a line, as the text comes.", "application/x-ndjson", TEXT, headers=_ID)
    asked = {"tags": ["Completing"], "parameters": _REQUEST_HEADERS, "requestBody": _body("GenerateRequest")}
    operations.add("post /generate", "generate", "The simple form", lines, _COMPLETING, **asked)


def _add_counting(operations: Operations) -> None:
    for path, name, request, schema, summary in (
        ("/v1/messages/count_tokens", "countTokens", "CountRequest", "Count", "Tokens of a message, counted"),
        ("/tokenize", "tokenize", "TokenizeRequest", "Tokenized", "Tokens of a prompt or a chat"),
        ("/detokenize", "detokenize", "DetokenizeRequest", "Detokenized", "Text of tokens"),
    ):
        asked = {"tags": ["Counting"], "requestBody": _body(request)}
        operations.add(f"post {path}", name, summary, json_answer("Counted.", schema), _COUNTING, **asked)
    listed = json_answer("All of them.", "Models")
    operations.add("get /v1/models", "listModels", "The models that are served", listed, tags=["Models"])
    named = {"tags": ["Models"], "parameters": [_in_path("model", "Its name.")]}
    operations.add("get /v1/models/{model}", "getModel", "One model", json_answer("It is served.", "ModelEntry"), (404,), **named)


def _in_path(name: str, words: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "description": words, "schema": TEXT}


def _add_mesh(operations: Operations) -> None:
    add, tags = operations.add, ["Mesh"]
    add("get /health", "health", "Whether this peer lives", json_answer("It does.", "Health"), tags=tags)
    not_ready = {"description": "Not yet, or no more: what is missing.", "content": {"application/json": {"schema": ref("NotReady")}}}
    ready = {**json_answer("It could.", "Ready"), "503": not_ready}
    add("get /ready", "ready", "Whether a request could be served", ready, tags=tags)
    add("get /mesh/peers", "listPeers", "Who is in the mesh, and what each peer says of itself", json_answer("All.", "Peers"), tags=tags)
    named = [_in_path("id", "Its id, or the client's label.")]
    ended = json_answer("It was ended, at every hop.", "Cancelled")
    add("delete /mesh/requests/{id}", "cancelRequest", "End a request, wherever it is", ended, (404,), tags=tags, parameters=named)


def _add_pages(operations: Operations) -> None:
    add, tags = operations.add, ["Pages"]
    add("get /openapi.json", "openapi", "This document", answer("It.", "application/json", {"type": "object"}), tags=tags)
    add("get /docs", "docs", "This document, to read", answer("The page.", "text/html", TEXT), tags=tags)


def _add_observed(operations: Operations) -> None:
    add, tags = operations.add, ["Mesh"]
    add("get /metrics", "metrics", "Figures of all peers, for Prometheus", answer("They.", "text/plain", TEXT), tags=tags)
    events = {"200": {"description": "Server-sent events, without end.", "content": {"text/event-stream": {}}}}
    named = [_in_path("id", "Its id, or the client's label.")]
    receipt = answer("Who served it, why, and where its time went.", "application/json", {"type": "object"})
    add("get /mesh/requests/{id}", "receipt", "The receipt of one of the last requests", receipt, (404,), tags=tags, parameters=named)
    add("get /mesh/events", "events", "What happens in the mesh: the dashboard's data", events, (503,), tags=tags)
    add("get /", "dashboard", "The dashboard", answer("The page.", "text/html", TEXT), tags=["Pages"])


def _add_login(operations: Operations) -> None:
    add, tags = operations.add, ["Pages"]
    page = {"description": "The form.", "content": {"text/html": {"schema": TEXT}}}
    told_wrong = {"description": "The form again: this is no key.", "content": {**page["content"], **_JSON_ERROR}}  # type: ignore[dict-item]
    target = [{"name": "next", "in": "query", "description": "Where to go then: a path of this server.", "schema": TEXT}]
    form = {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": record({"key": TEXT}, ["key"])}}}
    moved = {"303": {"description": "Let in, with a cookie that is not the key."}, "401": told_wrong}
    add("get /login", "loginForm", "A form for browsers", {"200": page}, tags=tags, parameters=target)
    add("post /login", "logIn", "A key for a cookie", moved, (429,), tags=tags, parameters=target, requestBody=form)
    add("post /logout", "logOut", "The end of a session", {"303": {"description": "The form is next."}}, tags=tags)


def operations(has_keys: bool, observes: bool) -> dict[str, Schema]:
    """All paths of a frontend with these settings."""
    made = Operations(has_keys)
    _add_completing(made)
    _add_counting(made)
    _add_mesh(made)
    if observes:
        _add_observed(made)
    _add_pages(made)
    if has_keys:
        _add_login(made)
    return made.paths

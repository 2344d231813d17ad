"""The OpenAPI document (3.1, https://spec.openapis.org/oas/v3.1.1.html) of a frontend: routes, and the structs' schemas. Pure."""

from collections.abc import Iterable
from typing import Any

from meshserve import __version__
from meshserve.errors import InvalidRequest, codes_of
from meshserve.roles.frontend.access import SESSION_COOKIE
from meshserve.roles.frontend.anthropic_writers import ERROR_TYPES as ANTHROPIC_TYPES
from meshserve.roles.frontend.apis import ERROR_SHAPES, error_shape_of
from meshserve.roles.frontend.guard import OPEN_PATHS
from meshserve.roles.frontend.kept_responses import MAX_LISTED, ORDERS
from meshserve.roles.frontend.models import anthropic, chat, completions, ollama, responses
from meshserve.roles.frontend.models.answers import ANSWERS, ref, schema_of
from meshserve.roles.frontend.models.common import Body, Schema
from meshserve.roles.frontend.models.fields import HEADER
from meshserve.roles.frontend.models.schemas import components, name_of
from meshserve.roles.frontend.request_headers import MIN_TIMEOUT_S
from meshserve.roles.frontend.shapes import ERROR_TYPES

_ABOUT = """LLM requests, served by a mesh of peers. Clients of OpenAI, Anthropic and Ollama work with their base URL changed.

Fields that nobody knows are ignored, and so are those that ask for effort, speed, bookkeeping or presentation
only, and tools that are no functions; `x-meshserve-ignored` names them. What would change the answer and cannot be
done here is refused by name where it asks for something. A field that is null is a field that is not there. Besides
what schemas can say, refused with 400 are: prompts that are empty or do not fit into the model's context, token ids
above the model's last, calls of tools that are not answered, and schemas that the model's engine cannot keep to."""
_TAGS = {
    "Completing": "Text that follows. OpenAI's shapes, Anthropic's under `/v1/messages`, and Ollama's under `/api`.",
    "Counting": "Tokens of prompts and texts, without an answer.",
    "Kept": "Responses that requests can refer to.",
    "Models": "What is served.",
    "Mesh": "Who serves.",
    "Pages": "For people.",
}
_TEXT: Schema = {"type": "string"}
_HEADERS = ("RequestId", "Timeout", "Session")
_PARAMETERS = """
RequestId header x-request-id      The client's own name for the request: a label, which comes back.
Timeout   header x-request-timeout Seconds for the whole request, and no more than the server allows.
Session   header x-session-id      A session's requests go where its last one went, if that costs nothing.
Id        path   id                The request's id, or the client's label.
ModelName path   model             The model's name.
Response  path   id                The response's id.
After     query  after             The id of the item behind which the list begins.
Limit     query  limit             How many items are listed: 1 to 100, by default 20.
Order     query  order             `asc` for the oldest first; by default `desc`.
Next      query  next              Where to go then: a path of this server.
"""
_OTHER_THAN_TEXT: dict[str, Schema] = {
    "Timeout": {"type": "number", "minimum": MIN_TIMEOUT_S},
    "Limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED},
    "Order": {"enum": list(ORDERS)},
}
"""Schemas of parameters."""
_SECURITY: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "azureKey": {"type": "apiKey", "in": "header", "name": "api-key"},
    "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE},
}
BODIES: tuple[type[Body], ...] = (
    chat.ChatBody,
    completions.CompletionBody,
    responses.ResponseBody,
    anthropic.MessageBody,
    anthropic.CountBody,
    completions.GenerateBody,
    completions.DetokenizeBody,
    ollama.OllamaChatBody,
    ollama.OllamaGenerateBody,
    ollama.OllamaShowBody,
    ollama.OllamaEmbedBody,
)
"""What routes take; `/tokenize` takes one of two more."""
_EXAMPLES = {name_of(body.__name__): body.EXAMPLE for body in BODIES}
_EXAMPLES["TokenizeRequest"] = completions.TokenizePrompt.EXAMPLE

# --- failures: any status but 200 has a shape, and the codes that stand for its reasons

_WORDS = {
    400: "The request cannot be served as it stands; `param` names the field at fault.",
    401: "The API key is missing or wrong.",
    403: "The request comes from a page, or under a host name, that may not make it.",
    404: "There is no such model, request or response, or no such path.",
    408: "The rest of the request, or the reading of the answer, did not come in time.",
    413: "The body is too long.",
    415: "The body is compressed in a way that is not read.",
    429: "This client has more than its share while others wait.",
    431: "The request line and headers are too long.",
    499: "Somebody else ended this request.",
    500: "A mistake of the server's.",
    502: "A peer that served the request failed, and others could not go on.",
    503: "The mesh is full, has no worker, or shuts down.",
    504: "The deadline passed.",
}
_EVERYWHERE = (400, 403, 408, 413, 415, 431, 500)
"""Of any route: connections have limits, and pages of other sites are turned away."""
_RETRY = {"retry-after": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}}
_ABOUT_ERRORS = "`message` is for people, `code` is stable, for programs, and `param` is the field at fault."

_ABOUT_OLLAMA_ERRORS = "`error` is for people, `code` is stable, for programs, and `param` is the field at fault."


def _error(types: Iterable[str]) -> dict[str, Any]:
    return {"message": str, "type": set(types), "param": (str, None), "code": str}


_OPENAI_TYPES = (*ERROR_TYPES.values(), "invalid_request_error", "server_error")
_ANTHROPIC_TYPES = (*ANTHROPIC_TYPES.values(), "invalid_request_error", "api_error")
_ERRORS: dict[str, Any] = {
    "Error": {"": _ABOUT_ERRORS, "error": _error(_OPENAI_TYPES)},
    "OllamaError": {"": _ABOUT_OLLAMA_ERRORS, "error": str, "code": str, "param": (str, None)},
    "AnthropicError": {"": _ABOUT_ERRORS, "type": "error", "error": _error(_ANTHROPIC_TYPES)},
}
"""Shapes, by name."""


def _failure(status: int, schema: str) -> Schema:
    # 404 is also what an unknown path gets, and that is no request at all
    codes = {*codes_of(status), *((InvalidRequest.code,) if status == 404 else ())}
    code: Schema = {"properties": {"code": {"enum": sorted(codes)}}}
    if schema != "OllamaError":  # whose members are not within `error`
        code = {"properties": {"error": code}}
    response = {"description": _WORDS[status], "content": {"application/json": {"schema": {"allOf": [ref(schema), code]}}}}
    return {**response, "headers": _RETRY} if status in (429, 503) else response


# --- routes

_ROUTES = """
Completing post /v1/chat/completions createChat ChatRequest Chat,events The next message of a chat
Completing post /v1/completions createCompletion CompletionRequest Completion,events Text that follows
Completing post /v1/responses createResponse ResponseRequest Response,events OpenAI's Responses API
Completing post /v1/messages createMessage MessageRequest AnthropicAnswer,events Anthropic's Messages API
Completing post /generate generate GenerateRequest lines The simple form: a JSON object a line
Completing post /api/chat ollamaChat OllamaChatRequest OllamaChat,lines The next message of a chat, as Ollama has it
Completing post /api/generate ollamaGenerate OllamaGenerateRequest OllamaText,lines An answer, as Ollama has it
Counting post /v1/messages/count_tokens countTokens CountRequest Count Tokens of a message, counted
Counting post /v1/responses/input_tokens countInput ResponseRequest InputCount Tokens of a response's input, counted
Counting post /tokenize tokenize TokenizeRequest Tokenized Tokens of a prompt or a chat
Counting post /detokenize detokenize DetokenizeRequest Detokenized Text of tokens
Kept get /v1/responses/{id} getResponse - Response A response that is kept
Kept delete /v1/responses/{id} deleteResponse - Deleted Keep it no longer
Kept get /v1/responses/{id}/input_items listInputItems - InputItems The conversation to which it was the answer
Models get /v1/models listModels - Models The models that are served
Models get /v1/models/{model} getModel - ModelEntry One model
Models get /api/tags ollamaModels - OllamaModels The models that are served, as Ollama has it
Models get /api/ps ollamaRunning - OllamaRunning The models that are loaded: all
Models post /api/show ollamaShow OllamaShowRequest OllamaShown What is known of a model
Models post /api/embed ollamaEmbed OllamaEmbedRequest - Refused: no engine here makes embeddings
Models post /api/embeddings ollamaEmbeddings OllamaEmbedRequest - The older name of /api/embed
Models get /api/version ollamaVersion - OllamaVersion The version of Ollama whose API this is
Mesh get /health health - Health Whether this peer lives
Mesh get /ready ready - Ready Whether a request could be served
Mesh get /mesh/peers listPeers - Peers Who is in the mesh, and what each peer says of itself
Mesh delete /mesh/requests/{id} cancelRequest - Cancelled End a request, at every hop
Pages get /openapi.json openapi - object This document
Pages get /docs docs - page This document, to read
"""
"""Tag, method, path, name, what the route takes and gives, and what it is for."""
_OBSERVED = """
Mesh get /metrics metrics - text Figures of all peers, for Prometheus
Mesh get /mesh/requests/{id} receipt - object The receipt of one of the last requests
Mesh get /mesh/events events - events What happens in the mesh: the dashboard's data
Pages get / dashboard - page The dashboard
"""
_LOGIN = """
Pages get /login loginForm - page A form for browsers
Pages post /login logIn - - A key for a cookie
Pages post /logout logOut - - The end of a session
"""
_STATUSES = {
    "Completing": (404, 429, 499, 502, 503, 504),
    "Counting": (404, 502, 503, 504),
    "events": (503,),
    "logIn": (429,),
    "ollamaShow": (404,),
    "ollamaEmbed": (404,),
    "ollamaEmbeddings": (404,),
}
"""Of failures besides those of every route, by tag or name."""
_MEDIA: dict[str, Schema] = {
    "events": {"text/event-stream": {}},
    "lines": {"application/x-ndjson": {"schema": _TEXT}},
    "object": {"application/json": {"schema": {"type": "object"}}},
    "page": {"text/html": {"schema": _TEXT}},
    "text": {"text/plain": {"schema": _TEXT}},
}
_ANSWER = (
    "The answer, whole or as server-sent events. "
    "A stream that fails ends with an error event, and never as if it were whole."
)
_ID = {"x-request-id": {"description": "The request's id, or the client's own.", "required": True, "schema": _TEXT}}
_IGNORED = {"description": "What the request has and nobody here does: fields by name, tools by type.", "schema": _TEXT}
_KEY = {"type": "object", "properties": {"key": _TEXT}, "required": ["key"]}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


_MOVED = {"303": {"description": "On, or back to the form."}}
_RESPONSES: dict[str, Schema] = {
    "ready": {"503": {"description": "Not yet, or no more: what is missing.", "content": _json("NotReady")}},
    "logIn": {**_MOVED, "401": {"description": "No such key.", "content": {**_MEDIA["page"], **_json("Error")}}},
    "logOut": _MOVED,
}
"""Of a kind of their own, by name."""


def _operation(line: str, has_keys: bool) -> tuple[str, str, Schema]:
    """Path, method and operation of a route."""
    tag, method, path, name, body, answers, summary = line.split(maxsplit=6)
    is_open = path in OPEN_PATHS
    statuses = {*_EVERYWHERE, *_STATUSES.get(tag, ()), *_STATUSES.get(name, ())}
    if "{" in path:
        statuses.add(404)
    found: Schema = {}
    if has_keys and not is_open:
        statuses.add(401)
        if method == "get":
            found["303"] = {"description": "A browser without a key is sent to the login form."}
    operation: Schema = {"operationId": name, "summary": summary, "tags": [tag]}
    if parameters := _parameters_of(path, tag):
        operation["parameters"] = [{"$ref": f"#/components/parameters/{key}"} for key in parameters]
    if body != "-":
        content = {**_json(body)["application/json"], "example": _EXAMPLES[body]}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    elif name == "logIn":
        form = {"application/x-www-form-urlencoded": {"schema": _KEY}}
        operation["requestBody"] = {"required": True, "content": form}
    if answers != "-":
        found["200"] = _answer(answers.split(","), tag)
    if has_keys and is_open:
        operation["security"] = []
    prefix = error_shape_of(path).name
    told = {str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in statuses}
    told |= found | _RESPONSES.get(name, {})
    return path, method, {**operation, "responses": dict(sorted(told.items()))}


def _parameters_of(path: str, tag: str) -> tuple[str, ...]:
    if tag == "Completing":
        return _HEADERS
    found: dict[str, tuple[str, ...]] = {
        "/login": ("Next",),
        "/v1/models/{model}": ("ModelName",),
        "/v1/responses/{id}": ("Response",),
        "/v1/responses/{id}/input_items": ("Response", "After", "Limit", "Order"),
    }
    return found.get(path, ("Id",) if "{id}" in path else ())


def _answer(kinds: list[str], tag: str) -> Schema:
    content: Schema = {}
    for kind in kinds:
        content |= _MEDIA.get(kind) or _json(kind)
    if tag == "Completing":
        return {"description": _ANSWER, "content": content, "headers": {**_ID, HEADER: _IGNORED}}
    return {"description": "Done.", "content": content}


# --- the document


def document(has_keys: bool, observes: bool, root_path: str = "") -> Schema:
    """The whole document: `has_keys` if an API key is asked for, `observes` if there are metrics and the dashboard.

    Paths are below `root_path`.
    """
    table = _ROUTES + (_OBSERVED if observes else "") + (_LOGIN if has_keys else "")
    paths: dict[str, Schema] = {}
    for line in filter(None, table.splitlines()):
        path, method, operation = _operation(line, has_keys)
        paths.setdefault(path, {})[method] = operation
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "meshserve",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {
                f"{shape.name}{status}": _failure(status, f"{shape.name}Error")
                for shape in ERROR_SHAPES
                for status in _WORDS
            },
            "parameters": dict(map(_parameter, filter(None, _PARAMETERS.splitlines()))),
        },
    }
    if root_path:
        made["servers"] = [{"url": root_path}]
    if has_keys:
        made["components"]["securitySchemes"] = _SECURITY
        made["security"] = [{name: []} for name in _SECURITY]
    return made


def _parameter(line: str) -> tuple[str, Schema]:
    key, place, name, words = line.split(maxsplit=3)
    told = {"in": place, "name": name, "description": words, "schema": _OTHER_THAN_TEXT.get(key, _TEXT)}
    return key, {**told, "required": place == "path"}


def _schemas() -> dict[str, Schema]:
    found = components([*BODIES, completions.TokenizePrompt, chat.TokenizeChat])
    ways = [found.pop("TokenizePrompt"), found.pop("TokenizeChat")]
    model = {**_TEXT, "minLength": 1, "description": "Of `/v1/models`.", "examples": ["dummy"]}
    answers = {name: schema_of(shape) for name, shape in {**ANSWERS, **_ERRORS}.items()}
    return {"Model": model, **found, "TokenizeRequest": {"anyOf": ways}, **answers}

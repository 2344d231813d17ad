"""The OpenAPI document (3.1, https://spec.openapis.org/oas/v3.1.1.html) of a frontend. Pure."""

from meshserve import __version__
from meshserve.roles.frontend.access import SESSION_COOKIE
from meshserve.roles.frontend.openapi import answers, failures, other_requests, requests, tools
from meshserve.roles.frontend.openapi.operations import operations, parameters
from meshserve.roles.frontend.openapi.schemas import Schema
from meshserve.roles.frontend.shapes import dump

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


def document(has_keys: bool, observes: bool) -> Schema:
    """The whole document: `has_keys` if an API key is asked for, `observes` if there are metrics and the dashboard."""
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "meshserve",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": operations(has_keys, observes),
        "components": {"schemas": _schemas(), "responses": failures.responses(), "parameters": parameters()},
    }
    if has_keys:
        made["components"]["securitySchemes"] = _security()
        made["security"] = [{name: []} for name in made["components"]["securitySchemes"]]
    return made


def _schemas() -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for room in (requests, other_requests, tools, answers, failures):
        found |= room.components()
    return found


def _security() -> dict[str, Schema]:
    return {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE, "description": "Of the login form, for this server's pages."},
    }


def document_bytes(has_keys: bool, observes: bool) -> bytes:
    """The same as JSON."""
    return dump(document(has_keys, observes)).encode()

"""What comes back with any other status: its shape, and the codes that stand for its reasons. Pure."""

from collections.abc import Iterable
from typing import Any

from meshserve.errors import InvalidRequest, codes_of
from meshserve.roles.frontend.anthropic_writers import ERROR_TYPES as ANTHROPIC_TYPES
from meshserve.roles.frontend.models.answers import ref
from meshserve.roles.frontend.models.common import Schema
from meshserve.roles.frontend.shapes import ERROR_TYPES

_WORDS = {
    400: "The request cannot be served as it stands; `param` names the field at fault.",
    401: "The API key is missing or wrong.",
    403: "The request comes from a page, or under a host name, that may not make it.",
    404: "There is no such model or request, or no such path.",
    408: "The rest of the request, or the reading of the answer, did not come in time.",
    413: "The body is too long.",
    429: "This client has more than its share while others wait.",
    431: "The request line and headers are too long.",
    499: "Somebody else ended this request.",
    500: "A mistake of the server's.",
    502: "A peer that served the request failed, and others could not go on.",
    503: "The mesh is full, has no worker, or shuts down.",
    504: "The deadline passed.",
}
EVERYWHERE = (400, 403, 408, 413, 431, 500)
"""Of any route: connections have limits, and pages of other sites are turned away."""
_RETRY = {"retry-after": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}}


_ABOUT = "`message` is for people, `code` is stable, for programs, and `param` is the field at fault."


def _error(types: Iterable[str]) -> dict[str, Any]:
    return {"message": str, "type": set(types), "param": (str, None), "code": str}


_OPENAI_TYPES = (*ERROR_TYPES.values(), "invalid_request_error", "server_error")
_ANTHROPIC_TYPES = (*ANTHROPIC_TYPES.values(), "invalid_request_error", "api_error")
ERRORS: dict[str, Any] = {
    "Error": {"": _ABOUT, "error": _error(_OPENAI_TYPES)},
    "AnthropicError": {"": _ABOUT, "type": "error", "error": _error(_ANTHROPIC_TYPES)},
}
"""Shapes, by name."""


def _codes(status: int) -> list[str]:
    """404 is also what an unknown path gets, and that is no request at all."""
    return sorted({*codes_of(status), *((InvalidRequest.code,) if status == 404 else ())})


def responses_by_name() -> dict[str, Schema]:
    """All of them, by name."""
    named = {"Error": "", "AnthropicError": "Anthropic"}
    return {f"{prefix}{status}": _failure(status, schema) for schema, prefix in named.items() for status in _WORDS}


def failures(statuses: Iterable[int], is_anthropic: bool) -> dict[str, Schema]:
    """References to those with these statuses."""
    prefix = "Anthropic" if is_anthropic else ""
    return {str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in sorted(set(statuses))}


def _failure(status: int, schema: str) -> Schema:
    code = {"properties": {"error": {"properties": {"code": {"enum": _codes(status)}}}}}
    response = {"description": _WORDS[status], "content": {"application/json": {"schema": {"allOf": [ref(schema), code]}}}}
    return {**response, "headers": _RETRY} if status in (429, 503) else response

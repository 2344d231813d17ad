"""Every error that meshserve raises on purpose: one root, and a stable code per class that crosses the wire and HTTP.

A peer that receives an error re-raises it as the same class (:func:`from_wire`), so that a caller need not know on which
host it happened. Foreign exceptions are mapped to these once, at the edge where they appear.
"""

from collections.abc import Sequence
from inspect import get_annotations
from typing import Any, ClassVar, Self


class MeshserveError(Exception):
    """Root of all. `code` is stable; the message is for people; `http_status` is what a client of the API sees."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Annotated class attributes with a default travel with the error, and are set by keyword."""
        cls._fields = (*cls._fields, *get_annotations(cls))

    def __init__(self, message: str = "internal error", **details: Any) -> None:
        """Raises TypeError for a detail that this class does not have; a class without fields takes any."""
        super().__init__(message)
        if self._fields and not details.keys() <= set(self._fields):
            raise TypeError(f"{type(self).__name__} has no {', '.join(details.keys() - set(self._fields))}")
        self.message = message
        self.details = {**{name: getattr(type(self), name) for name in self._fields}, **details}
        for name in self._fields:
            setattr(self, name, self.details[name])

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data for :func:`from_wire` on another peer."""
        return {"code": self.code, "message": self.message, "details": self.details}


# --- what the client asked for


class InvalidRequest(MeshserveError):
    """The request cannot be served as it stands; `param` names the field at fault."""

    code, http_status = "invalid_request", 400
    param: str | None = None


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are more tokens than any worker accepts. The message has OpenAI's words, which programs look for."""

    code = "context_length_exceeded"
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """The output tokens that the request asks for; 0: the prompt alone is too long."""
    context_length: int = 0

    @classmethod
    def of(cls, num_prompt: int, num_output: int, context_length: int, param: str) -> Self:
        """The error for a prompt and an output; `num_output` is 0 if the request names no length of the output."""
        is_alone = not num_output or num_prompt >= context_length
        found = f"your {param} resulted in {num_prompt} tokens"
        if not is_alone:
            found = f"you requested {num_prompt + num_output} tokens ({num_prompt} in the {param}, {num_output} in the completion)"
        return cls(
            f"This model's maximum context length is {context_length} tokens. However, {found}. "
            f"Please reduce the length of the {param}{'' if is_alone else ' or the completion'}.",
            param=param,
            num_prompt_tokens=num_prompt,
            num_output_tokens=0 if is_alone else num_output,
            context_length=context_length,
        )


class ModelNotFound(InvalidRequest):
    """No worker in the mesh serves this model."""

    code, http_status = "model_not_found", 404


class Unauthorized(MeshserveError):
    """The API key is missing or wrong."""

    code, http_status = "invalid_api_key", 401


class Forbidden(MeshserveError):
    """The request comes from a page, or under a host name, that may not make it."""

    code, http_status = "forbidden", 403


class RequestTooLarge(InvalidRequest):
    """The body is longer than the frontend accepts."""

    code, http_status = "request_too_large", 413


class HeaderTooLarge(InvalidRequest):
    """The request line and headers are longer than the frontend accepts."""

    code, http_status = "header_too_large", 431


class UnsupportedCoding(InvalidRequest):
    """The body has a content coding that the frontend does not support."""

    code, http_status = "unsupported_coding", 415


class RequestTimedOut(InvalidRequest):
    """The client did not send the rest of its request in time."""

    code, http_status = "request_timed_out", 408


class RequestNotFound(InvalidRequest):
    """No request of this name is under way anywhere in the mesh."""

    code, http_status = "request_not_found", 404


class ResponseNotFound(InvalidRequest):
    """No response of this id is kept anywhere in the mesh."""

    code, http_status = "response_not_found", 404


class PreviousResponseNotFound(ResponseNotFound):
    """No processor keeps the response that a request continues. Clients know the code, and send the conversation again."""

    code = "previous_response_not_found"


# --- what the mesh cannot do now


class Overloaded(MeshserveError):
    """Queues are full. `retry_after_s` is a fair guess at when to come back."""

    code, http_status = "overloaded", 503
    retry_after_s: float = 1.0


class RateLimited(MeshserveError):
    """One client has more than its share while others wait. `retry_after_s` is a fair guess at when to come back."""

    code, http_status = "rate_limit_exceeded", 429
    retry_after_s: float = 1.0


class NoWorker(MeshserveError):
    """No live peer holds the role that the request needs next; `role` names it."""

    code, http_status = "no_worker", 503
    role: str = "decode"


class Draining(MeshserveError):
    """The peer is shutting down and takes no new work."""

    code, http_status = "draining", 503


class PoolFull(Overloaded):
    """The engine's block pool cannot hold this request, now or ever."""

    code = "pool_full"


# --- what went wrong on the way


class PeerLost(MeshserveError):
    """The peer that served the stream died or its link broke before the stream's end."""

    code, http_status = "peer_lost", 502
    peer: str = ""


class PeerSilent(MeshserveError):
    """The peer that served the stream gave no sign of life before it began; it may live, and others are asked."""

    code, http_status = "peer_silent", 502


class NoProgress(MeshserveError):
    """The peer that serves the stream lives, and has made no progress on the stream for too long."""

    code, http_status = "no_progress", 502


class DeadlineExceeded(MeshserveError):
    """The stream was still open at its deadline."""

    code, http_status = "deadline_exceeded", 504


class Cancelled(MeshserveError):
    """The one who opened the stream no longer wants it."""

    code, http_status = "cancelled", 499


class Gone(MeshserveError):
    """A claim for a prefill task that another worker has, or that no longer exists."""

    code, http_status = "gone", 410


class BlockRefused(MeshserveError):
    """A KV block did not fit its attempt, its bounds or its checksum."""

    code, http_status = "block_refused", 502
    is_checksum: bool = False


class GaveUp(MeshserveError):
    """A request took `lost_peers` workers down with it and is tried nowhere else."""

    code, http_status = "gave_up", 502
    lost_peers: Sequence[str] = ()


class AnswerDiffers(MeshserveError):
    """A second processor generated an answer again, and the part that was already sent is different."""

    code, http_status = "answer_differs", 502

    def __init__(self, message: str = "another processor's answer differs from the part that was sent", **details: Any) -> None:
        super().__init__(message, **details)


class EngineFailed(MeshserveError):
    """The engine reported a failure of its own."""

    code, http_status = "engine_failed", 500


class TokenizerFailed(MeshserveError):
    """A model's tokenizer or chat template could not be fetched, or cannot be used here. Not the request's fault."""

    code, http_status = "tokenizer_failed", 502


class Unsupported(InvalidRequest):
    """The request needs a feature that the engine lacks.

    `beta` names a field that the client removes and tries again, if the error has the form that the client expects.
    """

    code = "unsupported"
    beta: str | None = None


# --- malformed or forbidden messages from peers


class ProtocolError(MeshserveError):
    """Bytes from a peer that are not of this protocol. Counted and dropped by the receiver; never raised at a user."""

    code, http_status = "protocol_error", 502


class UnknownField(ProtocolError):
    """A request has a field that a peer of an older version does not know. Another peer may know the field."""

    code = "unknown_field"


class HandshakeRefused(MeshserveError):
    """A peer answered our hello with a no. `kind`: another `mesh`, another `protocol` version, our own incarnation (`self`), no `hello`
    at all, an `other` peer than was meant."""

    code, http_status = "handshake_refused", 502
    kind: str = ""


class UnknownMethod(MeshserveError):
    """A call for a method that this peer's roles do not serve."""

    code, http_status = "unknown_method", 502


# --- what stops a command before it serves


class UsageError(MeshserveError):
    """A flag or its value is wrong: exit code 2."""

    code, http_status = "usage_error", 400


class StartupFailed(MeshserveError):
    """The peer cannot start here: exit code 1. The message says what to do."""

    code = "startup_failed"


class KeyRefused(StartupFailed):
    """A key file is missing, malformed, or readable by others, or the self-test of the keys failed."""

    code = "key_refused"


def _all_classes(root: type[MeshserveError]) -> list[type[MeshserveError]]:
    return [root] + [found for child in root.__subclasses__() for found in _all_classes(child)]


def codes_of(http_status: int) -> list[str]:
    """Codes that a client of the API may be told with this status."""
    ending = {UsageError.code, *(found.code for found in _all_classes(StartupFailed))}  # commands, and no requests
    return [found.code for found in _BY_CODE.values() if found.http_status == http_status and found.code not in ending]


_BY_CODE: dict[str, type[MeshserveError]] = {found.code: found for found in _all_classes(MeshserveError)}


_MAX_TEXT, _MAX_SECONDS, _MAX_NAMES, _MOST_COUNTED = 2000, 1e6, 64, 2**53


def from_wire(data: Any) -> MeshserveError:
    """The error that a peer's :meth:`MeshserveError.to_wire` described; the root class for a code that is unknown here, a
    ProtocolError for data that `to_wire` cannot have written."""
    if not isinstance(data, dict):
        return ProtocolError("a peer reported an error that cannot be read")
    code, message, details = data.get("code"), data.get("message"), data.get("details", {})
    if not isinstance(code, str) or not isinstance(message, str) or not isinstance(details, dict):
        return ProtocolError("a peer reported an error that cannot be read")
    error_class = _BY_CODE.get(code, MeshserveError)
    known = {name: value for name, value in details.items() if name in error_class._fields}  # others are of newer versions
    if not all(_may_be(getattr(error_class, name), value) for name, value in known.items()):
        return ProtocolError("a peer reported an error with a malformed detail")
    return error_class(message[:_MAX_TEXT], **known)


def http_status_of(code: str) -> int | None:
    """The HTTP status of errors with this code; None for a code that this version does not know."""
    if code == MeshserveError.code:
        return MeshserveError.http_status
    known = _BY_CODE.get(code)
    return None if known is None else known.http_status


def _may_be(default: Any, value: Any) -> bool:
    """Whether `value` has the type and the bounds of a detail with this default."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_COUNTED
    if isinstance(default, float):
        return isinstance(value, (int, float)) and 0 <= value <= _MAX_SECONDS
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) <= _MAX_NAMES and all(_may_be("", name) for name in value)
    return (value is None and default is None) or (isinstance(value, str) and len(value) <= _MAX_TEXT)

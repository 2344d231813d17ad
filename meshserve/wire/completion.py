"""What a frontend asks of a processor: a completion, as the client meant it."""

from array import array
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ProtocolError
from meshserve.wire.generation import pack_tokens, unpack_tokens

_KINDS = ("completion", "chat")


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One prompt to be completed. What the client left open is None, and is filled in by the model's card."""

    request_id: str
    """The mesh's own name of the request: who took it in (its incarnation) and a counter."""
    kind: str
    """`completion` or `chat`."""
    model: str
    prompt: "str | array[int] | None" = None
    """Text or token ids, for a completion."""
    messages: list[dict[str, Any]] | None = None
    """Role and content as text, for a chat."""
    max_tokens: int | None = None
    """None: until the model ends or its context is full."""
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    client_id: str = ""
    """The client's own name for the request: a label."""
    wants_receipt: bool = False
    policy: str | None = None
    session: str = ""
    """Requests of one session like to go where the last one went; empty for none. A hint."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        prompt = pack_tokens(self.prompt) if isinstance(self.prompt, array) else self.prompt
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "prompt": prompt, "stop": list(self.stop)}

    @classmethod
    def from_wire(cls, data: Any) -> "CompletionRequest":
        """Raises ProtocolError for missing or mistyped fields; unknown ones are ignored."""
        if not isinstance(data, dict) or data.get("kind") not in _KINDS:
            raise ProtocolError("a completion request is a map with a kind")
        values = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        for name, expected in _TYPES.items():
            if name in values and not isinstance(values[name], expected):
                raise ProtocolError(f"completion request: {name} is malformed")
        if isinstance(values.get("prompt"), bytes):
            values["prompt"] = unpack_tokens(values["prompt"])
        values["stop"] = tuple(values.get("stop", ()))
        if not all(isinstance(text, str) for text in values["stop"]) or not {"model", "request_id"} <= values.keys():
            raise ProtocolError("completion request: stop, model or request_id are missing or malformed")
        return cls(**values)


_TYPES: dict[str, Any] = {
    "request_id": str,
    "model": str,
    "prompt": (str, bytes, type(None)),
    "messages": (list, type(None)),
    "max_tokens": (int, type(None)),
    "min_tokens": int,
    "temperature": (int, float, type(None)),
    "top_p": (int, float),
    "top_k": int,
    "seed": (int, type(None)),
    "ignore_eos": bool,
    "stop": list,
    "client_id": str,
    "wants_receipt": bool,
    "policy": (str, type(None)),
    "session": str,
}

"""From the items of a processor's stream to one API's answer, whole or as events: what all APIs have in common. Pure."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError
from meshserve.roles.frontend.models.common import Parsed, ResponseOptions
from meshserve.roles.frontend.shapes import error_body
from meshserve.wire.completion import CallItem, CompletionRequest, Ending, EndItem, Item, PartItem, StartItem, TextItem, read_item

EVENT_STREAM = "text/event-stream; charset=utf-8"


@dataclass(slots=True)
class Reply:
    """What a writer needs to know."""

    response_id: str
    created_s: int
    request: CompletionRequest
    options: ResponseOptions

    def call_id(self, choice: int, prefix: str, number: int = 0) -> str:
        """Names a call, or another part, of this choice: no other in the mesh has the same."""
        later = f"n{number}" if number else ""
        return f"{prefix}{self.request.request_id}{choice:02x}{later}".replace("-", "")


class Writer(Protocol):
    """One answer in the making. Raises ProtocolError for what a processor must not say."""

    is_stream: bool
    """Whether what items come to is sent as they come."""
    headers: bytes
    """Of the response, as they stand in its head."""
    ping: bytes
    """What says to the client that the stream lives, and nothing else."""

    def feed(self, items: Sequence[Any]) -> bytes:
        """What these items add to the response; empty for an answer that is given in one piece."""

    def end(self, ending: Ending) -> bytes:
        """The rest of the response."""

    def fail(self, error: MeshserveError) -> bytes:
        """The end of a response that failed after its first byte: nobody can take it for complete."""


Parse = Callable[[bytes, str, str], Parsed]
"""Body, the mesh's name of the request, the client's; raises InvalidRequest that names the field."""


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


class EventWriter:
    """Reads items, and asks an API's own writer for the events that they stand for, as text."""

    is_stream = True
    headers = f"content-type: {EVENT_STREAM}\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n".encode()
    ping = b": ping\n\n"
    """A comment, which clients pass over (HTML standard, section 9.2.6)."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._num_choices = reply.request.num_choices

    def feed(self, items: Sequence[Any]) -> bytes:
        return "".join([self._events(item) for item in items]).encode()

    def _events(self, item: Any) -> str:
        found = self._checked(read_item(item))
        if isinstance(found, TextItem):
            return self._text(found)
        if isinstance(found, CallItem):
            return self._call(found)
        if isinstance(found, PartItem):
            return self._part(found)
        if isinstance(found, EndItem):
            return self._finish(found)
        return self._start(found)

    def _checked(self, item: Item) -> Item:
        if not isinstance(item, StartItem) and not 0 <= item.choice < self._num_choices:
            raise ProtocolError("an item of a choice that nobody asked for")
        return item

    def _start(self, item: StartItem) -> str:
        return ""

    def _text(self, item: TextItem) -> str:
        raise AssertionError("each API words its own")

    def _call(self, item: CallItem) -> str:
        raise AssertionError("each API words its own")

    def _part(self, item: PartItem) -> str:
        raise AssertionError("each API words its own")

    def _finish(self, item: EndItem) -> str:
        raise AssertionError("each API words its own")


def arguments_of(text: str) -> dict[str, Any]:
    """Those of a call, for APIs that give them as an object; none if the limit of tokens cut them short, as the reason then says."""
    try:
        arguments = json.loads(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


@dataclass(slots=True)
class Part:
    """A piece of one choice: of its `text`, its `reasoning`, or a `call`, whose text is the arguments."""

    kind: str
    name: str = ""
    """Of the function that is called."""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


@dataclass(slots=True)
class Collected:
    """One choice of an answer that is given in one piece."""

    parts: list[Part] = field(default_factory=lambda: [Part("text")])
    """In the order in which they came; text before anything else, which may be empty."""
    offsets: list[int] = field(default_factory=list)
    reason: str = ""
    stop: str | None = None

    @property
    def text(self) -> str:
        """All that is neither reasoning nor part of a call."""
        return "".join([text for part in self.parts if part.kind == "text" for text in part.texts])

    @property
    def reasoning(self) -> str:
        """All of it."""
        return "".join([part.text for part in self.parts if part.kind == "reasoning"])

    @property
    def logprobs(self) -> list[Any]:
        """Of all tokens."""
        return [entry for part in self.parts for entry in part.logprobs]

    @property
    def calls(self) -> list[Part]:
        """Those that it makes."""
        return [part for part in self.parts if part.kind == "call"]

    @property
    def shown(self) -> list[Part]:
        """Parts with something in them; if there is none, a text that is empty."""
        return [part for part in self.parts if part.kind == "call" or part.text] or self.parts[:1]


class WholeWriter:
    """Gathers items until the end."""

    is_stream = False
    headers = b"content-type: application/json\r\n"
    ping = b""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._choices = [Collected() for _ in range(reply.request.num_choices)]

    def feed(self, items: Sequence[Any]) -> bytes:
        first = self._choices[0]
        plain = first.parts[-1].texts
        for item in items:
            if type(item) is str:
                plain.append(item)
            else:
                self._take(read_item(item))
                plain = first.parts[-1].texts
        return b""

    def _take(self, item: Item) -> None:
        if isinstance(item, StartItem):
            return
        if not 0 <= item.choice < len(self._choices):
            raise ProtocolError("an item of a choice that nobody asked for")
        choice = self._choices[item.choice]
        if isinstance(item, TextItem):
            choice.parts[-1].texts.append(item.text)
            choice.parts[-1].logprobs += item.logprobs or ()
            choice.offsets += item.offsets or ()
        elif isinstance(item, CallItem):
            choice.parts.append(Part("call", item.name))
        elif isinstance(item, PartItem):
            choice.parts.append(Part(item.kind))
        else:
            choice.reason, choice.stop = item.reason, item.stop

    def end(self, ending: Ending) -> bytes:
        for choice in self._choices:
            if not choice.reason:  # of a plain answer, which has one choice
                choice.reason, choice.stop = ending.reason, ending.stop
        return self._body(ending)

    def fail(self, error: MeshserveError) -> bytes:
        raise AssertionError("nothing was sent yet: the error is the whole response")

    def _body(self, ending: Ending) -> bytes:
        raise AssertionError("each API words its own")

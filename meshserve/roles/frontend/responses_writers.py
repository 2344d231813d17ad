"""OpenAI's Responses API: the answer as one object, or as typed and numbered events in their official order. Pure."""

from typing import Any

from meshserve.errors import MeshserveError
from meshserve.roles.frontend.shapes import dump, token_entries
from meshserve.roles.frontend.writers import EventWriter, Part, Reply, WholeWriter
from meshserve.wire.completion import CallItem, Ending, EndItem, PartItem, TextItem

Json = dict[str, Any]

_TYPES = {"text": "message", "reasoning": "reasoning", "call": "function_call"}
_PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}
_EVENTS = {"text": "response.output_text", "reasoning": "response.reasoning_text", "call": "response.function_call_arguments"}
"""By kind of part: the type of its item, the prefixes of the item's id and of the events of its text."""


def response_object(reply: Reply, status: str, output: list[Json], ending: Ending | None = None) -> Json:
    """The response as it stands."""
    is_cut = status == "incomplete"
    response = {
        "id": reply.response_id,
        "object": "response",
        "created_at": reply.options.created_s or reply.created_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": reply.request.model,
        "output": output,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        "usage": usage_of(ending) if ending is not None else None,
        **(reply.options.echoed or {}),
    }
    if ending is not None and ending.receipt is not None:
        response["meshserve"] = ending.receipt
    return response


def usage_of(ending: Ending) -> Json:
    """This API's usage object."""
    return {
        "input_tokens": ending.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": ending.num_cached_tokens},
        "output_tokens": ending.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": ending.num_prompt_tokens + ending.num_completion_tokens,
    }


def _status_of(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"


def _content_of(part: Part, logprobs: list[Json]) -> Json:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}


def output_item(reply: Reply, number: int, status: str, part: Part, logprobs: list[Json], *, is_begun: bool = False) -> Json:
    """One item of the output: a message, reasoning or a call; one that has just begun has no content."""
    kind = part.kind
    named = {"id": reply.call_id(0, _PREFIXES[kind], number), "type": _TYPES[kind], "status": status}
    if kind == "call":
        return {**named, "call_id": reply.call_id(0, "call_", number), "name": part.name, "arguments": part.text}
    content = [] if is_begun else [_content_of(part, logprobs)]
    more: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
    return {**named, **more, "content": content}


class WholeResponse(WholeWriter):
    """A response that is not streamed."""

    def _body(self, ending: Ending) -> bytes:
        return dump(self.response(ending)).encode()

    def response(self, ending: Ending) -> Json:
        """The response, once all is there."""
        choice = self._choices[0]
        status = _status_of(choice.reason)
        *before, last = choice.shown
        output = [output_item(self._reply, number, "completed", part, token_entries(part.logprobs)) for number, part in enumerate(before)]
        output.append(output_item(self._reply, len(before), status, last, token_entries(last.logprobs)))
        return response_object(self._reply, status, output, ending)


class ResponseEvents(EventWriter):
    """A streamed response: output items one after the other, each a message, reasoning or a call."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._sequence = 0
        self._current = Part("text")
        """The item that is open, or that the next text opens."""
        self._logprobs: list[Json] = []
        self._is_open = False
        self._output: list[Json] = []
        """Items that are complete."""
        self._reason = ""

    def _event(self, kind: str, fields: Json) -> str:
        text = f"event: {kind}\ndata: {dump({'type': kind, 'sequence_number': self._sequence, **fields})}\n\n"
        self._sequence += 1
        return text

    def _created(self) -> str:
        if self._sequence:
            return ""
        started = {"response": response_object(self._reply, "in_progress", [])}
        return self._event("response.created", started) + self._event("response.in_progress", started)

    @property
    def _place(self) -> Json:
        kind, number = self._current.kind, len(self._output)
        place: Json = {"item_id": self._reply.call_id(0, _PREFIXES[kind], number), "output_index": number}
        return place if kind == "call" else {**place, "content_index": 0}

    def _item(self, status: str, *, is_begun: bool = False) -> Json:
        return output_item(self._reply, len(self._output), status, self._current, self._logprobs, is_begun=is_begun)

    def _open(self) -> str:
        """The item's beginning, once it is known what it will be."""
        if self._is_open:
            return ""
        self._is_open = True
        added = {"output_index": len(self._output), "item": self._item("in_progress", is_begun=True)}
        opening = self._created() + self._event("response.output_item.added", added)
        if self._current.kind == "call":
            return opening
        return opening + self._event("response.content_part.added", {**self._place, "part": _content_of(self._current, self._logprobs)})

    def _text(self, item: TextItem) -> str:
        if not item.text and not item.logprobs:
            return self._created()
        opening = self._open()
        self._current.texts.append(item.text)
        delta = {**self._place, "delta": item.text}
        if self._current.kind == "text":
            delta["logprobs"] = token_entries(item.logprobs or [])
            self._logprobs += delta["logprobs"]
        return opening + self._event(f"{_EVENTS[self._current.kind]}.delta", delta)

    def _call(self, item: CallItem) -> str:
        return self._turn_to(Part("call", item.name)) + self._open()

    def _part(self, item: PartItem) -> str:
        return self._turn_to(Part(item.kind))

    def _turn_to(self, part: Part) -> str:
        closing = self._close("completed") if self._is_open else ""
        self._current, self._logprobs = part, []
        return closing

    def _finish(self, item: EndItem) -> str:
        self._reason = item.reason
        return ""

    def end(self, ending: Ending) -> bytes:
        status = _status_of(self._reason or ending.reason)
        closing = ""
        if self._is_open or not self._output:
            closing = self._open() + self._close(status)
        told = {"response": response_object(self._reply, status, self._output, ending)}
        return (closing + self._event(f"response.{status}", told)).encode()

    def _close(self, status: str) -> str:
        """The end of the item that is open."""
        kind, place, item = self._current.kind, self._place, self._item(status)
        said: Json = {"arguments": self._current.text, "name": self._current.name} if kind == "call" else {"text": self._current.text}
        if kind == "text":
            said["logprobs"] = self._logprobs
        closing = self._event(f"{_EVENTS[kind]}.done", {**place, **said})
        if kind != "call":
            closing += self._event("response.content_part.done", {**place, "part": _content_of(self._current, self._logprobs)})
        closing += self._event("response.output_item.done", {"output_index": len(self._output), "item": item})
        self._output.append(item)
        self._is_open = False
        return closing

    def fail(self, error: MeshserveError) -> bytes:
        """The error, and the response as failed."""
        opening = self._created()
        told = self._event("error", {"code": error.code, "message": error.message, "param": None})
        output = [*self._output, self._item("incomplete")] if self._is_open else self._output
        failed = response_object(self._reply, "failed", output)
        failed["error"] = {"code": "server_error", "message": f"{error.code}: {error.message}"}
        return (opening + told + self._event("response.failed", {"response": failed})).encode()

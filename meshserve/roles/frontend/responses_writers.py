"""OpenAI's Responses API: the answer as one object, or as typed and numbered events in their official order. Pure."""

from typing import Any

from meshserve.errors import MeshserveError
from meshserve.roles.frontend.logprobs import token_entries
from meshserve.roles.frontend.shapes import dump
from meshserve.roles.frontend.writers import Collected, EventWriter, Reply, WholeWriter
from meshserve.wire.completion import CallItem, Ending, EndItem, TextItem

Json = dict[str, Any]


def response_object(reply: Reply, status: str, output: list[Json], ending: Ending | None = None) -> Json:
    """The response as it stands."""
    is_cut = status == "incomplete"
    response = {
        "id": reply.response_id,
        "object": "response",
        "created_at": reply.created_s,
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


def _text_part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message(reply: Reply, status: str, content: list[Json]) -> Json:
    return {"id": reply.call_id(0, "msg_"), "type": "message", "status": status, "role": "assistant", "content": content}


def _function_call(reply: Reply, status: str, name: str, arguments: str) -> Json:
    named = {"id": reply.call_id(0, "fc_"), "type": "function_call", "status": status, "call_id": reply.call_id(0, "call_")}
    return {**named, "name": name, "arguments": arguments}


class WholeResponse(WholeWriter):
    """A response that is not streamed."""

    def _body(self, ending: Ending) -> bytes:
        choice = self._choices[0]
        status = _status_of(choice.reason)
        return dump(response_object(self._reply, status, self._output(choice, status), ending)).encode()

    def _output(self, choice: Collected, status: str) -> list[Json]:
        if choice.name is not None:
            return [_function_call(self._reply, status, choice.name, choice.text)]
        return [_message(self._reply, status, [_text_part(choice.text, token_entries(choice.logprobs))])]


class ResponseEvents(EventWriter):
    """A streamed response: one output item, a message or a call."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._sequence = 0
        self._name: str | None = None
        """Of the function that is called."""
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._is_open = False
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
        prefix = "msg_" if self._name is None else "fc_"
        place: Json = {"item_id": self._reply.call_id(0, prefix), "output_index": 0}
        return place if self._name is not None else {**place, "content_index": 0}

    def _open(self) -> str:
        """The item's beginning, once it is known what it will be."""
        if self._is_open:
            return ""
        self._is_open = True
        if self._name is not None:
            item = _function_call(self._reply, "in_progress", self._name, "")
            return self._created() + self._event("response.output_item.added", {"output_index": 0, "item": item})
        item = _message(self._reply, "in_progress", [])
        return (
            self._created()
            + self._event("response.output_item.added", {"output_index": 0, "item": item})
            + self._event("response.content_part.added", {**self._place, "part": _text_part("", [])})
        )

    def _text(self, item: TextItem) -> str:
        if not item.text and not item.logprobs:
            return self._created()
        opening = self._open()
        self._texts.append(item.text)
        if self._name is not None:
            return opening + self._event("response.function_call_arguments.delta", {**self._place, "delta": item.text})
        logprobs = token_entries(item.logprobs or [])
        self._logprobs += logprobs
        return opening + self._event("response.output_text.delta", {**self._place, "delta": item.text, "logprobs": logprobs})

    def _call(self, item: CallItem) -> str:
        self._name = item.name
        return self._open()

    def _finish(self, item: EndItem) -> str:
        self._reason = item.reason
        return ""

    def end(self, ending: Ending) -> bytes:
        status = _status_of(self._reason or ending.reason)
        text = "".join(self._texts)
        closing = self._open() + (self._close_text(text, status) if self._name is None else self._close_call(text, status))
        output = [self._item(text, status)]
        return (closing + self._event(f"response.{status}", {"response": response_object(self._reply, status, output, ending)})).encode()

    def _item(self, text: str, status: str) -> Json:
        if self._name is not None:
            return _function_call(self._reply, status, self._name, text)
        return _message(self._reply, status, [_text_part(text, self._logprobs)])

    def _close_text(self, text: str, status: str) -> str:
        return (
            self._event("response.output_text.done", {**self._place, "text": text, "logprobs": self._logprobs})
            + self._event("response.content_part.done", {**self._place, "part": _text_part(text, self._logprobs)})
            + self._event("response.output_item.done", {"output_index": 0, "item": self._item(text, status)})
        )

    def _close_call(self, text: str, status: str) -> str:
        done = {**self._place, "name": self._name, "arguments": text}
        return self._event("response.function_call_arguments.done", done) + self._event(
            "response.output_item.done", {"output_index": 0, "item": self._item(text, status)}
        )

    def fail(self, error: MeshserveError) -> bytes:
        """The error, and the response as failed."""
        opening = self._created()
        told = self._event("error", {"code": error.code, "message": error.message, "param": None})
        text = "".join(self._texts)
        failed = response_object(self._reply, "failed", [self._item(text, "incomplete")] if self._is_open else [])
        failed["error"] = {"code": "server_error", "message": f"{error.code}: {error.message}"}
        return (opening + told + self._event("response.failed", {"response": failed})).encode()

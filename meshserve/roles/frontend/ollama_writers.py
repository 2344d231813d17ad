"""Ollama's answers, whole or a JSON object a line, and its errors. Pure."""

from datetime import UTC, datetime
from typing import Any

from meshserve.errors import InvalidRequest, MeshserveError
from meshserve.roles.frontend.shapes import dump, token_entries
from meshserve.roles.frontend.writers import EventWriter, Part, Reply, WholeWriter, arguments_of
from meshserve.wire.completion import CallItem, Ending, EndItem, PartItem, TextItem

Json = dict[str, Any]
LINES = b"content-type: application/x-ndjson\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
_LOADING = ("process", "route", "queue")
"""Phases before a worker computes: this API calls them loading."""
_PROMPT = ("prefill", "kv_transfer")


def error_body(error: MeshserveError) -> bytes:
    """This API's error object: `error` is the message; `code` and `param` are those of the other APIs."""
    param = error.param if isinstance(error, InvalidRequest) else None
    return dump({"error": error.message, "code": error.code, "param": param}).encode()


def time_text(unix_s: int) -> str:
    """A time as this API writes times (RFC 3339)."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def message_of(content: str, **more: Any) -> Json:
    """A part of an answer to a chat."""
    return {"message": {"role": "assistant", "content": content, **more}}


def response_of(content: str, **more: Any) -> Json:
    """A part of an answer to a prompt."""
    return {"response": content, **more}


def opening_of(model: str, unix_s: int) -> Json:
    """What all of an answer's lines begin with; the model's name is the client's."""
    return {"model": model, "created_at": time_text(unix_s)}


def _last(reply: Reply, ending: Ending, reason: str) -> Json:
    """What the end of an answer has besides. Durations are whole nanoseconds, and made of the receipt."""
    found: Json = {"done": True, "done_reason": "length" if reason == "length" else "stop"}
    receipt = ending.receipt
    if receipt is not None:
        phases_ms = receipt["phases_ms"]
        found["total_duration"] = _nanoseconds(receipt["total_ms"])
        found["load_duration"] = _nanoseconds(*map(phases_ms.get, _LOADING))
        found["prompt_eval_duration"] = _nanoseconds(*map(phases_ms.get, _PROMPT))
        found["eval_duration"] = _nanoseconds(phases_ms["decode"])
    found["prompt_eval_count"] = ending.num_prompt_tokens
    found["eval_count"] = ending.num_completion_tokens
    if receipt is not None and reply.options.shows_receipt:
        found["meshserve"] = receipt
    return found


def _nanoseconds(*durations_ms: float) -> int:
    return round(sum(durations_ms) * 1e6)


def _tool_call(reply: Reply, number: int, name: str, text: str) -> Json:
    function = {"index": number, "name": name, "arguments": arguments_of(text)}
    return {"id": reply.call_id(0, "call_", number), "function": function}


class MessageLines(EventWriter):
    """A streamed answer to a chat. A call is one line, once all of its arguments are there."""

    headers = LINES
    said = staticmethod(message_of)

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._opening = dump(opening_of((reply.options.echoed or {})["model"], reply.created_s))[:-1]
        # the official clients read each line as JSON, so an empty part shows that the stream lives
        self.ping = self._line({**self.said(""), "done": False}).encode()
        self._kind = "text"
        """Of the text that comes next."""
        self._call_name, self._arguments = "", list[str]()
        """Of the call that is under way."""
        self._num_calls = 0
        self._reason = ""

    def _line(self, fields: Json) -> str:
        return f"{self._opening},{dump(fields)[1:]}\n"

    def _text(self, item: TextItem) -> str:
        if self._kind == "call":
            self._arguments.append(item.text)
            return ""
        if not item.text and not item.logprobs:
            return ""
        is_thought = self._kind == "reasoning"
        told = self.said("", thinking=item.text) if is_thought else self.said(item.text)
        if item.logprobs:
            told["logprobs"] = token_entries(item.logprobs)
        return self._line({**told, "done": False})

    def _call(self, item: CallItem) -> str:
        closing = self._turn_to("call")
        self._call_name = item.name
        return closing

    def _part(self, item: PartItem) -> str:
        return self._turn_to(item.kind)

    def _turn_to(self, kind: str) -> str:
        """The call that is under way, if there is one, is complete."""
        before, self._kind = self._kind, kind
        if before != "call":
            return ""
        call = _tool_call(self._reply, self._num_calls, self._call_name, "".join(self._arguments))
        self._num_calls += 1
        self._arguments.clear()
        return self._line({**self.said("", tool_calls=[call]), "done": False})

    def _finish(self, item: EndItem) -> str:
        self._reason = item.reason
        return self._turn_to("text")

    def end(self, ending: Ending) -> bytes:
        last = self._line({**self.said(""), **_last(self._reply, ending, self._reason or ending.reason)})
        return (self._turn_to("text") + last).encode()

    def fail(self, error: MeshserveError) -> bytes:
        return error_body(error) + b"\n"


class ResponseLines(MessageLines):
    """The same for a prompt."""

    said = staticmethod(response_of)


class WholeMessage(WholeWriter):
    """An answer to a chat that is not streamed."""

    said = staticmethod(message_of)

    def _body(self, ending: Ending) -> bytes:
        choice, reply = self._choices[0], self._reply
        more: Json = {"thinking": choice.reasoning} if choice.reasoning else {}
        if choice.calls:
            more["tool_calls"] = [self._numbered(*call) for call in enumerate(choice.calls)]
        told = self.said(choice.text, **more)
        if choice.logprobs:
            told["logprobs"] = token_entries(choice.logprobs)
        opening = opening_of((reply.options.echoed or {})["model"], reply.created_s)
        return dump({**opening, **told, **_last(reply, ending, choice.reason)}).encode()

    def _numbered(self, number: int, call: Part) -> Json:
        return _tool_call(self._reply, number, call.name, call.text)


class WholeResponse(WholeMessage):
    """The same for a prompt."""

    said = staticmethod(response_of)

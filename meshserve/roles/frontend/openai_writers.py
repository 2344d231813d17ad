"""The answers of OpenAI's completions and chats, and of `/generate`. What repeats in every chunk of a stream is encoded once. Pure."""

import json
from collections.abc import Sequence
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.roles.frontend.shapes import FINGERPRINT, chat_logprobs, completion_logprobs, dump, error_body
from meshserve.roles.frontend.writers import Collected, EventWriter, Part, Reply, WholeWriter
from meshserve.wire.completion import CallItem, Ending, EndItem, PartItem, TextItem

DONE = "data: [DONE]\n\n"

_encode_text = json.encoder.encode_basestring_ascii


def usage_of(ending: Ending) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": ending.num_prompt_tokens,
        "completion_tokens": ending.num_completion_tokens,
        "total_tokens": ending.num_prompt_tokens + ending.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": ending.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def usage_text(ending: Ending) -> str:
    """The same as JSON."""
    num_prompt, num_completion = ending.num_prompt_tokens, ending.num_completion_tokens
    return (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":{num_completion},"total_tokens":{num_prompt + num_completion},'
        f'"prompt_tokens_details":{{"cached_tokens":{ending.num_cached_tokens}}},"completion_tokens_details":{{"reasoning_tokens":0}}}}'
    )


class ChunkWriter(EventWriter):
    """Server-sent events of a streamed completion or chat."""

    _kind = "text_completion"
    _before_text, _after_text = '"text":', ',"logprobs":null,"finish_reason":null}]'

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        fields = {
            "id": reply.response_id,
            "object": self._kind,
            "created": reply.created_s,
            "model": reply.request.model,
            "system_fingerprint": FINGERPRINT,
        }
        self._empty = f'data: {dump(fields)[:-1]},"choices":'
        self._opening = self._empty + '[{"index":'
        self._null_usage = ',"usage":null' if reply.options.wants_usage else ""
        self._head = f"{self._opening}0,{self._before_text}"
        self._tail = f"{self._after_text}{self._null_usage}}}\n\n"
        self._finished: set[int] = set()
        self._is_plain = self._num_choices == 1
        """Whether text of the only choice needs nothing but a chunk around it."""

    def feed(self, items: Sequence[Any]) -> bytes:
        head, tail = self._head, self._tail
        chunks = []
        for item in items:
            if self._is_plain and type(item) is str:
                if item:
                    chunks.append(f"{head}{_encode_text(item)}{tail}")
            else:
                chunks.append(self._events(item))
        return "".join(chunks).encode()

    def _chunk(self, index: int, fields: dict[str, Any], more: str = "") -> str:
        """One choice's; `more` is what follows the choices."""
        return f"{self._opening}{index},{dump(fields)[1:]}]{more or self._null_usage}}}\n\n"

    def _text(self, item: TextItem) -> str:
        opening = self._begin(item.choice)
        if item.logprobs is not None:
            return opening + self._chunk(item.choice, self._with_logprobs(item))
        if not item.text:
            return opening
        return f"{opening}{self._opening}{item.choice},{self._before_text}{_encode_text(item.text)}{self._tail}"

    def _begin(self, choice: int, calls: bool = False) -> str:
        """What comes before a choice's first text."""
        return ""

    def _with_logprobs(self, item: TextItem) -> dict[str, Any]:
        logprobs = completion_logprobs(item.logprobs or [], item.offsets or [])
        return {"text": item.text, "logprobs": logprobs, "finish_reason": None}

    def _finish(self, item: EndItem) -> str:
        self._finished.add(item.choice)
        return self._chunk(item.choice, self._last(item.reason))

    def _last(self, reason: str) -> dict[str, Any]:
        return {"text": "", "logprobs": None, "finish_reason": reason}

    def end(self, ending: Ending) -> bytes:
        """The chunk with the finish reason, then the usage if it was asked for, then the end. A receipt rides on the last chunk."""
        receipt = "" if ending.receipt is None else ',"meshserve":' + dump(ending.receipt)
        wants_usage = self._reply.options.wants_usage
        last = ""
        if 0 not in self._finished:
            last = self._begin(0) + self._chunk(0, self._last(ending.reason), "" if wants_usage else receipt)
        if wants_usage:
            last += f'{self._empty}[],"usage":{dump(usage_of(ending))}{receipt}}}\n\n'
        elif receipt and 0 in self._finished:
            last += f"{self._empty}[]{receipt}}}\n\n"
        return (last + DONE).encode()

    def fail(self, error: MeshserveError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"  # no [DONE] follows


class ChatChunkWriter(ChunkWriter):
    """The same for a chat: each choice's first chunk has the role only, and text comes in deltas."""

    _kind = "chat.completion.chunk"
    _before_text, _after_text = '"delta":{"content":', '},"logprobs":null,"finish_reason":null}]'

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._begun: set[int] = set()
        self._parts: dict[int, str] = {}
        """Kinds of what the choices' texts are now, where that is not `text`."""
        self._num_calls: dict[int, int] = {}
        self._is_plain = False  # the role comes first

    def _begin(self, choice: int, calls: bool = False) -> str:
        if choice in self._begun:
            return ""
        self._begun.add(choice)
        self._is_plain = self._num_choices == 1 and not calls
        delta = {"role": "assistant", "content": None if calls else ""}
        return self._chunk(choice, {"delta": delta, "logprobs": None, "finish_reason": None})

    def _text(self, item: TextItem) -> str:
        kind = self._parts.get(item.choice, "text")
        if kind == "text":
            return super()._text(item)
        if not item.text and not item.logprobs:
            return ""
        logprobs = None if item.logprobs is None else chat_logprobs(item.logprobs)
        return self._chunk(item.choice, {"delta": self._delta(item, kind), "logprobs": logprobs, "finish_reason": None})

    def _delta(self, item: TextItem, kind: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"reasoning_content": item.text}
        return {"tool_calls": [{"index": self._num_calls[item.choice] - 1, "function": {"arguments": item.text}}]}

    def _with_logprobs(self, item: TextItem) -> dict[str, Any]:
        logprobs = chat_logprobs(item.logprobs or [])
        return {"delta": {"content": item.text}, "logprobs": logprobs, "finish_reason": None}

    def _call(self, item: CallItem) -> str:
        opening = self._begin(item.choice, calls=True) + self._turn_to(item.choice, "call")
        number = self._num_calls.get(item.choice, 0)
        self._num_calls[item.choice] = number + 1
        call = {"index": number, "id": self._reply.call_id(item.choice, "call_", number), "type": "function"}
        delta = {"tool_calls": [{**call, "function": {"name": item.name, "arguments": ""}}]}
        return opening + self._chunk(item.choice, {"delta": delta, "logprobs": None, "finish_reason": None})

    def _part(self, item: PartItem) -> str:
        return self._begin(item.choice) + self._turn_to(item.choice, item.kind)

    def _turn_to(self, choice: int, kind: str) -> str:
        self._parts[choice] = kind
        self._is_plain = self._num_choices == 1 and kind == "text"
        return ""

    def _finish(self, item: EndItem) -> str:
        return self._begin(item.choice) + super()._finish(item)

    def _last(self, reason: str) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None, "finish_reason": reason}


class WholeCompletion(WholeWriter):
    """A completion that is not streamed."""

    _kind = "text_completion"

    def _body(self, ending: Ending) -> bytes:
        choices = ",".join([self._choice_text(index, choice) for index, choice in enumerate(self._choices)])
        receipt = "" if ending.receipt is None else ',"meshserve":' + dump(ending.receipt)
        reply = self._reply
        return (
            f'{{"id":"{reply.response_id}","object":"{self._kind}","created":{reply.created_s},"model":{_encode_text(reply.request.model)},'
            f'"system_fingerprint":"{FINGERPRINT}","choices":[{choices}],"usage":{usage_text(ending)}{receipt}}}'
        ).encode()

    def _choice_text(self, index: int, choice: Collected) -> str:
        """A plain one is worded here, since an encoder costs as much as all else about it."""
        if self._reply.request.logprobs >= 0:
            return dump(self._choice(index, choice))
        return f'{{"index":{index},"text":{_encode_text(choice.text)},"logprobs":null,"finish_reason":{_encode_text(choice.reason)}}}'

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        logprobs = completion_logprobs(choice.logprobs, choice.offsets) if self._reply.request.logprobs >= 0 else None
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.reason}


class WholeChat(WholeCompletion):
    """A chat's answer that is not streamed."""

    _kind = "chat.completion"

    def _choice_text(self, index: int, choice: Collected) -> str:
        return dump(self._choice(index, choice))

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if len(choice.parts) > 1:
            message |= self._more(index, choice)
        logprobs = chat_logprobs(choice.logprobs) if self._reply.request.logprobs >= 0 else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _more(self, index: int, choice: Collected) -> dict[str, Any]:
        """What a message has besides its content."""
        more: dict[str, Any] = {"reasoning_content": choice.reasoning} if choice.reasoning else {}
        if calls := choice.calls:
            more |= {"content": choice.text or None, "tool_calls": [self._tool_call(index, *call) for call in enumerate(calls)]}
        return more

    def _tool_call(self, index: int, number: int, call: Part) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.text}
        return {"id": self._reply.call_id(index, "call_", number), "type": "function", "function": function}


class LineWriter(EventWriter):
    """`/generate`: a JSON object a line."""

    headers = b"content-type: application/x-ndjson\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._id = reply.request.client_id or reply.request.request_id
        self.ping = self._line({"text": ""}).encode()

    def _text(self, item: TextItem) -> str:
        return self._line({"text": item.text}) if item.text else ""

    def end(self, ending: Ending) -> bytes:
        last = {"finish_reason": ending.reason, "usage": usage_of(ending)}
        return self._line({**last, "meshserve": ending.receipt} if ending.receipt is not None else last).encode()

    def fail(self, error: MeshserveError) -> bytes:
        return error_body(error) + b"\n"

    def _line(self, fields: dict[str, Any]) -> str:
        return dump({"request_id": self._id, **fields}) + "\n"

"""A script for the dummy model: what it says and which tools it calls, by turn, so that a program that drives a model can be
driven to its end. Pure, but for the reading of the file.

The file is a JSON list of turns, `{"reasoning", "text", "calls": [{"name", "arguments"}]}`, each part optional. Which turn it is, and
which tools there are, the model reads in its prompt, as other models do: so a handoff or another worker changes nothing. What it says goes
through the sampler, token by token. A call of a tool that the prompt does not offer, or with arguments that are not valid under the tool's
schema, ends the request in an error; a prompt that offers no tools is answered as without a script where the turn has calls.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from meshserve.engines.constraints.constraint import ConstraintCompiler
from meshserve.engines.constraints.keeping import outline
from meshserve.engines.constraints.ordering import in_order
from meshserve.engines.dummy.constrained import BLANK, ConstrainedOutput
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import InvalidRequest, Unsupported, UsageError

Json = dict[str, Any]

TEMPLATE = (
    "{% for tool in tools or [] %}\x1dtool {{ tool.function | tojson }}\n{% endfor %}"
    "{% for message in messages %}\x1e{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}\x1eassistant\n{% endif %}"
)
"""The chat template of a model with a script: marks that no text has, so that turns and tools can be told from what is said."""
_TURN, _TOOL = "\x1eassistant\n", re.compile("^\x1dtool (.*)$", re.MULTILINE)
_PARTS = frozenset(("reasoning", "text", "calls"))
_BYTES = [bytes([value]) for value in range(256)]
_END = len(_BYTES)


@dataclass(frozen=True, slots=True)
class Script:
    """The turns, as the file has them."""

    turns: tuple[Json, ...]
    digest: str

    def output(self, prompt: Sequence[int], constrained: ConstrainedOutput | None) -> "ScriptedOutput | None":
        """The bytes that the model writes after this prompt; None if the script has no turn for it.

        Raises InvalidRequest for calls that the prompt's tools do not allow.
        """
        text = bytes([token for token in prompt if token < _END]).decode("utf-8", "replace")
        number = text.count(_TURN) - text.endswith(_TURN)
        if number >= len(self.turns):
            return None
        turn, tools = self.turns[number], _tools_in(text)
        if turn.get("calls") and not tools:
            return None
        calls = [_written(call, tools) for call in turn.get("calls", ())]
        if constrained is not None:
            said = calls[0] if calls else turn.get("text", "")
        else:
            thought = f"<think>{turn['reasoning']}</think>" if turn.get("reasoning") else ""
            said = thought + turn.get("text", "") + "".join([f"<tool_call>{call}</tool_call>" for call in calls])
        return ScriptedOutput(said.encode("utf-8", "replace"), constrained)


def read_script(path: Path) -> Script:
    """The script in this file. Raises UsageError, in one sentence, if the file has no valid script."""
    try:
        data = path.read_bytes()
        turns = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the dummy engine's option script: {path} cannot be read: {error}") from error
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        words = "is a list of turns, each with reasoning, text or calls of a name and arguments"
        raise UsageError(f"the dummy engine's option script: {path} {words}")
    return Script(tuple(turns), xxhash.xxh3_128_hexdigest(data))


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or not _PARTS.issuperset(turn):
        return False
    calls = turn.get("calls", [])
    are_calls = isinstance(calls, list) and all(map(_is_call, calls))
    return are_calls and all(isinstance(turn.get(name, ""), str) for name in ("reasoning", "text"))


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)


def _tools_in(prompt: str) -> dict[str, Json]:
    """The parameters of the prompt's tools, by name."""
    found: dict[str, Json] = {}
    for line in _TOOL.findall(prompt):
        function = json.loads(line)
        found[function["name"]] = function.get("parameters") or {}
    return found


def _written(call: Json, tools: dict[str, Json]) -> str:
    """The call as models write calls."""
    name, arguments = call["name"], call["arguments"]
    if name not in tools:
        raise InvalidRequest(f"the script calls {name!r}, which is not among the tools {', '.join(tools)}", param="tools")
    written = {"name": name, "arguments": in_order(arguments, tools[name])}
    if not _is_valid(json.dumps(tools[name]), json.dumps(written["arguments"], ensure_ascii=False)):
        raise InvalidRequest(f"the script calls {name!r} with arguments that its schema does not allow", param="tools")
    return json.dumps(written, ensure_ascii=False)


def _is_valid(schema: str, text: str) -> bool:
    data = text.encode("utf-8", "replace")
    try:
        constraint = _compiler().compile(json_schema=schema)
    except Unsupported:  # what no output can be kept to by a grammar: its types and names are all that is looked at
        constraint = _compiler().compile(json_schema=json.dumps(outline(json.loads(schema))))
    return constraint.num_allowed(list(data)) == len(data)


@lru_cache(maxsize=1)
def _compiler() -> ConstraintCompiler:
    return ConstraintCompiler(lambda: [*_BYTES, b""], [_END], str.encode)


class ScriptedOutput:
    """Stands in for the model's own choice: the one next byte is the only candidate. Under a constraint the bytes must keep to it."""

    __slots__ = ("_constrained", "_num_taken", "_text")

    def __init__(self, text: bytes, constrained: ConstrainedOutput | None) -> None:
        self._text, self._constrained, self._num_taken = text, constrained, 0

    def take(self, token: int) -> None:
        """A token was chosen. Raises InvalidRequest for one that the constraint does not allow."""
        self._num_taken += 1
        if self._constrained is not None:
            self._constrained.take(token)

    def candidates(self, context: int, can_end: bool) -> list[int]:
        """The next byte, then the end of the sequence, or blanks where the output must go on."""
        if self._num_taken < len(self._text):
            return [self._text[self._num_taken]]
        if self._constrained is not None:
            return self._constrained.candidates(context, can_end)
        return [EOS_TOKEN if can_end else BLANK]

"""The forms in which calls of tools are written, and how a call is read from text that grows. Pure.

Each decision is a function of the text up to one character, and holds whatever follows: so it does not depend on how the text was split.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from meshserve.wire.structs import is_shallow

MAX_SPACE_CHARACTERS = 256
"""White space in one place around a call. Models may write it without end, and what is held back is looked at again with every token."""
SPACE = rf"\s{{0,{MAX_SPACE_CHARACTERS}}}+"
"""Such white space, in a pattern. It is never given back, so that two in a row are not tried at every place between them."""
_HEAD = re.compile(
    rf'{SPACE}\{{{SPACE}"name"{SPACE}:{SPACE}("[^"\\]*+(?:\\.[^"\\]*+)*"){SPACE},{SPACE}"arguments"{SPACE}:{SPACE}(?=\S)',
)
_MAX_HEAD_CHARACTERS = 4096
"""What has a longer head is read at its end."""
_MARKS = re.compile(r'[\\"{}\[\]]')
MAX_CALL_CHARACTERS = 262_144
"""Of one call. What is longer is text: a call is held back until it is complete."""

_KEYS = frozenset(("name", "arguments", "parameters", "type", "function", "id"))
"""With which a call without a marker may begin: any other JSON is let through at its first name."""
_KEY = rf"\w{{0,{max(map(len, _KEYS))}}}+"
_FIRST_KEY = re.compile(rf'\[?{SPACE}\{{{SPACE}"({_KEY})"')
_FIRST_KEY_BEGUN = re.compile(rf'\[?{SPACE}(?:\{{{SPACE}(?:"{_KEY})?)?')
_NAME_BEGUN = re.compile(rf'"name"{SPACE}:{SPACE}"([^"\\]*+)("?)')
_NEXT_CALL = re.compile(rf"{SPACE}(?:;{SPACE})?(?=[\[{{])")
_REST = re.compile(rf"{SPACE}(?:;{SPACE})?(?:```{SPACE})?")
_REST_BEGUN = re.compile(rf"{SPACE}(?:;{SPACE})?(?:`{{1,3}}{SPACE})?")


Accepts = Callable[[str, dict[str, Any]], bool]
"""Whether a call of this function with these arguments counts."""


class Event(NamedTuple):
    """A piece of an answer: of its `text` or `reasoning`; a `call` (the function's name), its `arguments`, and its `end`."""

    kind: str
    text: str


class Call(NamedTuple):
    """A call of a function that exists; the arguments are a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One form of calls."""

    opener: str
    """The marker that they begin with; empty: the answer is nothing but calls."""
    head: re.Pattern[str]
    """From the marker up to the JSON; a group is the function's name, where it stands before the JSON."""
    head_begun: re.Pattern[str]
    """Matches every beginning of what `head` matches."""
    closer: str = ""
    """What must follow the JSON."""
    is_last: bool = False
    """Nothing but more calls follows, up to the end of the answer."""


HERMES = CallFormat("<tool_call>", re.compile(rf"<tool_call>{SPACE}(?=\{{)()"), re.compile(rf"<tool_call>{SPACE}"), closer="</tool_call>")
"""Hermes and Qwen: `<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`."""
MISTRAL = CallFormat(
    "[TOOL_CALLS]",
    re.compile(rf"\[TOOL_CALLS\]{SPACE}(?:(?=\[)|([\w.-]{{1,128}}+)(?:\[CALL_ID\]\w{{1,32}}+)?(?:\[ARGS\])?{SPACE}(?=\{{))"),
    re.compile(rf"\[TOOL_CALLS\]{SPACE}(?:[\w.-]{{1,128}}+[\w\[\]]{{0,64}}+{SPACE})?"),
)
"""`[TOOL_CALLS][{"name": NAME, "arguments": {...}}, ...]`, or for each call `[TOOL_CALLS]NAME[ARGS]{...}`."""
LLAMA = CallFormat(
    "<|python_tag|>", re.compile(rf"<\|python_tag\|>{SPACE}(?=[\[{{])()"), re.compile(rf"<\|python_tag\|>{SPACE}"), is_last=True
)
"""Llama 3: `<|python_tag|>{"name": NAME, "parameters": {...}}`, further ones after a semicolon."""
BARE = CallFormat(
    "",
    re.compile(rf"{SPACE}(?:```(?:json|tool_call)?{SPACE})?(?=[\[{{])()"),
    re.compile(rf"{SPACE}(?:`{{1,2}}|```\w{{0,9}}+{SPACE})?"),
    is_last=True,
)
"""The whole answer is such an object, several, or a list of them, with or without a fence around it."""
ALL_FORMATS = (HERMES, MISTRAL, LLAMA, BARE)


def formats_of(template: str) -> tuple[CallFormat, ...]:
    """The forms that a model with this chat template writes: those whose markers are in it, and bare JSON; all of them if none is."""
    marked = tuple(found for found in ALL_FORMATS if found.opener and found.opener in template)
    return (*marked, BARE) if marked else ALL_FORMATS


class Brackets:
    """Finds the bracket that closes the first one, in the text of a JSON value that comes in pieces."""

    __slots__ = ("_depth", "_escaped", "_in_string", "is_over")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_over = False
        """The closing bracket was found."""

    def feed(self, text: str) -> int:
        """How much of this text belongs to the value: up to and with the closing bracket."""
        place = 0
        while place < len(text) and not self.is_over:
            if self._escaped:
                self._escaped, place = False, place + 1
            elif (found := _MARKS.search(text, place)) is not None:
                place = found.end()
                self._mark(found[0])
            else:
                place = len(text)
        return place

    def _mark(self, mark: str) -> None:
        if mark == "\\":
            self._escaped = self._in_string
        elif mark == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += 1 if mark in "{[" else -1
            self.is_over = self._depth <= 0


class CallReader:
    """Reads calls of one format from a text that begins with its marker."""

    __slots__ = ("_accepts", "_at", "_brackets", "_calls", "_format", "_is_closed", "_json_at", "_name", "_names", "opener")

    def __init__(self, form: CallFormat, names: Collection[str], accepts: Accepts | None = None) -> None:
        self._format, self._names, self._accepts, self.opener = form, names, accepts, form.opener
        self._calls: list[Call] = []
        self._brackets: Brackets | None = None
        self._json_at = self._at = 0
        """Where the JSON began, and how far the text was read."""
        self._name = ""
        self._is_closed = False
        """The text was read up to the end of the JSON."""

    def read(self, text: str, is_end: bool) -> tuple[list[Call], int] | None:
        """The calls, and where the text goes on after them; no calls if the text is none; None if that
        depends on text to come.

        The text is all that came since the marker, and longer with each call.
        """
        while True:  # some formats have several calls after one marker
            found = self._tail(text, is_end) if self._is_closed else self._body(text, is_end)
            if found is None or not found[0]:
                return None if found is None and not is_end else ([], 0)
            if found[1]:
                return found

    def cut_short(self, text: str) -> list[Call] | None:
        """The answer was cut off within this text: the calls that are complete, without the one that is not. None if it is no call."""
        if self.read(text, is_end=False) is not None:
            return None
        if not self._format.opener and not self._is_of_a_name(text):
            return None
        return self._calls

    def _is_of_a_name(self, text: str) -> bool:
        """Whether JSON without a marker names a function that exists, or may still do so."""
        if self._calls or _FIRST_KEY_BEGUN.fullmatch(text, self._json_at):
            return True
        name = _NAME_BEGUN.search(text, self._json_at)
        if name is None:
            return False
        return name[1] in self._names if name[2] else any(known.startswith(name[1]) for known in self._names)

    def _body(self, text: str, is_end: bool) -> tuple[list[Call], int] | None:
        """Read up to the end of the JSON. Returns the calls in it, and 0, since the text goes on."""
        if self._brackets is None:
            head = self._format.head.match(text)
            if head is None:
                return None if self._format.head_begun.fullmatch(text) else ([], 0)
            self._name, self._json_at, self._at = head[1] or "", head.end(), head.end()
            self._brackets = Brackets()
        # without a marker any JSON begins like a call: its first name tells, so that other JSON is not held back
        if not self._format.opener and not self._may_be_call(text):
            return [], 0
        self._at += self._brackets.feed(text[self._at :])
        if self._at - self._json_at > MAX_CALL_CHARACTERS:
            return [], 0
        if not self._brackets.is_over:
            return None
        self._is_closed = True
        is_marked = bool(self._format.opener)
        found = calls_in(text[self._json_at : self._at], self._names, self._name, is_marked=is_marked, accepts=self._accepts)
        self._calls += found
        return found, 0

    def _may_be_call(self, text: str) -> bool:
        key = _FIRST_KEY.match(text, self._json_at)
        return key[1] in _KEYS if key is not None else _FIRST_KEY_BEGUN.fullmatch(text, self._json_at) is not None

    def _tail(self, text: str, is_end: bool) -> tuple[list[Call], int] | None:
        """Read what follows the JSON. Returns all calls and where they end, or 0 where another one begins."""
        if self._format.is_last:
            return self._last(text, is_end)
        closer, following = self._format.closer, text[self._at :]
        if not closer:
            return self._calls, self._at
        rest = following.lstrip()
        if len(following) - len(rest) > MAX_SPACE_CHARACTERS:  # a model that goes on like this ends nowhere
            return [], 0
        if rest.startswith(closer):
            return self._calls, len(text) - len(rest) + len(closer)
        return None if closer.startswith(rest) else ([], 0)

    def _last(self, text: str, is_end: bool) -> tuple[list[Call], int] | None:
        if is_end and _REST.fullmatch(text, self._at):
            return self._calls, len(text)
        following = _NEXT_CALL.match(text, self._at)
        if following is None:
            return None if _REST_BEGUN.fullmatch(text, self._at) else ([], 0)
        self._json_at = self._at = following.end()
        self._brackets, self._is_closed = Brackets(), False
        return self._calls, 0


def calls_in(text: str, names: Collection[str], name: str = "", *, is_marked: bool = True, accepts: Accepts | None = None) -> list[Call]:
    """The calls that this JSON is, of the function of this name or of those that it names; none if one of them is no call.

    Without a marker, a call must have arguments. A call that is not accepted is none.
    """
    try:
        value = json.loads(text)
        entries = [{"name": name, "arguments": value}] if name else value if isinstance(value, list) else [value]
        calls = [_call(entry, names, is_marked, accepts) for entry in entries] if is_shallow(value) else []
    except (ValueError, TypeError, RecursionError):
        return []
    return calls


def _call(entry: Any, names: Collection[str], is_marked: bool, accepts: Accepts | None) -> Call:
    """Raises ValueError or TypeError if it is none."""
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry = entry["function"]
    if not isinstance(entry, dict) or entry.get("name") not in names:
        raise ValueError("no call of a function that exists")
    arguments = entry.get("arguments", entry.get("parameters"))
    if arguments is None and is_marked:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    if accepts is not None and not accepts(entry["name"], arguments):
        raise ValueError("arguments are not valid")
    return Call(entry["name"], _dumped(arguments))


def _dumped(arguments: dict[str, Any]) -> str:
    """Raises ValueError for numbers that JSON cannot write."""
    told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        told.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can write
        return json.dumps(arguments, allow_nan=False)
    return told


class CallParser:
    """Reads a call that the answer was made to be, as its text comes: the name once it is complete, then the
    arguments' text piece by piece, and nothing else.
    """

    __slots__ = ("_brackets", "_held", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        """None until it is complete."""
        self._held = ""
        self._brackets = Brackets()

    def feed(self, text: str) -> list[Event]:
        """More of the answer, and what it comes to."""
        events = []
        if self.name is None:
            is_head = len(self._held) < _MAX_HEAD_CHARACTERS
            self._held += text
            head = _HEAD.match(self._held, 0, _MAX_HEAD_CHARACTERS) if is_head else None
            if head is None:
                return []
            self.name = json.loads(head[1])
            events.append(Event("call", str(self.name)))
            text, self._held = self._held[head.end() :], ""
        return [*events, Event("arguments", text[: self._brackets.feed(text)])]

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The answer is over: what was held back is a call of another form, or text; nothing if it `is_cut` off."""
        held, self._held = self._held, ""
        if self.name is not None or not held or is_cut:
            return []
        try:
            call = json.loads(held)
            self.name, arguments = str(call["name"]), json.dumps(call["arguments"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return [Event("text", held)]
        return [Event("call", self.name), Event("arguments", arguments)]

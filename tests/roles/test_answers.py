"""What models write, read as text, reasoning and calls: a table of forms, and laws for any text and any split of it."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.tokenizers import ByteTokenizer
from meshserve.roles.processor.answers import MAX_FAILED_CALLS, AnswerParser
from meshserve.roles.processor.call_formats import (
    ALL_FORMATS,
    BARE,
    HERMES,
    LLAMA,
    MAX_CALL_CHARACTERS,
    MAX_SPACE_CHARACTERS,
    MISTRAL,
    Event,
    formats_of,
)
from meshserve.roles.processor.choices import Choice
from meshserve.wire.completion import CallItem, EndItem, PartItem, TextItem, read_item

NAMES = ("look", "get_time")
Part = tuple[str, ...]
LOOK = '{"name": "look", "arguments": {"at": "it"}}'
CALLED: Part = ("call", "look", '{"at": "it"}')
TIMED: Part = ("call", "get_time", "{}")


def joined(events: Iterable[Event]) -> list[Part]:
    """Parts in order: text and reasoning as they are when put together, calls with their arguments."""
    parts: list[Part] = []
    for kind, text in events:
        if kind in ("text", "reasoning"):
            assert text, "an event of nothing"
            before = parts.pop()[1] if parts and parts[-1][0] == kind else ""
            parts.append((kind, before + text))
        elif kind == "call":
            parts.append(("call", text))
        elif kind == "arguments":
            parts[-1] = (*parts[-1], text)
        else:
            assert len(parts[-1]) == 3, "a call that ends has its arguments"
    return parts


def read(pieces: Iterable[str], names: tuple[str, ...] = NAMES, **options: Any) -> list[Part]:
    parser = AnswerParser(names, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"so <tool_call>{LOOK}", [("text", "so "), CALLED]),
        (f"so <tool_call>{LOOK}</tool", [("text", "so "), CALLED]),
        (f"so <tool_call>{LOOK[:-3]}", [("text", "so ")]),
        ("so <tool_c", [("text", "so ")]),
        (f"[TOOL_CALLS][{LOOK[:9]}", []),
        ("[TOOL_CALLS]get_ti", []),
        (LOOK[:-1], []),
        (LOOK[:12], []),
        ('{"na', []),
        ('{"name": "Alice", "age": 4', [("text", '{"name": "Alice", "age": 4')]),
        ('{"id": 4, "title": "T', [("text", '{"id": 4, "title": "T')]),
        ('{"age": 4', [("text", '{"age": 4')]),
        ("<think>cut </thi", [("reasoning", "cut </thi")]),
        ("a < b", [("text", "a < b")]),
    ],
)
def test_of_an_answer_that_is_cut_off_a_call_that_has_begun_is_no_text(text: str, expected: list[Part]) -> None:
    for pieces in ([text], list(text)):
        parser = AnswerParser(NAMES)
        events = [event for piece in pieces for event in parser.feed(piece)]
        assert joined([*events, *parser.finish(is_cut=True)]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  plain\n", [("text", "  plain\n")]),
        # Hermes and Qwen
        (f"<tool_call>\n{LOOK}\n</tool_call>", [CALLED]),
        (f"Let me see.\n<tool_call>{LOOK}</tool_call>", [("text", "Let me see.\n"), CALLED]),
        (f"<tool_call>{LOOK}</tool_call>\n<tool_call>\n{{\"name\": \"get_time\"}}\n</tool_call>\n", [CALLED, TIMED]),
        (f"<tool_call>{LOOK}</tool_call>\nSo.", [CALLED, ("text", "So.")]),
        ('<tool_call>{"arguments": {"at": "</tool_call> é"}, "name": "look"}</tool_call>', [("call", "look", '{"at": "</tool_call> é"}')]),
        (r'<tool_call>{"name": "look", "arguments": {"at": "\ud83d"}}</tool_call>', [("call", "look", r'{"at": "\ud83d"}')]),
        # Llama 3
        ('<|python_tag|>{"name": "look", "parameters": {"at": "it"}}', [CALLED]),
        ('<|python_tag|>{"name": "look", "parameters": {"at": "it"}}; {"name": "get_time", "parameters": {}}', [CALLED, TIMED]),
        ('{"type": "function", "name": "look", "parameters": {"at": "it"}}', [CALLED]),
        # Mistral
        (f"[TOOL_CALLS][{LOOK}]", [CALLED]),
        (f'[TOOL_CALLS] [{LOOK}, {{"name": "get_time", "arguments": {{}}}}]', [CALLED, TIMED]),
        ('[TOOL_CALLS]look[ARGS]{"at": "it"}[TOOL_CALLS]get_time[ARGS]{}', [CALLED, TIMED]),
        ('[TOOL_CALLS]look[CALL_ID]abc123XYZ[ARGS]{"at": "it"}', [CALLED]),
        ('Wait. [TOOL_CALLS]look{"at": "it"}', [("text", "Wait. "), CALLED]),
        # generic
        (f" {LOOK}\n", [CALLED]),
        (f"[{LOOK}]", [CALLED]),
        (f"```json\n{LOOK}\n```\n", [CALLED]),
        (f"```\n[{LOOK}]\n```", [CALLED]),
        (f"```json\n{LOOK}", [CALLED]),
        ('{"function": {"name": "look", "arguments": {"at": "it"}}}', [CALLED]),
        (f'{LOOK}\n{{"name": "get_time", "arguments": {{}}}}', [CALLED, TIMED]),
        # reasoning
        ("<think>\nhm\n</think>\n\nIt is.", [("reasoning", "hm\n"), ("text", "It is.")]),
        (f"\n<think>hm</think>\n{LOOK}", [("reasoning", "hm"), CALLED]),
        (f"<think>{LOOK}<tool_call></think><tool_call>{LOOK}</tool_call>", [("reasoning", f"{LOOK}<tool_call>"), CALLED]),
        ("<think>\n\n</think>\n\nIt is.", [("text", "It is.")]),
        ("<think>cut sh", [("reasoning", "cut sh")]),
        ("<think>cut</thi", [("reasoning", "cut</thi")]),
        ("The tag <think>x</think> is one.", [("text", "The tag <think>x</think> is one.")]),
        ("<thi", [("text", "<thi")]),
    ],
)  # fmt: skip
def test_each_form_is_read(text: str, expected: list[Part]) -> None:
    assert read([text]) == expected
    assert read(text) == expected, "a character at a time"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        f"<tool_call>{LOOK}",
        f"<tool_call>{LOOK}</tool_call",
        f"<tool_call>{LOOK} and more</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["look"], "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'look', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "look", "arguments": "it"}</tool_call>',
        '<tool_call>{"name": "look", "arguments": {"n": 1e999}}</tool_call>',
        '<tool_call>{"name": "look", "arguments": {"n": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>",
        '<tool_call>{"name": "look", "arguments": {"n": ' + "1" * 5000 + "}}</tool_call>",
        "Write <tool_call> before a call and </tool_call> after it.",
        "<|python_tag|>print(1)",
        f"<|python_tag|>{LOOK} and so on",
        "[TOOL_CALLS] none",
        '[TOOL_CALLS]other[ARGS]{"at": 1}',
        "[TOOL_CALLS]look[ARGS][1]",
        f'[TOOL_CALLS][{LOOK}, {{"name": "other", "arguments": {{}}}}]',
        f"{LOOK} is what I would call.",
        '{"name": "look"}',
        '{"answer": 42}',
        '{"name": "Ada", "arguments": {"for": []}}',
        "[1, 2]",
        "[[",
        "{",
        "```python\nprint(1)\n```",
        f"See: {LOOK}",
    ],
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    assert read([text]) == read(text) == [("text", text)]


def test_a_call_is_found_after_one_that_failed() -> None:
    broken = '<tool_call>{"name": "look", "arguments": {"at": '
    assert read([f"{broken}<tool_call>{LOOK}</tool_call>"]) == [("text", broken), CALLED]


def test_calls_are_not_looked_for_without_tools_and_reasoning_is() -> None:
    text = f"<think>hm</think><tool_call>{LOOK}</tool_call>"
    assert read([text], names=()) == [("reasoning", "hm"), ("text", f"<tool_call>{LOOK}</tool_call>")]


def test_reasoning_that_the_prompt_began_ends_with_its_tag() -> None:
    assert read(["hm</think>\n", LOOK], is_thinking=True) == [("reasoning", "hm"), CALLED]
    assert read("\n</think>\n\nyes", is_thinking=True) == [("text", "yes")]


def test_text_goes_through_as_it_comes_and_json_that_is_no_call_from_its_first_name_on() -> None:
    parser = AnswerParser(NAMES)
    assert joined(parser.feed("It")) == [("text", "It")] and joined(parser.feed(" is <b")) == [("text", " is <b")]
    parser = AnswerParser(NAMES)
    assert parser.feed('{"an') == [] and joined(parser.feed('swer"')) == [("text", '{"answer"')]


def test_a_marker_that_is_repeated_without_end_costs_little_and_a_call_without_end_is_text() -> None:
    text = '<tool_call>{"' * (MAX_FAILED_CALLS * 20)
    assert read([text]) == [("text", text)]
    endless = '<tool_call>{"name": "look", "arguments": {"at": "' + "x" * MAX_CALL_CHARACTERS
    parser = AnswerParser(NAMES)
    assert joined(parser.feed(endless)) == [("text", endless)]


SPACED = [
    (("", LOOK), [CALLED]),
    (("", "<think>hm"), [("reasoning", "hm")]),
    ((LOOK, ""), [CALLED]),
    ((LOOK, LOOK), [CALLED, CALLED]),
    ((f"{LOOK};", LOOK), [CALLED, CALLED]),
    ((LOOK, f";{LOOK}"), [CALLED, CALLED]),
    ((f"```{LOOK}", "```"), [CALLED]),
    ((f"```{LOOK}```", ""), [CALLED]),
    (("```json", LOOK), [CALLED]),
    (("[", f"{LOOK}]"), [CALLED]),
    (("{", LOOK[1:]), [CALLED]),
    (("<|python_tag|>", LOOK), [CALLED]),
    ((f"<|python_tag|>{LOOK}", ""), [CALLED]),
    (("<tool_call>", f"{LOOK}</tool_call>"), [CALLED]),
    ((f"<tool_call>{LOOK}", "</tool_call>"), [CALLED]),
    (("[TOOL_CALLS]", f"[{LOOK}]"), [CALLED]),
    (("[TOOL_CALLS]look[ARGS]", '{"at": "it"}'), [CALLED]),
]
"""What white space may stand between, and what it comes to."""


@pytest.mark.parametrize(("parts", "expected"), SPACED)
@pytest.mark.parametrize("mark", ["\n", " "])
def test_white_space_around_a_call_has_a_bound_and_with_more_it_is_text(parts: tuple[str, str], expected: list[Part], mark: str) -> None:
    kept = (mark * MAX_SPACE_CHARACTERS).join(parts)
    assert read([kept]) == read(kept) == expected
    for number in (MAX_SPACE_CHARACTERS + 1, 300, 30_000):
        text = (mark * number).join(parts)
        assert read([text]) == read(text) == [("text", text)]


@pytest.mark.parametrize("before", sorted({parts[0] for parts, _ in SPACED}))
def test_what_a_token_of_white_space_costs_does_not_grow_with_those_before_it(before: str) -> None:
    """Whatever is held back is looked at with each token, and nothing else is: so the most that is held back is the most it costs.

    It was all of the white space, and its square: 2 s for one token after 8,000 newlines, 10 us now.
    """
    parser = AnswerParser(NAMES)
    num_held = len(before) - sum(len(event.text) for event in parser.feed(before))
    for _ in range(4 * MAX_SPACE_CHARACTERS):
        num_held += 1 - sum(len(event.text) for event in parser.feed("\n"))
        assert num_held <= len(before) + MAX_SPACE_CHARACTERS
    assert not num_held


def test_json_that_is_no_call_is_let_through_before_its_first_name_ends_if_that_is_longer_than_any_of_a_call() -> None:
    text = '{"' + "a" * 11
    assert joined(AnswerParser(NAMES).feed(text)) == [("text", text)]


def test_a_template_says_which_forms_its_model_writes() -> None:
    assert formats_of("{% if tools %}<tool_call></tool_call>{% endif %}") == (HERMES, BARE)
    assert formats_of("{{ '[TOOL_CALLS]' }}") == (MISTRAL, BARE) and formats_of("<|python_tag|>") == (LLAMA, BARE)
    assert formats_of("{{ messages }}") == formats_of("") == ALL_FORMATS
    other = f"[TOOL_CALLS][{LOOK}]"
    assert read([other], formats=formats_of("<tool_call>")) == [("text", other)]


# --- laws

FRAGMENTS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json", "```"),
    *(
        "{",
        "}",
        "[",
        "]",
        '"name"',
        ": ",
        '"look"',
        "look",
        '"arguments"',
        ", ",
        ";",
        "\n",
        " ",
        "word",
        "é",
        LOOK,
        f"[{LOOK}]",
        "<",
        "\\",
        '"',
    ),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def cut(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(TEXTS, st.booleans(), st.data())
def test_what_is_read_does_not_depend_on_how_the_text_was_split(text: str, is_thinking: bool, data: st.DataObject) -> None:
    assert read(cut(data, text), is_thinking=is_thinking) == read([text], is_thinking=is_thinking) == read(text, is_thinking=is_thinking)


@given(TEXTS, st.data())
def test_nothing_is_lost_or_doubled(text: str, data: st.DataObject) -> None:
    parts = read(cut(data, text))
    place = 0
    for part in parts:  # text and reasoning are pieces of what was written, in order; what is between them is tags and calls
        found = text.find(part[1], place)
        assert found >= 0
        place = found + len(part[1])
    if not text.lstrip().startswith("<think>") and not any(part[0] == "call" for part in parts):
        assert "".join(part[1] for part in parts) == text


@given(st.text(), st.data())
def test_any_text_without_tags_is_itself(text: str, data: st.DataObject) -> None:
    assert "".join(part[1] for part in read(cut(data, text))) == text


ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.text(max_size=8) | st.integers() | st.lists(st.text(max_size=3), max_size=2), max_size=3
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
WORDS = st.text("ab \n.,:", max_size=12)


def written(form: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """As a model of this kind writes them."""
    if form == "mistral names":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)
    key = "parameters" if form == "llama" else "arguments"
    objects = [json.dumps({"name": name, key: arguments}, ensure_ascii=form != "hermes") for name, arguments in calls]
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{told}\n</tool_call>" for told in objects)
    if form == "llama":
        return "<|python_tag|>" + "; ".join(objects)
    return ("[TOOL_CALLS]" if form == "mistral" else "") + f"[{', '.join(objects)}]"


@given(st.sampled_from(("hermes", "llama", "mistral", "mistral names", "generic")), WORDS, WORDS, CALLS, st.data())
def test_calls_come_out_as_they_were_meant(
    form: str, thought: str, text: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    before = "" if form == "generic" else text.strip()
    parts = read(cut(data, f"<think>{thought}</think>{before}{written(form, calls)}"))
    assert [(part[1], json.loads(part[2])) for part in parts if part[0] == "call"] == calls
    assert "".join(part[1] for part in parts if part[0] == "reasoning") == thought.lstrip()
    assert "".join(part[1] for part in parts if part[0] == "text") == before


@given(TEXTS, st.booleans(), st.booleans(), st.data())
def test_a_choice_gives_out_what_was_read_with_the_log_probabilities_of_every_token(
    text: str, is_single: bool, wants_logprobs: bool, data: st.DataObject
) -> None:
    said: list[Any] = []
    parser = AnswerParser(NAMES)
    choice = Choice(said.append, ByteTokenizer().token_bytes, parser=parser, is_single=is_single, wants_logprobs=wants_logprobs)
    for piece in cut(data, text):
        tokens = list(piece.encode())
        if choice.feed(tokens, [(-0.5, ()) for _ in tokens] if wants_logprobs else None):
            break
    end = choice.finish("stop")
    events, entries = [], []
    kind = "text"
    for item in map(read_item, said):
        if isinstance(item, TextItem):
            events += [Event(kind, item.text)] if item.text else []
            entries += item.logprobs or []
        elif isinstance(item, CallItem):
            events.append(Event("call", item.name))
            kind = "arguments"
        elif isinstance(item, PartItem):
            kind = item.kind
    expected = read([text])
    first = next((place for place, part in enumerate(expected) if part[0] == "call"), None)
    if is_single and first is not None:
        assert joined(events) == expected[: first + 1]
    else:
        assert joined(events) == expected
        assert not wants_logprobs or b"".join(entry[0] for entry in entries) == text.encode()
    assert end == EndItem(0, "stop" if first is None else "tool_calls", None)

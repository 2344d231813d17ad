"""What the load generator reads: streams of events, and traces."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.cli.bench.prompts import (
    Scale,
    TraceLine,
    read_lines,
    read_trace_file,
    trace_requests,
)
from meshserve.cli.bench.requests import Ending, Request, RequestRecord
from meshserve.cli.bench.selfcheck import findings
from meshserve.cli.bench.sse import EventReader
from meshserve.cli.bench.tally import Goal, Tally, fine_histogram
from meshserve.errors import UsageError
from tests.cli.bench_server import FINISH, event, text

# --- streams of events

ROLE = event(
    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
)
CHAT = event(choices=[{"index": 0, "delta": {"content": "x"}, "finish_reason": None}])
THOUGHT = event(choices=[{"index": 0, "delta": {"content": None, "reasoning_content": "hm"}}])
TRICK = event(choices=[{"index": 0, "text": "", "note": '"text":"x" \\"content\\": \\"y'}])
USAGE = event(choices=[], usage={"completion_tokens": 9})
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
CALL = event(
    choices=[
        {
            "index": 0,
            "delta": {
                "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]
            },
        }
    ]
)
ARGUMENTS = event(
    choices=[
        {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}}
    ]
)
NO_CALLS = event(choices=[{"index": 0, "delta": {"content": "", "tool_calls": []}}])
"""As some servers send while they think."""
CALLED = event(choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}])
TALK_OF_CALLS = event(choices=[{"index": 0, "text": "", "note": '"tool_calls":[{'}])


@pytest.mark.parametrize(
    ("events", "count"),
    [
        ([ROLE, CHAT, CHAT, FINISH, DONE], 2),
        ([ROLE, FINISH, USAGE, DONE], 0),
        ([THOUGHT, CHAT, DONE], 2),
        ([TRICK, COMMENT, text('say "text":"x"'), DONE], 1),
        ([ROLE, CALL, ARGUMENTS, ARGUMENTS, NO_CALLS, CALLED, USAGE, DONE], 3),
        ([TALK_OF_CALLS, event(choices=[], calls='"tool_calls":[{"'), DONE], 0),
        ([text(" "), text("\\"), text("\n\n"), DONE], 3),
    ],
)
def test_only_events_with_content_count(events: list[bytes], count: int) -> None:
    assert EventReader().feed(b"".join(events)) == count


@given(
    st.lists(st.sampled_from([ROLE, CHAT, THOUGHT, TRICK, USAGE, COMMENT, FINISH]), max_size=12),
    st.data(),
    st.booleans(),
)
def test_a_stream_counts_the_same_wherever_it_is_cut(
    events: list[bytes], data: st.DataObject, is_crlf: bool
) -> None:
    stream = b"".join([*events, DONE])
    if is_crlf:
        stream = stream.replace(b"\n", b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = EventReader(is_keeping_text=True)
    pieces = [stream[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(stream)])]
    assert sum(reader.feed(piece) for piece in pieces) == events.count(CHAT) + events.count(THOUGHT)
    fields, is_ended = reader.fields()
    assert is_ended and (USAGE not in events or fields["usage"]["completion_tokens"] == 9)
    assert reader.take_text() == "".join({CHAT: "x", THOUGHT: "hm"}.get(one, "") for one in events)


@pytest.mark.parametrize("filler", [COMMENT, NO_CALLS, ROLE, COMMENT + NO_CALLS])
@pytest.mark.parametrize(
    "ending", [USAGE + DONE, FINISH + USAGE + DONE, CALLED + USAGE + COMMENT + DONE]
)
def test_usage_before_the_end_is_found_however_much_comes_without_content(
    filler: bytes, ending: bytes
) -> None:
    reader = EventReader()
    assert reader.feed(ROLE + filler * 40 + CHAT + filler * 40 + CHAT + filler * 40 + ending) == 2
    fields, is_ended = reader.fields()
    assert is_ended and fields["usage"]["completion_tokens"] == 9


def test_counts_that_grow_with_each_event_are_the_last_ones() -> None:
    reader = EventReader()
    growing = [
        event(choices=[{"index": 0, "text": "ab"}], usage={"completion_tokens": count})
        for count in (2, 5)
    ]
    reader.feed(
        event(choices=[{"index": 0, "text": ""}], usage={"completion_tokens": 0})
        + b"".join(growing)
        + DONE
    )
    assert reader.fields()[0]["usage"]["completion_tokens"] == 5


def test_an_event_behind_a_comment_counts_and_a_comment_never_does() -> None:
    reader = EventReader()
    assert (
        reader.feed(
            b': "text": "no token"\n\n: ping\n' + CHAT + b'event: x\n: "text":"y"\ndata: {}\n\n'
        )
        == 1
    )


def test_an_end_without_its_empty_line_is_an_end() -> None:
    reader = EventReader()
    assert reader.feed(CHAT + USAGE + b"data: [DONE]\n") == 1
    fields, is_ended = reader.fields()
    assert is_ended and fields["usage"]["completion_tokens"] == 9


def test_a_stream_that_says_nothing_of_an_end_has_none() -> None:
    reader = EventReader()
    assert reader.feed(CHAT + b"data: not json\n\n") == 1 and not reader.fields()[1]


# --- traces


def test_a_trace_shares_the_text_of_equal_blocks_and_keeps_lengths() -> None:
    lines = [
        TraceLine(0.0, 1100, 3, (1, 2, 3)),
        TraceLine(0.5, 1024, 4, (1, 2)),
        TraceLine(1.0, 600, 5, (9, 2)),
    ]
    a, b, c = trace_requests(lines, Scale(2.0), 0)
    assert [len(job.prompt) for job in (a, b, c)] == [2200, 2048, 1200]
    assert a.prompt[:2048] == b.prompt and c.prompt[:1024] != a.prompt[:1024]
    assert [(job.due_s, job.max_tokens) for job in (a, b, c)] == [(0.0, 3), (0.5, 4), (1.0, 5)]


def test_a_trace_that_was_cut_out_of_another_begins_at_once() -> None:
    jobs = trace_requests(
        [TraceLine(3600.0, 10, 1, (1,)), TraceLine(3600.5, 10, 1, (2,))], Scale(1.0), 0
    )
    assert [job.due_s for job in jobs] == [0.0, 0.5]


def test_a_trace_is_sorted_and_sped_up_and_its_mistakes_are_named() -> None:
    line = '{"timestamp": %d, "input_length": 5, "output_length": 2, "hash_ids": [1]}'
    assert [one.arrival_s for one in read_lines([line % 4000, "", line % 1000], speed=2.0)] == [
        0.5,
        2.0,
    ]
    with pytest.raises(UsageError, match="line 2 is not"):
        read_lines([line % 1, '{"timestamp": 1}'])
    with pytest.raises(UsageError, match=r"line 1 is not .*it has no 'hash_ids'"):
        read_lines(['{"timestamp": 1, "input_length": 5, "output_length": 2}'])
    for length in (0, -3, 1.5, "many", True, None):
        with pytest.raises(
            UsageError, match=r"line 1 is not .*output_length is .*, and no whole number from 1"
        ):
            read_lines(
                [
                    json.dumps(
                        {
                            "timestamp": 1,
                            "input_length": 5,
                            "output_length": length,
                            "hash_ids": [1],
                        }
                    )
                ]
            )
    with pytest.raises(UsageError, match="no requests"):
        read_lines([])


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(513, 1), (512, 2), (5, 0), (1024, 64)])
def test_a_trace_whose_blocks_do_not_add_up_to_its_lengths_is_refused_with_the_line(
    num_tokens: int, num_blocks: int, tmp_path: Path
) -> None:
    def a_line(tokens: int, blocks: int) -> str:
        return json.dumps(
            {
                "timestamp": 0,
                "input_length": tokens,
                "output_length": 2,
                "hash_ids": list(range(blocks)),
            }
        )

    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{a_line(513, 2)}\n\n{a_line(num_tokens, num_blocks)}\n")
    words = rf"line 3 cannot be played: hash_ids names {num_blocks} blocks of 512 .* input_length {num_tokens} is"
    with pytest.raises(UsageError, match=words):
        read_trace_file(trace)
    trace.write_text(a_line(513, 2))
    assert [line.num_tokens for line in read_trace_file(trace)] == [513]


def test_lengths_that_are_not_the_traces_are_said() -> None:
    def told(num_prompt: int, num_output: int) -> str:
        tally = Tally(Goal())
        tally.open_window(0.0, 10.0)
        request = Request((("user", "x"),), 50, num_prompt_tokens=100)
        made = RequestRecord(request, 0.0, tally.ended)
        made.content(1.0, 1)
        made.finish(1.0, Ending(num_prompt, num_output))
        return " ".join(findings(0.1, fine_histogram(), fine_histogram(), tally))

    assert told(100, 50) == told(101, 50) == ""
    assert "output lengths are not those of the trace: 30 tokens in all instead of 50" in told(
        100, 30
    )
    assert "prompt lengths are not those of the trace: 120 tokens in all instead of 100" in told(
        120, 50
    )

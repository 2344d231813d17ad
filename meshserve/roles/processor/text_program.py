"""The process that does to text what its model's files say: renders its chat template, and makes tokens of it.

Template and tokenizer come from another peer. Here they have no secrets, no network that the mesh uses, and so much processor time and
memory; whoever oversteps ends this process, and with it nothing but the one request. Reads requests from stdin, answers on stdout, in
order; ends with its stdin. Started by :mod:`~meshserve.roles.processor.text_process`.
"""

import json
import marshal
import resource
import signal
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Any

from meshserve.engines.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.engines.tokenizers.table import TokenTable
from meshserve.errors import InvalidRequest, MeshserveError, TokenizerFailed
from meshserve.roles.processor.templating import ChatTemplate

HEAD = Struct("<IB")
"""Before each message: its length, and in answers whether it is an error."""

LOAD_S, RENDER_S, ENCODE_S, ENCODE_S_PER_CHARACTER = 30.0, 1.0, 1.0, 10e-6
"""Processor time. A rendered chat takes a thousandth of it, a text of a million characters half a second on a machine of today."""
RENDER_BYTES = 512 * 1024 * 1024
"""Memory that rendering may take, where the system can limit it; the longest prompt takes a quarter."""
_ADDRESS_SPACE_BYTES = 3 * 1024 * 1024 * 1024
"""Memory of the whole process. A text of 16 million characters takes 2 GB of it, a tokenizer of 128,000 tokens 0.1."""


class TextProgram:
    """Answers requests; the first says what it is about."""

    def __init__(self) -> None:
        self._tokenizer: Tokenizer = ByteTokenizer()
        self._settings = TextSettings()
        self._default_template = ""
        self._templates: dict[str, ChatTemplate] = {}

    def answer(self, request: tuple[Any, ...]) -> tuple[bytes, bool]:
        """The answer to the name of a method and its arguments, or the error that is the answer instead."""
        name, *arguments = request
        try:
            answer: bytes = getattr(self, name)(*arguments)
        except MeshserveError as error:
            failure = error
        except MemoryError:
            words = "the model's chat template needs too much memory for these messages"
            failure = InvalidRequest(words, param="messages")
        except Exception as error:  # of foreign code on foreign data
            words = f"the model's text could not be dealt with: {type(error).__name__}: {error}"
            failure = TokenizerFailed(words)
        else:
            return answer, False
        return json.dumps(failure.to_wire()).encode(), True

    def load(self, kind: str, files: Mapping[str, bytes], template: str) -> bytes:
        """Make the tokenizer of this kind; the answer is its vocabulary's table, or empty for the one that is known everywhere."""
        _limit_time(LOAD_S)
        self._default_template = template
        tokenizer = self._tokenizer = load_tokenizer(kind, files)
        if isinstance(tokenizer, ByteTokenizer):
            return b""
        self._settings = TextSettings.of_files(files)
        return TokenTable.of(tokenizer).to_bytes()

    def encode(self, text: str, add_special_tokens: bool) -> bytes:
        """The answer is the tokens as this machine's 32-bit words."""
        _limit_time(ENCODE_S + ENCODE_S_PER_CHARACTER * len(text))
        return self._tokenizer.encode(text, add_special_tokens).tobytes()

    def chat(self, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any]) -> bytes:
        """Render, and encode what came of it: special tokens are the template's business."""
        source = self._settings.template(bool(tools)) or self._default_template
        if not source:
            raise InvalidRequest("this model has no chat template; /v1/completions takes its prompts", param="messages")
        _limit_time(RENDER_S)
        with _LimitedMemory():
            template = self._templates.get(source)
            if template is None:
                template = self._templates[source] = ChatTemplate(source)
            text = template.render(messages, tools, **{**self._settings.special_tokens, **variables})
        return self.encode(text, False)

    def template(self) -> bytes:
        """The answer is the source of the one for chats with tools."""
        return (self._settings.template(True) or self._default_template).encode("utf-8", "replace")

    def decode(self, tokens: bytes) -> bytes:
        """The answer is UTF-8."""
        found = array("I", tokens)
        _limit_time(ENCODE_S + ENCODE_S_PER_CHARACTER * len(found))
        return self._tokenizer.decode(found).encode("utf-8", "replace")


class _LimitedMemory:
    """Within it the process grows by RENDER_BYTES at most; beyond that Python raises MemoryError. Linux only."""

    def __enter__(self) -> None:
        try:
            num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        except (OSError, ValueError):
            return
        _limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + RENDER_BYTES)

    def __exit__(self, *exc_info: object) -> None:
        _limit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1])


def _limit(kind: int, value: int, is_hard: bool = False) -> None:
    """As far as the system has such a limit."""
    try:
        resource.setrlimit(kind, (value, value if is_hard else resource.getrlimit(kind)[1]))
    except (ValueError, OSError):
        return


def _limit_time(seconds: float) -> None:
    """So much more processor time, then SIGPROF ends the process, in the middle of whatever it does. Wall time would depend on others."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Until stdin ends. Signals to all processes of a terminal or a service are for the parent, which may have requests to finish."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0, is_hard=True)
    _limit(resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES, is_hard=True)
    program, requests, answers = TextProgram(), sys.stdin.buffer, sys.stdout.buffer
    while len(head := requests.read(HEAD.size)) == HEAD.size:
        request = marshal.loads(requests.read(HEAD.unpack(head)[0]))  # from our own parent, of the same version
        answer, is_error = program.answer(request)
        _limit_time(0)
        answers.write(HEAD.pack(len(answer), is_error) + answer)
        answers.flush()


if __name__ == "__main__":
    main()

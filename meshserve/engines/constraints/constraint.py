"""Outputs that must follow a grammar: a JSON Schema, a regular expression, or one of several texts.

The grammar library (llguidance) says which tokens may come next; it is imported where the first constraint is compiled, so that an
engine without such requests pays nothing for it.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import compress, count, islice
from typing import Any

from meshserve.engines.constraints.keeping import faults, subschemas
from meshserve.engines.constraints.schemas import PARAM, checked_schema
from meshserve.errors import EngineFailed, InvalidRequest, MeshserveError, Unsupported

_MOST_COMPILED = 32
_MOST_CHARACTERS = 16_384
_MOST_CHOICES = 1024
_MOST_SHOWN, _MOST_PLACES = 1000, 4
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one space, and only after a comma or colon: small models fill what they may with white space, and never come back."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,  # at most 10 ms of a compilation
    "step_lexer_fuel": 100_000,  # at most 7 ms of a mask
    "max_lexer_states": 10_000,  # of up to 2 kB each
    "verbose_errors": False,
}
_FLAGS = bytes(value == ord("1") for value in range(256))
_SCHEMA, _REGEX, _CHOICES = "schema", "regular expression", "list of choices"


def tokens_of(mask: bytes) -> list[int]:
    """The tokens whose bits are set in a mask, ascending: 4 us of 417 tokens, 8 us for one of 49,000, 5 ms for half of those."""
    digits = f"{int.from_bytes(mask, 'little'):b}"  # the highest bit first
    return list(compress(count(), digits[::-1].encode().translate(_FLAGS)))


class Constraint:
    """What one output may go on with. Belongs to one thread at a time.

    The mask is a function of the tokens taken so far. Its methods raise EngineFailed where the grammar grows beyond its limits.
    """

    __slots__ = ("_eos_tokens", "_mask", "_matcher", "_vocab_size")

    def __init__(self, matcher: Any, eos_tokens: frozenset[int], vocab_size: int) -> None:
        self._matcher, self._eos_tokens, self._vocab_size = matcher, eos_tokens, vocab_size
        self._mask: bytes | None = None

    def allowed_mask(self) -> bytes:
        """One bit a token, the lowest of a byte first, in whole 32-bit words; an end of sequence is set where the output may end.

        With numpy: `unpackbits(frombuffer(mask, uint8), count=vocab_size, bitorder="little")`.
        """
        if self._mask is None:
            self._mask = self._matcher.compute_bitmask()
            self._check()
        return self._mask

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens of the vocabulary can come next, one after the other; none is taken.

        Where only one text can follow, any way of writing it counts.
        """
        found: int = self._matcher.validate_tokens(list(tokens))
        return found

    @property
    def must_end(self) -> bool:
        """Whether the output is complete and nothing can be added to it."""
        found: bool = self._matcher.is_stopped()
        return found

    def take(self, token: int) -> None:
        """This token was chosen, and is no end of sequence. Raises InvalidRequest for one that the grammar does not allow here."""
        is_text = 0 <= token < self._vocab_size and token not in self._eos_tokens  # the library fails for good at an unknown token
        if not is_text or self.must_end or self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise InvalidRequest("the output so far does not follow the request's grammar", param="num_generated")
        self._mask = None

    def _check(self) -> None:
        message = self._matcher.get_error()
        if message:
            raise EngineFailed(f"the output's grammar cannot be followed further: {_first_line(message)}")


class ConstraintCompiler:
    """Compiles constraints for one vocabulary, and keeps those that it compiled last. Belongs to one thread.

    `read_tokens` gives the bytes of each token, those that stand for text only: special ones are empty; it is called at first need, as
    the vocabulary takes 4 ms (417 tokens), 70 ms (49,000) or 400 ms (152,000) to prepare. `encode` gives the tokens that the model
    would write a text with: where only one text can follow, only these are allowed.
    """

    def __init__(self, read_tokens: Callable[[], list[bytes]], eos_tokens: Sequence[int], encode: Callable[[str], Sequence[int]]) -> None:
        self._read_tokens, self._eos_tokens, self._encode = read_tokens, list(eos_tokens), encode
        self._ends = frozenset(eos_tokens)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[tuple[str, Sequence[str]], Any] = OrderedDict()

    def compile(self, *, json_schema: str = "", regex: str = "", choices: Sequence[str] = ()) -> Constraint:
        """The constraint at its beginning; the first of the three that is not empty counts.

        Takes 0.3 to 7 ms for usual schemas, up to 0.1 s within the limits, and 10 us where it is known; needs 3 MB of stack. Raises
        InvalidRequest for what is malformed, Unsupported, which names the construct, for what cannot be kept to.
        """
        key = (_SCHEMA, json_schema) if json_schema else (_REGEX, regex) if regex else (_CHOICES, tuple(choices))
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compiled[key] = self._matcher(*key)
            if len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Constraint(matcher.deep_copy(), self._ends, self._tokenizer.vocab_size)

    def _matcher(self, words: str, value: Any) -> Any:
        import llguidance  # loaded where there is a constraint: 8 MB, 80 ms

        try:
            grammar = _grammar(llguidance.LLMatcher, words, value)
            if self._tokenizer is None:
                wrapped: Any = _Wrapped(self._read_tokens(), self._eos_tokens[0], self._encode)
                # without slices: they double the time and triple the memory, for masks of 1 ms instead of 10 ms at rare places
                self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=self._eos_tokens, slices=[])
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))
            if not matcher.is_error():
                matcher.compute_bitmask()
        except (MeshserveError, KeyboardInterrupt, SystemExit):
            raise
        except ValueError as error:
            raise InvalidRequest(f"the {words} cannot be read: {_first_line(str(error))}", param=PARAM) from error
        except BaseException as error:  # its panics are no Exception
            raise Unsupported(f"the {words} cannot be kept to: {_first_line(str(error))}", param=PARAM) from error
        if matcher.is_error():
            raise _refusal(words, matcher.get_error(), value)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise Unsupported(f"the {words} allows no output that ends", param=PARAM)
        return matcher


class _Wrapped:
    """A vocabulary in the form that the library asks for (`llguidance.TokenizerWrapper`, whose own `__init__` wants yet another)."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: list[bytes], eos_token: int, encode: Callable[[str], Sequence[int]]) -> None:
        self.tokens, self.eos_token_id, self._encode = tokens, eos_token, encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


def _grammar(library: Any, words: str, value: Any) -> Any:
    if words == _SCHEMA:
        return library.grammar_from_json_schema(checked_schema(value), overrides=_JSON_STYLE)
    if not value:
        raise InvalidRequest("there are no choices", param=PARAM)
    if sum(map(len, value)) > _MOST_CHARACTERS:
        raise Unsupported(f"the {words} is too long: at most {_MOST_CHARACTERS} characters are read", param=PARAM)
    if words == _REGEX:
        return library.grammar_from_regex(value)
    if len(value) > _MOST_CHOICES:
        raise Unsupported(f"at most {_MOST_CHOICES} choices can be kept to", param=PARAM)
    return library.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))


_REFUSALS = (
    (r'Unimplemented keys: \[(".*")\]|(look-?around|backreferences)', "uses {}, which cannot be kept to"),
    (r"(oneOf) constraints", "has {} branches that cannot be told apart; anyOf would do"),
    (r"(Unsatisfiable schema: .*)", "allows no output: {}"),
    (r"NoExtension()", "allows no output that ends{}"),
    (
        r"(.*not present in a registry|circular references|min/maxProperties|.*not disjoint|.*too many digits|.*too large"
        r"|Failed to generate|Unable to determine|.*too big|Parser Error|.*limit|.*fuel)",
        "cannot be kept to: {}",
    ),
)
"""What the library says of what it cannot do, and the words for it; the rest is the client's mistake."""


def _refusal(words: str, message: str, value: Any) -> InvalidRequest:
    message = f"{message[:_MOST_SHOWN]}\n{message[-_MOST_SHOWN:]}"  # it holds the whole of a regular expression
    for pattern, found in _REFUSALS:
        match = re.search(pattern, message)
        if match:
            text = f"the {words} {found.format(match[match.lastindex or 1][:200])}"
            return Unsupported(text + (_places(value, message) if words == _SCHEMA else ""), param=PARAM)
    wrong = re.search(r"error: (.*)", message)
    return InvalidRequest(f"the {words} cannot be read: {_first_line(wrong[1] if wrong else message)}", param=PARAM)


def _places(text: str, message: str) -> str:
    """Where a schema has what cannot be kept to, as far as that can be told."""
    root = json.loads(text)
    found = faults(root) if "Unimplemented" in message or "look" in message or "backref" in message else iter(())
    named = [key for key in ("oneOf", "minProperties", "maxProperties") if key[-10:] in message]
    others = ((key, path) for path, schema in subschemas(root) for key in named if key in schema)
    places = [f"{key} at {path[:_MOST_SHOWN]}" for key, path in islice(dict.fromkeys((*found, *others)), _MOST_PLACES)]
    return f": {', '.join(places)}" if places else ""


def _first_line(message: str) -> str:
    return message.partition("\n")[0][:200]

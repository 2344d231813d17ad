"""How the dummy model goes on under a constraint: a few of the allowed tokens, such that outputs read well and come to an end.

Strings are made of words, or of few characters where their pattern allows no words; numbers have at most three digits where they may;
optional parts come up about half of the time, and no more once the output is long or deep. All of it is a function of the tokens so
far and of the digest of the KV cache's contents, so that another worker goes on alike.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from meshserve.engines.constraints.constraint import Constraint, ConstraintCompiler, tokens_of
from meshserve.engines.constraints.schemas import property_names
from meshserve.engines.dummy.vocabulary import OWN_VOCABULARY, VocabularyMap
from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES
from meshserve.errors import EngineFailed, InvalidRequest
from meshserve.wire.generation import Sampling

QUOTE, BLANK, _BACKSLASH, _COMMA, _OBJECT = ord('"'), ord(" "), ord("\\"), ord(","), ord("{")
OPENERS, CLOSERS = frozenset(b"{["), frozenset(b"}]")
LETTERS = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OF_NUMBERS = frozenset(b".-+")
_LONG_TOKENS, _DEEP = 150, 4
_MOST_KEPT = 256
_DIGITS = frozenset(b"0123456789")
_MARKS = b"@:/.-_T+ "
"""What is written first of what is no letter: the parts of addresses, times and names are set apart by these."""
_PRINTABLE = frozenset(range(0x21, 0x7F)) - {_BACKSLASH, QUOTE} - LETTERS
_WORDS = tuple(chain(WORD_RANGES["adjective"], WORD_RANGES["noun"]))
_NOUNS = frozenset(OWN_VOCABULARY.pieces[token][1:] for token in WORD_RANGES["noun"])
_MOST_WORDS, _MOST_CHARACTERS, _MOST_DIGITS, _MOST_ALIKE = 2, 6, 3, 3
_FLAT = 3
"""As deep, or where as many kinds of simple values may come, no array or object is begun."""
_MOST_KEYS = 32
"""How many are tried where an object may go on."""


class Outline:
    """Where in a JSON document its text stands, token by token. A plain text is one string that nothing opens or closes."""

    __slots__ = ("_is_escaped", "in_text", "is_document", "is_key", "last", "num_tokens", "num_words", "open", "run", "text", "used_keys")

    def __init__(self, is_document: bool) -> None:
        self.is_document = is_document
        self.open: list[int] = []
        """How each array and object that is open begins, the innermost last."""
        self.used_keys: list[set[bytes]] = []
        """Of each of them, the keys so far."""
        self._is_escaped = False
        self.in_text, self.is_key = not is_document, False
        self.text = b""
        """Of the string so far; of a long one its last part."""
        self.num_words = 0
        """Tokens of several bytes in the string so far."""
        self.last = 0
        """The last byte outside of strings that is no blank."""
        self.run = 0
        """Tokens since the string or number began."""
        self.num_tokens = 0

    @property
    def is_object(self) -> bool:
        """Whether the innermost of them is an object."""
        return self.open[-1:] == [_OBJECT]

    @property
    def is_long(self) -> bool:
        """Whether the document had better come to its end: by the shortest way, as far as that can be seen."""
        return self.num_tokens > _LONG_TOKENS or len(self.open) > _DEEP

    def feed(self, piece: bytes) -> None:
        """The bytes of the next token."""
        self.num_tokens += 1
        self.run += 1
        self.num_words += len(piece) > 1
        for byte in piece:
            if not self.in_text:
                self._structure(byte)
            elif self.is_document and byte == QUOTE and not self._is_escaped:
                self._end_text()
            else:
                self._is_escaped = byte == _BACKSLASH and not self._is_escaped
                self.text = self.text[-_MOST_KEPT:] + bytes((byte,))

    def _end_text(self) -> None:
        if self.is_key:
            self.used_keys[-1].add(self.text)
        self.in_text, self.is_key, self.last, self.run = False, False, QUOTE, 0

    def _structure(self, byte: int) -> None:
        if byte == BLANK:
            return
        if byte == QUOTE:
            self.is_key = self.is_object and self.last in (_OBJECT, _COMMA)
            self.in_text, self.text, self.num_words, self.run = True, b"", 0, 0
        elif byte in OPENERS:
            self.open.append(byte)
            self.used_keys.append(set())
        elif byte in CLOSERS and self.open:
            self.open.pop()
            self.used_keys.pop()
        if byte not in LETTERS and byte not in _OF_NUMBERS:
            self.run = 0
        self.last = byte


@lru_cache(maxsize=4096)
def _next_bytes(texts: frozenset[bytes], begun: bytes) -> frozenset[int]:
    """The bytes with which a text that begins so can go on to become one of these."""
    return frozenset(text[len(begun)] for text in texts if len(text) > len(begun) and text.startswith(begun))


@lru_cache(maxsize=256)
def _read_mask(mask: bytes, can_end: bool) -> tuple[frozenset[int], tuple[int, ...]]:
    """The tokens of a mask, and those of them that are words: few masks come up again and again."""
    allowed = frozenset(token for token in tokens_of(mask) if can_end or token != EOS_TOKEN)
    return allowed, tuple(token for token in _WORDS if token in allowed)


def _turned(tokens: Sequence[int], context: int) -> list[int]:
    """From a place that the digest names, and round to it again."""
    best = context % len(tokens) if tokens else 0
    return [*tokens[best:], *tokens[:best]]


class ConstrainedOutput:
    """The tokens that the model chooses among for an output that must follow a constraint.

    `pieces` are the bytes of the model's own tokens, `keys` what a document's objects are expected to have; None: it is no document.
    """

    __slots__ = ("_constraint", "_expected", "_keys", "_outline", "_pieces")

    def __init__(self, constraint: Constraint, pieces: Sequence[bytes], keys: frozenset[bytes] | None) -> None:
        self._constraint, self._pieces = constraint, pieces
        self._keys = self._expected = keys or frozenset()
        self._outline = Outline(keys is not None)

    def take(self, token: int) -> None:
        """A token was chosen, and no end of sequence. Raises InvalidRequest for one that cannot follow."""
        if self._constraint.must_end:
            if token != BLANK:
                raise InvalidRequest("the output so far does not follow the request's grammar", param="num_generated")
            return
        self._constraint.take(token)
        self._outline.feed(self._pieces[token])
        if self._outline.is_key and not self._outline.text:
            self._expected = self._keys_after(b"")

    def candidates(self, context: int, can_end: bool) -> list[int]:
        """Tokens that may come next, best first, none twice; `can_end` False keeps the end of sequence out.

        An output that must go on after its end goes on with blanks: after a document they change nothing.
        """
        if self._constraint.must_end:
            return [EOS_TOKEN if can_end else BLANK]
        allowed, words = _read_mask(self._constraint.allowed_mask(), can_end)
        if len(allowed) > 1:
            outline = self._outline
            found = self._in_text(allowed, words, context) if outline.in_text else self._in_structure(allowed, context)
            return found or _turned(sorted(allowed), context)
        if not any(self._pieces[token] or token == EOS_TOKEN for token in allowed):  # a byte that is no token where another is spoken
            raise EngineFailed("nothing that the model can write follows the request's grammar")
        return [*allowed]

    def _can_follow(self, *tokens: int) -> bool:
        return self._constraint.num_allowed(tokens) == len(tokens)

    # --- text

    def _in_text(self, allowed: frozenset[int], words: tuple[int, ...], context: int) -> list[int]:
        outline = self._outline
        end = QUOTE if outline.is_document else EOS_TOKEN
        ends = [end] if end in allowed else []
        if outline.is_key:
            if ends and outline.text in self._expected:
                return ends
            found = _next_bytes(self._expected, outline.text) & allowed
            if found:
                return _turned(sorted(found), context)
        if ends and outline.is_long:
            return ends
        return self._words(allowed, words, ends, context) if words and BLANK in allowed else self._characters(allowed, end, context)

    def _words(self, allowed: frozenset[int], words: tuple[int, ...], ends: list[int], context: int) -> list[int]:
        """The first word letter by letter, as those of the vocabulary begin with a blank, then some of those."""
        text = self._outline.text
        found = _next_bytes(_NOUNS, text) & allowed if len(text) < 16 and text not in _NOUNS else ()
        if found:
            return _turned(sorted(found), context)
        if ends and self._outline.num_words >= _MOST_WORDS:
            return ends
        return _turned([*ends, *words], context)

    def _characters(self, allowed: frozenset[int], end: int, context: int) -> list[int]:
        text = self._outline.text
        letters = _turned(sorted(LETTERS & allowed), context)
        others = [mark for mark in _MARKS if mark in allowed] or _turned(sorted(_PRINTABLE & allowed), context)
        is_alike = len(text) >= _MOST_ALIKE and LETTERS.issuperset(text[-_MOST_ALIKE:])
        found = (others if is_alike else letters) or others or letters
        if end not in allowed:
            last = [token for token in letters + others if self._can_follow(token, end)] if len(text) >= _MOST_CHARACTERS else []
            return last or found
        if len(text) >= _MOST_CHARACTERS or not found:
            return [end]
        return [end, *found] if text and context >> 32 & 3 == 0 else [*found, end]

    # --- structure

    def _in_structure(self, allowed: frozenset[int], context: int) -> list[int]:
        outline = self._outline
        ends = [token for token in (*CLOSERS, EOS_TOKEN) if token in allowed]
        if outline.last in OPENERS and ends:
            return self._in_empty(allowed, ends, context)
        more = [_COMMA] if _COMMA in allowed else []
        if not ends and not more:
            return self._number(allowed, context) or self._begun(allowed, context)
        is_done = outline.run >= _MOST_DIGITS or outline.is_long or context >> 33 & 1
        digits = [] if is_done else _turned(sorted(_DIGITS & allowed), context)
        if digits:
            return [*digits, *ends, *more]
        if ends and (outline.is_long or not more or (outline.is_object and self._keys and not self._keys_after(b',"'))):
            return ends
        return [*ends, *more] if context >> 34 & 1 else [*more, *ends]

    def _in_empty(self, allowed: frozenset[int], ends: list[int], context: int) -> list[int]:
        """At the beginning of an array or object that may stay empty: objects do where nothing is expected of them."""
        if self._outline.is_long or (self._outline.is_object and self._keys and not self._keys_after(b'"')):
            return ends
        begun = self._begun(allowed - CLOSERS, context)
        if self._outline.is_object:
            return begun
        return [*ends, *begun] if context >> 32 & 3 == 0 else [*begun, *ends]

    def _keys_after(self, begun: bytes) -> frozenset[bytes]:
        """The expected keys that the object does not have yet and that may come after this text."""
        unused = sorted(self._keys - self._outline.used_keys[-1])[:_MOST_KEYS]
        return frozenset(key for key in unused if self._can_follow(*begun, *key, QUOTE))

    def _number(self, allowed: frozenset[int], context: int) -> list[int]:
        """The digits that lead on to the end of a number that cannot end here."""
        if not self._outline.run or self._outline.last not in b"-.0123456789":
            return []
        digits = _turned(sorted(_DIGITS & allowed), context)
        return [digit for digit in digits if any(self._can_follow(digit, end) for end in (_COMMA, *CLOSERS, EOS_TOKEN))] or digits

    def _begun(self, allowed: frozenset[int], context: int) -> list[int]:
        """How a value may begin, or go on: with a string, a literal or a digit, and only now and then with what nests."""
        digits = _turned(sorted(_DIGITS & allowed), context)
        kinds = [*sorted(token for token in allowed if token == QUOTE or (token in LETTERS and token not in _DIGITS)), *digits[:1]]
        nested = sorted(OPENERS & allowed)
        is_flat = self._outline.is_long or len(self._outline.open) >= _FLAT or len(kinds) >= _FLAT or context >> 35 & 1
        if nested and not (kinds and is_flat):
            return _turned(nested, context >> 8)
        chosen = _turned(kinds, context >> 8)
        if chosen and chosen[0] in _DIGITS:
            return digits
        return chosen or sorted(token for token in allowed if token < BLANK or BLANK < token < EOS_TOKEN)


def constrained_output(sampling: Sampling, vocabulary: VocabularyMap) -> ConstrainedOutput | None:
    """None for a request without a constraint. Raises InvalidRequest for a malformed one, Unsupported for what cannot be kept to."""
    if not sampling.json_schema and not sampling.regex and not sampling.choices:
        return None
    constraint = _compiler(vocabulary).compile(json_schema=sampling.json_schema, regex=sampling.regex, choices=sampling.choices)
    keys = _keys_of(sampling.json_schema) if sampling.json_schema else None
    return ConstrainedOutput(constraint, vocabulary.pieces, keys)


@lru_cache(maxsize=8)
def _compiler(vocabulary: VocabularyMap) -> ConstraintCompiler:
    return ConstraintCompiler(vocabulary.pieces.copy, (EOS_TOKEN,), str.encode)


@lru_cache(maxsize=32)
def _keys_of(schema: str) -> frozenset[bytes]:
    """The names of properties, as they stand in a document."""
    return frozenset(json.dumps(name, ensure_ascii=False)[1:-1].encode("utf-8", "replace") for name in property_names(json.loads(schema)))

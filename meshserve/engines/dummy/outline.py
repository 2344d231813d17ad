"""Where in a JSON document its text stands. Pure."""

QUOTE, BLANK, _BACKSLASH, _COMMA, _OBJECT = ord('"'), ord(" "), ord("\\"), ord(","), ord("{")
OPENERS, CLOSERS = frozenset(b"{["), frozenset(b"}]")
LETTERS = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OF_NUMBERS = frozenset(b".-+")
_LONG_TOKENS, _DEEP = 150, 4
_MOST_KEPT = 256


class Outline:
    """Follows a document token by token. A plain text is one string that nothing opens or closes."""

    __slots__ = ("_is_escaped", "_open", "_used", "in_text", "is_document", "is_key", "last", "num_tokens", "num_words", "run", "text")

    def __init__(self, is_document: bool) -> None:
        self.is_document = is_document
        self._open: list[int] = []
        self._used: list[set[bytes]] = []
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
    def depth(self) -> int:
        """How many arrays and objects are open."""
        return len(self._open)

    @property
    def is_object(self) -> bool:
        """Whether the innermost of them is an object."""
        return self._open[-1:] == [_OBJECT]

    @property
    def used_keys(self) -> set[bytes]:
        """The keys of the innermost object so far."""
        return self._used[-1] if self._used else set()

    @property
    def is_long(self) -> bool:
        """Whether the document had better come to its end: by the shortest way, as far as that can be seen."""
        return self.num_tokens > _LONG_TOKENS or len(self._open) > _DEEP

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
            self._used[-1].add(self.text)
        self.in_text, self.is_key, self.last, self.run = False, False, QUOTE, 0

    def _structure(self, byte: int) -> None:
        if byte == BLANK:
            return
        if byte == QUOTE:
            self.is_key = self.is_object and self.last in (_OBJECT, _COMMA)
            self.in_text, self.text, self.num_words, self.run = True, b"", 0, 0
        elif byte in OPENERS:
            self._open.append(byte)
            self._used.append(set())
        elif byte in CLOSERS and self._open:
            self._open.pop()
            self._used.pop()
        if byte not in LETTERS and byte not in _OF_NUMBERS:
            self.run = 0
        self.last = byte

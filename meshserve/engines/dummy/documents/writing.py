"""Writers: what a schema allows, as generators that offer tokens and are told which was chosen.

A writer offers only tokens after which it can come to its end, and which token ends it follows from the tokens alone. So what may
come next is a function of the tokens so far, and whoever is given those can go on. All but words are byte tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from itertools import chain, pairwise

from meshserve.engines.tokenizers import WORD_RANGES, ByteTokenizer

Writing = Generator[Sequence[int], int, None]
"""Offers tokens, and is sent the one that was chosen."""

ENDLESS = 1 << 40
"""Size of what has no document, or none that ends."""
MOST_NESTED = 64
"""Writers within each other: each costs a little with every token, and Python's stack is finite."""
_FREE_NESTED = 6
_FREE_TOKENS = 400
"""Deeper or later than this a document is brought to its end by the shortest way."""
_LARGEST_OPTION = 400
_MOST_THREADS = 16
_MOST_ITEMS = 3
_MOST_SKIPPED = 2

_ONE = tuple((byte,) for byte in range(256))
_QUOTE = ord('"')
_WORDS = tuple(chain(WORD_RANGES["adjective"], WORD_RANGES["noun"]))
_BYTES = ByteTokenizer()
_WORD_LENGTHS = {token: len(_BYTES.token_bytes(token)) for token in _WORDS}
_LONGEST_WORD = max(_WORD_LENGTHS.values())
_FIRST_WORDS = tuple(_BYTES.token_bytes(token)[1:] for token in WORD_RANGES["noun"])
_LETTERS = tuple(b"abcdefghijklmnopqrstuvwxyz")
_MOST_WORDS, _MOST_LETTERS = 3, 6

CLASSES = {"#": b"0123456789", "+": b"123456789", "~": b"012345", "%": b"0123456789abcdef", "?": bytes(_LETTERS)}
"""What stands for several bytes in a template."""


class Paper:
    """What all writers of one document share."""

    __slots__ = ("num_threads", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_threads = 1

    def is_short(self, nested: int) -> bool:
        """Whether a writer at this depth had better come to its end."""
        return nested > _FREE_NESTED or self.num_tokens > _FREE_TOKENS


class Writer(ABC):
    """One place of the schema. `size` is the length of the shortest document in bytes, `height` how deep it nests."""

    __slots__ = ("height", "size")

    def __init__(self, size: int = ENDLESS, height: int = 1) -> None:
        self.size, self.height = size, height

    def settle(self) -> bool:
        """Find size and height anew from those of the writers within. True if they changed."""
        return False

    def _settle_at(self, size: int, height: int) -> bool:
        if size >= ENDLESS or (size, height) == (self.size, self.height):
            return False
        self.size, self.height = size, height
        return True

    @abstractmethod
    def write(self, paper: Paper, nested: int) -> Writing:
        """Write one document, within so many others; only if it has a finite one."""

    def is_option(self, nested: int) -> bool:
        """Whether it may be written where it need not be."""
        return self.size <= _LARGEST_OPTION and nested + self.height < MOST_NESTED


def spell(texts: Sequence[bytes]) -> Generator[Sequence[int], int, bytes]:
    """Write one of these texts, none of which begins with another, byte by byte; returns which."""
    index = 0
    while len(texts) > 1:
        byte = yield tuple(dict.fromkeys(text[index] for text in texts))
        texts = [text for text in texts if text[index] == byte]
        index += 1
    for byte in texts[0][index:]:
        yield _ONE[byte]
    return texts[0]


def prefix_free(texts: Sequence[bytes]) -> tuple[bytes, ...]:
    """These texts without those that another begins with, in their order: which one is meant can be told at its last byte."""
    ordered = sorted({*texts})  # what begins with a text then stands right behind it
    kept = {*texts} - {text for text, after in pairwise(ordered) if after.startswith(text)}
    return tuple(text for text in dict.fromkeys(texts) if text in kept)


class Literal(Writer):
    """One of several texts; none is no document at all."""

    __slots__ = ("texts",)

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = prefix_free(texts)
        super().__init__(min(map(len, self.texts), default=ENDLESS))

    def write(self, paper: Paper, nested: int) -> Writing:
        yield from spell(self.texts)


class Template(Writer):
    """A string of fixed length, some of whose characters are free."""

    __slots__ = ("template",)

    def __init__(self, template: str) -> None:
        super().__init__(len(template) + 2)
        self.template = f'"{template}"'

    def write(self, paper: Paper, nested: int) -> Writing:
        for character in self.template:
            yield CLASSES.get(character) or _ONE[ord(character)]


class Text(Writer):
    """A string of words, or of letters where words would be too long; lengths in characters, all of which are one byte."""

    __slots__ = ("least", "most")

    def __init__(self, least: int = 0, most: int = ENDLESS) -> None:
        super().__init__(least + 2 if least <= most else ENDLESS)
        self.least, self.most = least, most

    def write(self, paper: Paper, nested: int) -> Writing:
        yield _ONE[_QUOTE]
        num_characters = num_words = 0
        if self.most >= _LONGEST_WORD and not paper.is_short(nested):
            num_characters = len((yield from spell(_FIRST_WORDS)))
            num_words = 1
        while True:
            offered = self._offered(num_characters, num_words, paper.is_short(nested))
            token = yield offered
            if token == _QUOTE:
                return
            num_characters += _WORD_LENGTHS.get(token, 1)
            num_words += 1

    def _offered(self, num_characters: int, num_words: int, is_short: bool) -> Sequence[int]:
        end = _ONE[_QUOTE] if num_characters >= self.least else ()
        if num_characters + _LONGEST_WORD <= self.most:
            return (*end, *_WORDS) if not end or (num_words < _MOST_WORDS and not is_short) else end
        if num_characters < self.most and (not end or (num_words < _MOST_LETTERS and not is_short)):
            return (*end, *_LETTERS)
        return end


class ArrayOf(Writer):
    """An array of like items, as short as allowed but never empty if it need not be. With `items` None it is always empty."""

    __slots__ = ("items", "least", "most")

    def __init__(self, items: Writer | None, least: int = 0, most: int = ENDLESS) -> None:
        super().__init__()
        self.items, self.least, self.most = items, least, most

    def settle(self) -> bool:
        size, height = 2, 1
        if self.least:
            items = self.items
            size = ENDLESS if items is None or self.least > self.most else 2 + self.least * (items.size + 2)
            height = items.height + 1 if items is not None else 1
        return self._settle_at(size, height)

    def write(self, paper: Paper, nested: int) -> Writing:
        items = self.items
        if items is None or not self._wants_more(0, paper, nested):
            yield from spell((b"[]",))
            return
        yield _ONE[ord("[")]
        num_items = 0
        while True:
            yield from items.write(paper, nested + 1)
            num_items += 1
            endings = [b"]"] if num_items >= self.least else []
            if self._wants_more(num_items, paper, nested):
                endings.append(b", ")
            if (yield from spell(endings)) == b"]":
                return

    def _wants_more(self, num_items: int, paper: Paper, nested: int) -> bool:
        if num_items < self.least:
            return True
        assert self.items is not None
        is_free = num_items < min(self.most, _MOST_ITEMS) and not paper.is_short(nested)
        return is_free and self.items.is_option(nested + 1)


class ObjectOf(Writer):
    """An object with some of these properties, in their order, and all of the required ones."""

    __slots__ = ("properties",)

    def __init__(self, properties: Sequence[tuple[bytes, Writer, bool]]) -> None:
        """Each property is its key as JSON, its writer, and whether it is required."""
        super().__init__()
        self.properties = [(key + b": ", writer, is_required) for key, writer, is_required in properties]

    def settle(self) -> bool:
        required = [(len(key) + 2 + writer.size, writer.height) for key, writer, is_required in self.properties if is_required]
        return self._settle_at(2 + sum(size for size, _ in required), 1 + max((height for _, height in required), default=0))

    def write(self, paper: Paper, nested: int) -> Writing:
        opening, index = b"{", 0
        while True:
            choices = self._choices(opening, index, paper, nested)
            chosen = choices[(yield from spell([*choices]))]
            if chosen is None:
                return
            yield from self.properties[chosen][1].write(paper, nested + 1)
            opening, index = b", ", chosen + 1

    def _choices(self, opening: bytes, start: int, paper: Paper, nested: int) -> dict[bytes, int | None]:
        """What may follow, with the property that it begins, or None if it is the end."""
        choices: dict[bytes, int | None] = {}
        is_short = paper.is_short(nested)
        for index in range(start, len(self.properties)):
            key, writer, is_required = self.properties[index]
            if is_required:
                return {**choices, opening + key: index}
            if len(choices) <= _MOST_SKIPPED and not is_short and writer.is_option(nested + 1):
                choices[opening + key] = index
        return {**choices, b"{}" if opening == b"{" else b"}": None}


class AnyOf(Writer):
    """One of several. Those that begin alike are written side by side, until the tokens tell which of them it is."""

    __slots__ = ("branches", "shortest")

    def __init__(self, branches: Sequence[Writer] = ()) -> None:
        super().__init__()
        self.branches = branches
        self.shortest: Writer | None = None

    def settle(self) -> bool:
        for branch in self.branches:
            if branch.size < (self.shortest.size if self.shortest is not None else ENDLESS):
                self.shortest = branch  # only then: of branches that are as short, some may lead back here
        return self.shortest is not None and self._settle_at(self.shortest.size, self.shortest.height + 1)

    def write(self, paper: Paper, nested: int) -> Writing:
        branches = self._branches(paper, nested)
        if len(branches) == 1:
            return branches[0].write(paper, nested + 1)
        return _side_by_side(branches, paper, nested + 1)

    def _branches(self, paper: Paper, nested: int) -> list[Writer]:
        assert self.shortest is not None, "only what has a finite document is written"
        if paper.is_short(nested):
            return [self.shortest]
        free = [branch for branch in self.branches if branch is not self.shortest and branch.is_option(nested + 1)]
        return [self.shortest, *free[: max(0, _MOST_THREADS - paper.num_threads)]]


def _side_by_side(branches: list[Writer], paper: Paper, nested: int) -> Writing:
    threads = [branch.write(paper, nested) for branch in branches]
    num_others = len(threads) - 1
    paper.num_threads += num_others
    try:
        offers = [(thread, next(thread)) for thread in threads]
        while True:
            token = yield tuple(dict.fromkeys(chain.from_iterable(offer for _, offer in offers)))
            for thread, offer in offers:
                if token not in offer:
                    thread.close()
            going = [thread for thread, offer in offers if token in offer]
            paper.num_threads -= len(offers) - len(going)
            num_others -= len(offers) - len(going)
            offers = [(thread, thread.send(token)) for thread in going]
    except StopIteration:  # one of them is complete, and so the document is valid
        return
    finally:
        for thread in threads:
            thread.close()
        paper.num_threads -= num_others

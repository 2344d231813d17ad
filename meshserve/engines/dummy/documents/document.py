"""A document as it is written, and schemas as they were read."""

from collections.abc import Sequence
from functools import lru_cache

from meshserve.engines.dummy.documents.reading import Reader
from meshserve.engines.dummy.documents.writing import Paper, Writer


@lru_cache(maxsize=16)
def read_schema(text: str) -> Writer:
    """The writer of a JSON Schema's documents, in under 10 ms.

    Raises InvalidRequest for what is no schema, Unsupported for one that cannot be kept to; both name `response_format`.
    """
    return Reader.read(text)


class WrittenDocument:
    """One document in the making."""

    __slots__ = ("_offered", "_paper", "_writing")

    def __init__(self, writer: Writer) -> None:
        self._paper = Paper()
        self._writing = writer.write(self._paper, 0)
        self._offered: Sequence[int] = next(self._writing)

    def candidates(self) -> Sequence[int]:
        """Tokens that may come next; empty once the document is complete."""
        return self._offered

    def take(self, token: int) -> None:
        """One of them was chosen; whatever is, once it is complete."""
        if not self._offered:
            return
        self._paper.num_tokens += 1
        try:
            self._offered = self._writing.send(token)
        except StopIteration:
            self._offered = ()

"""Files of models, which workers give out a part at a time."""

from meshserve.wire.message import Count, Row


class FilePartRequest(Row):
    """The part of a file that begins at this byte."""

    sha256: str
    """Of the whole file."""
    offset: Count

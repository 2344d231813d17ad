"""An answer that comes in pieces, broken into lines between words. Pure."""

from rich.cells import cell_len


class Paragraph:
    """Gives out each word once its end is known; lines after the first are indented."""

    def __init__(self, width: int, indent: int) -> None:
        """`width` and `indent` in columns; the first line begins at the indent, with what stands there already."""
        self._width, self._indent = max(10, width - indent), indent
        self._column = 0
        self._space = self._word = ""

    def add(self, text: str) -> str:
        """What is to be printed now. Spaces and empty lines before the first word are left out."""
        out = []
        for letter in text:
            if not letter.isspace():
                self._word += letter
                continue
            out.append(self.end())
            if self._column or self._space:
                self._space = "\n" if letter == "\n" or self._space == "\n" else " "
        return "".join(out)

    def end(self) -> str:
        """The last word."""
        word, space, self._word = self._word, self._space, ""
        if not word:
            return ""
        width = cell_len(word)
        if space == "\n" or (self._column and self._column + len(space) + width > self._width):
            space, self._column = "\n" + " " * self._indent, 0
        self._column += width + (len(space) if space == " " else 0)
        self._space = ""
        return space + word

"""How the demo breaks answers into lines."""

import pytest

from meshserve.cli.demo.view import Paragraph


def broken(*pieces: str, width: int = 24, indent: int = 4) -> str:
    paragraph = Paragraph(width, indent)
    return "".join(map(paragraph.add, pieces)) + paragraph.end()


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (("one two",), "one two"),
        (("on", "e", " tw", "o"), "one two"),
        (("\n\n  one",), "one"),
        (("one  \t two \n",), "one two"),
        (("one\n\ntwo",), "one\n    two"),
        (("twelve letters and twelve",), "twelve letters and\n    twelve"),
        (("exactly twenty words", " and"), "exactly twenty words\n    and"),
        (("awordthatislongerthantheline is", " cut by others"), "awordthatislongerthantheline\n    is cut by others"),
        (("漢字漢字漢字 漢字漢字漢字",), "漢字漢字漢字\n    漢字漢字漢字"),
        (("",), ""),
    ],
)
def test_an_answer_is_broken_between_words_wherever_its_pieces_end(pieces: tuple[str, ...], lines: str) -> None:
    assert broken(*pieces) == lines
    assert broken(*"".join(pieces)) == lines

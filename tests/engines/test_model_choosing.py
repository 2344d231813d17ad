"""Which file of a repository a spec means."""

import pytest

from meshserve.engines.models.choosing import choose, quantization_of
from meshserve.errors import UsageError

USUAL = ["README.md", "m-F16.gguf", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-F16.gguf"]
SPLIT = [f"Q8_0/m-Q8_0-0000{number}-of-00002.gguf" for number in (2, 1)]


@pytest.mark.parametrize(
    ("names", "wanted", "file"),
    [
        (USUAL, "", "m-Q4_K_M.gguf"),
        (USUAL, "q4_0", "m-Q4_0.gguf"),
        (USUAL, "F16", "m-F16.gguf"),
        (USUAL, "mmproj-m-F16.gguf", "mmproj-m-F16.gguf"),
        (["m.q4_0.gguf", "m.Q8_0.gguf"], "", "m.q4_0.gguf"),
        (["m_q8_0.gguf", "imatrix.gguf"], "", "m_q8_0.gguf"),
        (["odd.gguf"], "", "odd.gguf"),
        (["m-Q4_K_S.gguf", "m-Q4_K_M.gguf"], "Q4_K_S", "m-Q4_K_S.gguf"),
        (["m-IQ4_XS.gguf", "m-Q4_XS.gguf"], "Q4_XS", "m-Q4_XS.gguf"),
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "", "m-Q4_K_M.gguf"),
        (["a/m.gguf", "b/m-Q8_0.gguf"], "a/m.gguf", "a/m.gguf"),
    ],
)
def test_a_model_is_found_by_file_quantization_or_the_usual_order(names: list[str], wanted: str, file: str) -> None:
    assert choose("org/repo", names, wanted).files == (file,)


def test_only_a_choice_among_several_is_a_default() -> None:
    assert choose("org/repo", USUAL, "").is_default
    assert not choose("org/repo", USUAL, "Q8_0").is_default and not choose("org/repo", ["m.gguf", "mmproj-m.gguf"], "").is_default


@pytest.mark.parametrize("wanted", ["", "Q8_0", "m-Q8_0.gguf", "m-Q8_0-00001-of-00002.gguf"])
def test_a_split_model_is_one_model_with_its_parts_in_order(wanted: str) -> None:
    assert choose("org/repo", SPLIT, wanted).files == tuple(reversed(SPLIT))


@pytest.mark.parametrize(
    ("names", "wanted", "words"),
    [
        (["README.md"], "", "holds no .gguf file"),
        (USUAL, "Q4_K", "holds no Q4_K; there are: m-F16.gguf, m-Q4_0.gguf"),
        (USUAL, "other.gguf", "holds no other.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "could be any of a-Q8_0.gguf, b-Q8_0.gguf; name the file"),
        (["one.gguf", "two.gguf"], "", "holds 2 models; add one as hf:org/repo:NAME: one.gguf, two.gguf"),
        (SPLIT[:1], "", "of the 2 parts of Q8_0/m-Q8_0-00002-of-00002.gguf only 1 are there"),
    ],
)
def test_what_fits_nothing_or_too_much_is_refused_with_what_there_is(names: list[str], wanted: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose("org/repo", names, wanted)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("m-Q4_K_M.gguf", "Q4_K_M"), ("m.q8_0.gguf", "Q8_0"), ("m-UD-IQ2_XXS.gguf", "IQ2_XXS"), ("m-bf16.gguf", "BF16"), ("m.gguf", "")],
)
def test_a_quantization_is_read_from_a_name(name: str, quantization: str) -> None:
    assert quantization_of(name) == quantization

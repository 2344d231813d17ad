"""How vocabularies split a text into words before they make tokens of it, by `tokenizer.ggml.pre`. Patterns are applied in order.

Written for the `tokenizers` library so that they split as llama.cpp does, which is not always as the model's own files do.
"""

import re

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_SPACES}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}[\r\n]*|{_SPACES}"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_UNICODE_16 = (
    r"\x{897}\x{1B4E}-\x{1B4F}\x{1B7F}\x{1C89}-\x{1C8A}\x{2427}-\x{2429}\x{31E4}-\x{31E5}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}"
    r"\x{105C0}-\x{105F3}\x{10D40}-\x{10D8F}\x{10EC2}-\x{10EFC}\x{11380}-\x{113E2}\x{116D0}-\x{116E3}\x{11BC0}-\x{11BF9}\x{11F5A}"
    r"\x{13460}-\x{143FA}\x{16100}-\x{16139}\x{16D40}-\x{16D79}\x{18CFF}\x{1CC00}-\x{1CEB3}\x{1E5D0}-\x{1E5FF}\x{1F8B2}-\x{1F8C1}"
    r"\x{1FA89}-\x{1FA8F}\x{1FABE}\x{1FAC6}\x{1FADC}-\x{1FADF}\x{1FAE9}\x{1FBCB}-\x{1FBEF}"
)
"""Characters that Unicode 16 added: `tokenizers` knows what they are, llama.cpp does not."""


def _known(pattern: str) -> str:
    """A pattern whose classes of characters leave out what llama.cpp does not know."""
    return re.sub(r"\\p\{\w+\}", lambda found: f"[{found[0]}&&[^{_UNICODE_16}]]", pattern)


_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT_2,),
    "smollm": (r"\p{N}", _GPT_2),
    "llama-bpe": (_LLAMA_3,),
    "dbrx": (_LLAMA_3,),
    "qwen2": (_QWEN_2,),
    "qwen35": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    "seed-coder": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    "tekken": (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}",),
    "gpt-4o": (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_SPACES}",),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
SPLITS: dict[str, tuple[str, ...]] = {name: tuple(map(_known, patterns)) for name, patterns in _PATTERNS.items()}
ALIASES: dict[str, str] = {
    name: split
    for split, names in {
        "gpt-2": "phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "qwen2": "deepseek-r1-qwen kormo stablelm2 megrez hunyuan grok-2 solar-open",
        "dbrx": "smaug-bpe glm4 chatglm-bpe",
        "gpt-4o": "llama4 kanana2 minimax-m2",
        "deepseek-v3": "hunyuan-dense joyai-llm",
    }.items()
    for name in names.split()
}
"""Names of models that split as another does, and are the same in all else that matters here."""
IGNORES_MERGES = frozenset(["llama-bpe", "tekken"])
"""A word that is a token as a whole is taken as it is."""
BOS_BY_DEFAULT = frozenset(["llama-bpe", "tekken"])
"""A text starts with the beginning of sequence unless the file says otherwise."""

#!/usr/bin/env bash
# tokenizers 0.23.3 and llama.cpp (xllamacpp 2026.10.11549): the same BPE vocabulary, merges and regular expression split text differently.
#
# One would guess: a BPE tokenizer is its vocabulary, its merges and its regular expression. Make a `tokenizer.json` from the three that a
# GGUF file names, and both libraries tokenize alike. Differences come from a mistake in the conversion.
#
# What happens: `\p{L}` is not in the file. Each library brings its own table of letters: tokenizers the one of Unicode 16, llama.cpp an
# older one. Thousands of code points (Garay, Todhri, more Egyptian hieroglyphs, but also new Latin and Cyrillic letters) are letters for
# tokenizers only, and a word with one of them falls apart in llama.cpp. None is the other way round.
#
# Why it matters: two processes of one system count different tokens for the same prompt and hash different prefixes. A conversion that is
# to be exact must write the table out as character ranges; a test with words of today's languages does not show the difference.
set -euo pipefail
. "$(dirname "$0")/llama_environment.sh" tokenizers==0.23.3

"$python" - "$folder/vocabulary.gguf" <<'END'
import ctypes as c
import sys
from importlib.metadata import version

import gguf
from llama_c_api import call, load_model, save
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# What llama.cpp calls "llama-bpe". The text below is letters, signs and line ends only.
EXPRESSION = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [value for value in range(256) if value not in PRINTED]
LETTER_OF = {value: chr(value) if value in PRINTED else chr(256 + OTHERS.index(value)) for value in range(256)}
# One token for each byte, and one for "a" with the first byte of any other character: it shows that "a" and the character stay together.
LEADS = [LETTER_OF[value] for value in range(0xC2, 0xF5)]
PIECES = [LETTER_OF[value] for value in range(256)] + ["a" + lead for lead in LEADS]
LINE_END = 10

tokenizer = Tokenizer(models.BPE(vocab={piece: token for token, piece in enumerate(PIECES)}, merges=[("a", lead) for lead in LEADS]))
by_expression, as_letters = pre_tokenizers.Split(Regex(EXPRESSION), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_expression, as_letters])

writer = gguf.GGUFWriter(sys.argv[1], "llama")
for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
    writer.add_uint32(f"llama.{name}", 1)
writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(PIECES)
writer.add_token_types([gguf.TokenType.NORMAL] * len(PIECES))
writer.add_token_merges([f"a {lead}" for lead in LEADS])
save(writer)
vocabulary = c.c_void_p(call("llama_model_get_vocab", c.c_void_p, load_model(sys.argv[1], vocab_only=True)))


def llama_encode(text: str) -> list[int]:
    content = text.encode()
    tokens = (c.c_int32 * len(content))()
    count = call("llama_tokenize", c.c_int32, vocabulary, content, len(content), tokens, len(content), False, False)
    return tokens[:count]


def letters_of(encode, characters: list[str]) -> set[str]:
    """The characters that stay together with an "a" before them."""
    tokens = encode("".join(f"a{character}\n" for character in characters))
    starts = [0, *(place + 1 for place, token in enumerate(tokens) if token == LINE_END)][:-1]
    return {character for character, start in zip(characters, starts, strict=True) if tokens[start] > 255}


SPACES = {*map(chr, range(0x80, 0xA1)), *map(chr, range(0x2000, 0x200B)), *"\u1680\u2028\u2029\u202f\u205f\u3000"}
CHARACTERS = [chr(point) for point in (*range(0x80, 0xD800), *range(0xF900, 0x1F000)) if chr(point) not in SPACES]
found = {"tokenizers": set(), "llama.cpp": set()}
for at in range(0, len(CHARACTERS), 4000):
    part = CHARACTERS[at : at + 4000]
    found["tokenizers"] |= letters_of(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, part)
    found["llama.cpp"] |= letters_of(llama_encode, part)
newer, older = found["tokenizers"] - found["llama.cpp"], found["llama.cpp"] - found["tokenizers"]
print("tokenizers", version("tokenizers"), "xllamacpp", version("xllamacpp"))
print("letters:", {name: len(letters) for name, letters in found.items()}, "only tokenizers:", len(newer), "only llama.cpp:", len(older))
print("among them:", *(f"U+{ord(letter):04X}" for letter in sorted(newer)[:10]), "and later", f"U+{ord(max(newer)):04X}")
sample = "a\u1c8a"
print("one of them after an 'a', in tokens:", len(tokenizer.encode(sample).ids), "and", len(llama_encode(sample)))
same = len(newer) == 4302 and not older and "\u1c8a" in newer
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

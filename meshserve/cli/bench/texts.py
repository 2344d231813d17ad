"""Text of so many tokens, the same for the same label. Pure.

How long it has to be is measured at the target itself, which counts the tokens of two probes; see :func:`Scale.from_probes`.
"""

import random
import zlib
from dataclasses import dataclass

_POOL_CHARS = 1 << 18
_TEXT = """
mesh peer prompt token block cache river harbour paper window signal garden letter engine number winter summer bridge stone
market station silver copper evening morning thunder valley mountain island ocean forest meadow lantern mirror shadow
the of and to in that it was for with as his on be at by had not are but from or have an they which one you were her all
she there would their we him been has when who will more no if out so said what up its about into than them can only other
"""
PROBE_CHARS = (400, 2000)


@dataclass(frozen=True, slots=True)
class Scale:
    """How the target's tokens relate to characters."""

    chars_per_token: float = 4.0
    """What is usual for English text."""
    num_overhead_tokens: float = 0.0
    """That each request has on top, such as a chat's template."""

    def num_chars(self, num_tokens: int, is_first: bool = True) -> int:
        """Of a text with so many tokens; the first text of a prompt carries what the template adds."""
        return max(1, round((num_tokens - (self.num_overhead_tokens if is_first else 0.0)) * self.chars_per_token))

    @classmethod
    def from_probes(cls, num_short: int, num_long: int) -> "Scale | None":
        """From how many tokens texts of :data:`PROBE_CHARS` characters had; None if that cannot be."""
        num_more = num_long - num_short
        if num_more <= 0:
            return None
        short_chars, long_chars = PROBE_CHARS
        chars_per_token = (long_chars - short_chars) / num_more
        return cls(chars_per_token, max(0.0, num_short - short_chars / chars_per_token))


class Texts:
    """Slices of one long random text, each with a label in front, so that no two labels share a beginning."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"texts {seed}")
        known, words = _TEXT.split(), list[str]()
        size = 0
        while size < _POOL_CHARS:
            words.append(rng.choice(known))
            size += len(words[-1]) + 1
        self._pool = " ".join(words)

    def make(self, label: str, num_chars: int) -> str:
        """Exactly so many characters."""
        begin = zlib.crc32(label.encode()) % (len(self._pool) // 2)
        text = f"{label} {self._pool[begin : begin + num_chars]}"
        while len(text) < num_chars:
            text += self._pool
        return text[:num_chars]

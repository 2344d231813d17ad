#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549, CPU): results with an f16 or f32 KV cache depend on how a prompt is cut; with q8_0 they do not.
#
# One would guess: the less a KV cache is compressed, the closer the results of two ways to compute the same prompt. Exact equality of
# floats is not to be had anyway; f32 comes nearest, and a quantized cache adds noise of its own.
#
# What happens: with flash attention on and one thread, the logits after a prompt of 512 tokens are bit-equal for all cuts if the cache is
# q8_0. With f16, chunks of 33 or 16 tokens give other logits than chunks of 256 or 512, some percent of their spread apart: the CPU code
# attends in another way with many queries at once than with few, unless keys and values are quantized. A cache in f32 takes twice the
# memory and gives the very logits of f16, cut for cut.
#
# Why it matters: prefix caches, chunked prefill and KV blocks from another peer change the cut of a prompt. Tests for equal output, and
# caches of results, need q8_0, or a cut that never changes. To choose f32 "to be exact" makes nothing exact.
set -euo pipefail
. "$(dirname "$0")/llama_environment.sh"

"$python" - "$folder/model.gguf" <<'END'
import sys
from importlib.metadata import version

import numpy as np
from llama_c_api import F16, F32, Q8_0, TEXT, Context, load_model, write_model

write_model(sys.argv[1])
model = load_model(sys.argv[1])
cache_bytes = {}


def logits(cache_type: int, chunk: int) -> np.ndarray:
    """The logits of the text's last token, the text computed in chunks of so many tokens, the last token alone."""
    context, last = Context(model, cache_type), len(TEXT) - 1
    for first in range(0, last, chunk):
        context.compute(first, TEXT[first : min(first + chunk, last)])
    found = context.compute(last, TEXT[last:])
    cache_bytes[cache_type] = len(context.state())
    return found


print("xllamacpp", version("xllamacpp"))
seen = {name: {chunk: logits(kind, chunk) for chunk in (512, 256, 33, 16)} for name, kind in {"f32": F32, "f16": F16, "q8_0": Q8_0}.items()}
apart = {name: {chunk: float(np.abs(found[chunk] - found[512]).max()) for chunk in (256, 33, 16)} for name, found in seen.items()}
for name, by_chunk in apart.items():
    print(f"{name:5} furthest from the logits of chunks of 512, by chunk: {by_chunk}; spread of the logits {seen[name][512].std():.2f}")
equal = all(np.array_equal(seen["f32"][chunk], seen["f16"][chunk]) for chunk in seen["f16"])
print(f"bytes of the sequence in f32: {cache_bytes[F32]}, f16: {cache_bytes[F16]}, q8_0: {cache_bytes[Q8_0]}")
print("f32 and f16 give equal logits, cut for cut:", equal)
same = equal and cache_bytes[F32] > 1.8 * cache_bytes[F16] and not any(apart["q8_0"].values())
same = same and all(apart["f16"][chunk] > 0.001 for chunk in (33, 16))
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

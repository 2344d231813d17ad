#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549, CPU, flash attention): where a sequence's cells lie in the pool changes its logits, with q8_0 too.
#
# One would guess: with a q8_0 cache results are exact. They are, bit for bit, whatever the chunks, the threads, the other users of the
# batch, and wherever the cells lie: attention is a sum over the same cells.
#
# What happens: attention goes through the pool from its first cell to its last and sums as it goes. If another sequence left a hole and
# later positions went into it, the same values are summed in another order; a last bit differs, the next layer's values round to another
# q8_0 step, and the logits are apart by 0.04 to 0.06. With two layers of random weights no bit differs; with six layers it does.
#
# Why it matters: a test with one user, or with a small model, finds everything equal. A server that promises equal outputs must keep the
# cells of a sequence in the order of their positions: place new ones above the sequence's last cell, and move a sequence by export and
# import where it has none.
set -euo pipefail
. "$(dirname "$0")/llama_environment.sh"

"$python" - "$folder" <<'END'
import sys
from importlib.metadata import version

import numpy as np
from llama_c_api import Q8_0, TEXT, Context, load_model, write_model


def distance(num_layers: int, hole: int, *, is_hole_first: bool) -> float:
    """How far the last token's logits are from those in an empty pool, if another sequence's cells lay first, and were left or not."""
    path = f"{sys.argv[1]}/{num_layers}.gguf"
    write_model(path, num_layers=num_layers)
    model = load_model(path)
    alone, shared = Context(model, Q8_0), Context(model, Q8_0)
    shared.compute(0, TEXT[256 : 256 + hole], sequence=1)  # another user
    for context in (alone, shared):
        context.compute(0, TEXT[:hole])
    if is_hole_first:
        shared.remove(1, 0)  # leaves, and the next tokens take these cells
    for context in (alone, shared):
        context.compute(hole, TEXT[hole:192])
    logits = [context.compute(192, TEXT[192:193]) for context in (alone, shared)]
    return float(np.abs(logits[0] - logits[1]).max())


print("xllamacpp", version("xllamacpp"))
in_order = {hole: distance(6, hole, is_hole_first=False) for hole in (32, 128)}
out_of_order = {hole: distance(6, hole, is_hole_first=True) for hole in (32, 128)}
two_layers = {hole: distance(2, hole, is_hole_first=True) for hole in (32, 128)}
print("six layers, the other sequence stays: cells in order, logits apart by", in_order)
print("six layers, it leaves: later positions lie before earlier ones, logits apart by", out_of_order)
print("two layers, it leaves: logits apart by", two_layers)
same = not any(in_order.values()) and min(out_of_order.values()) > 0.001 and not any(two_layers.values())
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

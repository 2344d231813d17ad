#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549, CPU): equal KV caches give different bytes.
#
# One would guess: `llama_state_seq_get_data` writes the cells of a sequence by position. Where the numbers are exact (a q8_0 cache), the
# bytes are a function of the tokens: hash them to compare two caches, or cut them at a multiple of a cell's size to get a prefix.
#
# What happens: cells are written in the order in which they lie in the pool. If another sequence has left a hole, new tokens fill the
# hole, and the state has later positions before earlier ones. Lengths are equal, and with these two layers even the logits; the bytes are
# not.
#
# Why it matters: this shows only in a pool that several users share, so in no test with one sequence. Hash and compare a block only after
# import and export through an empty place, or by tokens; never cut a blob.
set -euo pipefail
. "$(dirname "$0")/llama_environment.sh"

"$python" - "$folder/model.gguf" <<'END'
import sys
from importlib.metadata import version

import numpy as np
from llama_c_api import Q8_0, TEXT, Context, load_model, write_model

write_model(sys.argv[1])
model = load_model(sys.argv[1])
alone, shared = Context(model, Q8_0), Context(model, Q8_0)
alone.compute(0, TEXT[:64])
shared.compute(0, TEXT[100:164], sequence=1)  # another user
shared.compute(0, TEXT[:64])
shared.remove(1, 0)  # leaves
logits = [context.compute(64, TEXT[64:128]) for context in (alone, shared)]
states = [context.state() for context in (alone, shared)]


def positions(state: bytes) -> list[int]:
    """After 16 bytes a cell has three numbers: position, count of sequences, sequence."""
    return np.frombuffer(state[16 : 16 + 128 * 12], "<i4")[::3].tolist()


def ranges(order: list[int]) -> str:
    breaks = [0, *(at for at in range(1, len(order)) if order[at] != order[at - 1] + 1), len(order)]
    return ", ".join(f"{order[first]} to {order[past - 1]}" for first, past in zip(breaks, breaks[1:]))


print("xllamacpp", version("xllamacpp"))
outcome = np.array_equal(*logits), len(states[0]) == len(states[1]), states[0] == states[1]
print("logits equal: {} - lengths equal: {} - bytes equal: {}".format(*outcome))
orders = [ranges(positions(state)) for state in states]
print("positions in the state, alone:", orders[0], "- in the shared pool:", orders[1])
same = outcome == (True, True, False) and orders == ["0 to 127", "64 to 127, 0 to 63"]
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

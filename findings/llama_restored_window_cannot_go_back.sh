#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549, CPU): a state from a full-size sliding-window cache is not full-size.
#
# One would guess: with `swa_full` the layers that attend to a window keep all cells, which is what the option is for: to go back to an
# earlier token. A state that is saved from such a context and restored into another one can go back just so.
#
# What happens: the context does keep all cells, but `llama_state_seq_get_data` writes only those which the window of the latest token
# covers. After restoring, `llama_memory_seq_rm` of the tail returns True, the next tokens are computed without an error, and the logits
# are wrong, as the cells before are missing. Without going back all is well, so the loss stays hidden. A model without windows (llama)
# goes back and has equal logits.
#
# Why it matters: restored chats are edited and regenerated, and prefix caches keep long states to use parts of them: both go back. Export
# each prefix that is to be used again while it is the latest, and take whole states only.
set -euo pipefail
. "$(dirname "$0")/llama_environment.sh"

"$python" - "$folder/model.gguf" <<'END'
import sys
from importlib.metadata import version

import numpy as np
from llama_c_api import Q8_0, TEXT, WINDOW, Context, load_model, write_model

LENGTH, KEPT = 384, 128


def outcome(architecture: str, num_layers: int) -> dict:
    """Compute a text, save it, restore it elsewhere; go on with other tokens from the end, and from an earlier position."""
    write_model(sys.argv[1], architecture, num_layers)
    model = load_model(sys.argv[1])
    first, second = Context(model, Q8_0), Context(model, Q8_0)
    lengths = []
    for at in range(0, LENGTH, 64):
        first.compute(at, TEXT[at : at + 64])
        lengths.append(len(first.state()))
    assert second.set_state(first.state())
    from_end = [context.compute(LENGTH, TEXT[:64]) for context in (first, second)]
    removed = [context.remove(0, KEPT) for context in (first, second)]
    from_kept = [context.compute(KEPT, TEXT[400:464]) for context in (first, second)]
    fresh = Context(model, Q8_0)
    fresh.compute(0, TEXT[:KEPT])
    expected = fresh.compute(KEPT, TEXT[400:464])
    growth = [after - before for before, after in zip(lengths, lengths[1:])]
    return {"growth": growth, "from the end": np.array_equal(*from_end), "removed": removed,
            "went back": [np.array_equal(expected, logits) for logits in from_kept],
            "furthest": float(np.abs(from_kept[1] - expected).max())}  # fmt: skip


print("xllamacpp", version("xllamacpp"))
results = {name: outcome(name, num_layers) for name, num_layers in (("llama", 2), ("gemma3", 6))}
for name, seen in results.items():
    print(f"{name} (window: {WINDOW if name == 'gemma3' else 'none'}): the state grows with 64 more tokens by {seen['growth']} bytes")
    print(f"    goes on from the end as the original: {seen['from the end']}; the tail is removed (original, restored): {seen['removed']}")
    print(f"    goes on from token {KEPT} as a fresh cache: {seen['went back']}; furthest logit {seen['furthest']:.3f}")
llama, gemma = results["llama"], results["gemma3"]
same = llama["from the end"] and gemma["from the end"] and llama["removed"] == gemma["removed"] == [True, True]
same = same and llama["went back"] == [True, True] and gemma["went back"] == [True, False] and gemma["furthest"] > 0.01
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

"""A trial of the handoff at load: blocks, or a state, out of one sequence and into another must give the same logits, bit for bit."""

from meshserve.engines.llama.context import LlamaContext
from meshserve.errors import BlockRefused, EngineFailed, PoolFull

_BLOCK_TOKENS, _NUM_BLOCKS = 4, 3
_TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times; and then it rests.\n"


def probe(context: LlamaContext, block_size: int = 64) -> str:
    """Returns "" if blocks of this model can be handed over, else the reason why not. Learns the form of blocks; leaves the pool empty.

    If blocks can be handed over, removed cells are kept from others from then on, as sequences can be moved out of the way of those that
    are released; but not with a sliding window, behind which cells are taken again whoever has them.

    The pool must be empty, and have room for 26 tokens and two sequences besides the scratch sequence. The trial's blocks are shorter
    than `block_size`, to cost little.
    """
    window = context.model.sliding_window
    if 0 < window < block_size:  # llama.cpp writes only the cells that the token after the block sees
        return f"its sliding window of {window} tokens is shorter than a block of {block_size}"
    if window and context.model.has_state:  # when a prompt ends, the cells of its beginning may be others'
        return "it has both a sliding window and recurrent layers"
    try:
        refusal = _probe(context)
        context.keeps_removed = not refusal and not window
        return refusal
    except (BlockRefused, EngineFailed, PoolFull, ValueError) as error:
        return str(error)
    finally:
        context.clear()


def _probe(context: LlamaContext) -> str:
    length = _BLOCK_TOKENS * _NUM_BLOCKS
    text = context.model.tokenize(_TEXT)
    tokens = [text[index % len(text)] for index in range(length + 1)]
    for first in range(0, length, _BLOCK_TOKENS):
        end = first + _BLOCK_TOKENS
        if not context.decode(tokens[first:end], range(first, end), [0] * _BLOCK_TOKENS, [False] * _BLOCK_TOKENS):
            return "the pool is too small to try it"
        if context.model.has_state:
            if end < length:
                continue
            first = 0  # a state is handed over whole, after the last token
        if context.block_format is None:
            context.learn_blocks(0, first, end - first)
        context.import_block(1, first, end - first, context.export_block(0, first, end - first))
    found = []
    for sequence in (0, 1):
        if not context.decode([tokens[length]], [length], [sequence], [True]):
            return "the pool is too small to try it"
        found.append(bytes(context.logits(0)))
    return "" if found[0] == found[1] else "logits after a handoff are not those before it"

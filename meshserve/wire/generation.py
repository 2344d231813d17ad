"""What a processor asks of a decode worker. What comes back is a stream; its items are, with positions counted from 0:

- `[position, token, ...]`: tokens, and the position of the first one;
- `[[position, token, ...], logprobs]`: the same with as many log probabilities;
- either of them after `account`, as its first element, with the first tokens: a row of :mod:`meshserve.wire.account`;
- `["prompt_logprobs", logprobs]`, before all tokens;
- `NAME` of a prefill worker that died with the prompt.

The end is a :class:`GenerationEnd`.
"""

from typing import Annotated, Any

from meshserve.errors import ProtocolError
from meshserve.wire.message import Map, Meta, Milliseconds, NonEmpty, Tokens, field

MAX_LOGIT_BIASES, MAX_CHOICE_TEXTS = 4096, 1024
LogitBias = Annotated[tuple[tuple[int, float], ...], Meta(max_length=MAX_LOGIT_BIASES)]
"""Token ids and what is added to their logits."""
ChoiceTexts = Annotated[tuple[NonEmpty, ...], Meta(max_length=MAX_CHOICE_TEXTS)]
"""Texts of which an output has to be one."""

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and the likeliest tokens at its place with theirs, likeliest first. Natural logarithms."""


class Sampling(Map):
    """How tokens are chosen. Sampling is a function of these, the position and the logits, never of the worker or the time."""

    max_tokens: int = 16
    min_tokens: int = 0
    """No end-of-sequence token before so many tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all."""
    seed: int = 0
    """Drawn by the processor where the client named none, so that another worker can continue identically."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says."""
    choice: int = 0
    """Which of several answers to one prompt this is: each draws its own tokens from the one seed."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the output so far."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it is in the output so far."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that are in the prompt or the output, and multiplies those below; 1 is none."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability, at the temperature, are not chosen; 0 is none."""
    logit_bias: LogitBias = ()
    logprobs: int = -1
    """How many alternatives are reported with each token's log probability; 0 is the token's own only, -1 none."""
    prompt_logprobs: int = -1
    """The same for the prompt's tokens, all at once and before the first token; the prompt's first one has none."""
    json_schema: str = ""
    """The output's text must be a JSON document that is valid under this JSON Schema (its text); empty: it is free."""
    regex: str = ""
    """The whole output's text must match this regular expression."""
    choices: ChoiceTexts = ()
    """The output's text must be one of these. Of schema, expression and choices there is one at most."""


class GenerateRequest(Map, dict=True):
    """One sequence to be continued. `tokens` is the prompt, followed by what earlier workers generated already.

    An engine may keep what it computed of the request in `vars(request)`: that neither crosses the wire nor counts for equality.
    """

    request_id: str
    """The mesh's own name of the request: the processor's incarnation and a counter. What a client sent is only a label."""
    model: str
    tokens: Tokens
    sampling: Sampling = field(default_factory=Sampling)
    num_generated: int = 0
    """How many of `tokens` are output that another worker generated: sampling goes on at this position."""
    prefill_peers: Annotated[tuple[tuple[str, int, int], ...], Meta(max_length=1024)] = ()
    """Prefill workers, best first, as the router ranked them: incarnation, prompts queued there, blocks of this prompt there."""
    prefill_ms: tuple[Milliseconds, ...] = ()
    """For each of these, until it is expected to have computed the prompt's KV; 0: its rate is not measured. Empty: nobody knows."""
    lost_peers: tuple[str, ...] = ()
    """Names of workers that died while they had this request."""

    def _check(self) -> None:
        if not 0 <= self.num_generated < len(self.tokens):
            raise ProtocolError("malformed GenerateRequest: its prompt is empty, or all of it is output")
        if len(self.prefill_ms) != len(self.prefill_peers):
            self.prefill_ms = ()


class GenerationEnd(Map):
    """The sequence is complete."""

    reason: Annotated[str, Meta(pattern=r"^(stop|length)\Z")]
    account: Any = None
    """A row of :mod:`meshserve.wire.account`."""

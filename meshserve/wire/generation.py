"""What a processor asks of a decode worker. What comes back is a stream; its items are, with positions counted from 0:

- `[position, token, ...]`: tokens, and the position of the first one;
- `[[position, token, ...], logprobs]`: the same with as many log probabilities;
- either of them after `account`, as its first element, with the first tokens: a row of :mod:`meshserve.wire.account`;
- `["prompt_logprobs", logprobs]`, before all tokens;
- `NAME` of a prefill worker that died with the prompt.

The end is `{"reason": "stop" or "length", "account": account}`.
"""

import sys
from array import array
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

from meshserve.errors import ProtocolError

Tokens = array  # of typecode "I": 4 bytes a token, and one object that the garbage collector does not walk

MAX_TOKENS_ON_WIRE = 4_194_304
MAX_LOGIT_BIASES = 4096
_MOST_EXPECTED_MS = 1e9
MAX_CHOICE_TEXTS = 1024
"""Texts of which an output may have to be one."""

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and the likeliest tokens at its place with theirs, likeliest first. Natural logarithms."""


def pack_tokens(tokens: "array[int]") -> bytes:
    """Token ids as little-endian 32-bit words: a hundred times faster than a list of integers, and of fixed size."""
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(data: Any) -> "array[int]":
    """The inverse of :func:`pack_tokens`. Raises ProtocolError for anything else."""
    if not isinstance(data, bytes) or len(data) % 4 or len(data) > 4 * MAX_TOKENS_ON_WIRE:
        raise ProtocolError("token ids are 32-bit words")
    tokens = array("I", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


@dataclass(slots=True)  # not frozen: that makes an object of so many fields three times as dear, and each request has one
class Sampling:
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
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    logprobs: int = -1
    """How many alternatives are reported with each token's log probability; 0 is the token's own only, -1 none."""
    prompt_logprobs: int = -1
    """The same for the prompt's tokens, all at once and before the first token; the prompt's first one has none."""
    json_schema: str = ""
    """The output's text must be a JSON document that is valid under this JSON Schema (its text); empty: it is free."""
    regex: str = ""
    """The whole output's text must match this regular expression."""
    choices: tuple[str, ...] = ()
    """The output's text must be one of these. Of schema, expression and choices there is one at most."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`; defaults are left out."""
        if _rare_values(self) != _RARE_DEFAULTS:
            return {key: value for key, default in _SAMPLING_DEFAULTS.items() if (value := getattr(self, key)) != default}
        # written out, as nearly every request sends this: the loop over all fields takes three times as long
        found: dict[str, Any] = {"max_tokens": self.max_tokens, "seed": self.seed}
        if self.min_tokens:
            found["min_tokens"] = self.min_tokens
        if self.temperature:
            found["temperature"] = self.temperature
        if self.top_p != 1.0:
            found["top_p"] = self.top_p
        if self.top_k:
            found["top_k"] = self.top_k
        if self.ignore_eos:
            found["ignore_eos"] = True
        return found

    @classmethod
    def from_wire(cls, data: Any) -> "Sampling":
        """Raises ProtocolError for mistyped fields; unknown ones are ignored."""
        if not isinstance(data, dict):
            raise ProtocolError("sampling parameters are a map")
        values = {}
        for name, value in data.items():
            default = _SAMPLING_DEFAULTS.get(name, _UNKNOWN)
            if default is _UNKNOWN:
                continue
            if name == "logit_bias":
                value = _logit_bias(value)
            elif name == "choices":
                value = read_choices(value)
            if type(value) is not type(default) and not (type(default) is float and type(value) is int):
                raise ProtocolError(f"sampling parameter {name} is malformed")
            values[name] = value
        return cls(**values)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_LOGIT_BIASES or not all(map(_is_bias, value)):
        raise ProtocolError("the logit bias is pairs of a token and a number")
    return tuple((token, float(bias)) for token, bias in value)


def read_choices(value: Any) -> tuple[str, ...]:
    """Texts of which one is to be chosen, none of them empty. Raises ProtocolError for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_CHOICE_TEXTS or not all(isinstance(text, str) and text for text in value):
        raise ProtocolError("choices are texts, none of them empty")
    return tuple(value)


def _is_bias(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float)


_UNKNOWN = object()
_SAMPLING_DEFAULTS: dict[str, Any] = {found.name: found.default for found in fields(Sampling)}
_USUAL = frozenset(("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos"))
_RARE = tuple(name for name in _SAMPLING_DEFAULTS if name not in _USUAL)
_RARE_DEFAULTS = tuple(_SAMPLING_DEFAULTS[name] for name in _RARE)
_rare_values = attrgetter(*_RARE)


class BlockHashes(NamedTuple):
    """Hashes of the full KV blocks of some tokens, and what they depend on besides."""

    block_size: int
    salt: str
    hashes: list[int]


@dataclass(slots=True)
class GenerateRequest:
    """One sequence to be continued. `tokens` is the prompt, followed by what earlier workers generated already."""

    request_id: str
    """The mesh's own name of the request: the processor's incarnation and a counter. What a client sent is only a label."""
    model: str
    tokens: "array[int]"
    sampling: Sampling = field(default_factory=Sampling)
    num_generated: int = 0
    """How many of `tokens` are output that another worker generated: sampling goes on at this position."""
    prefill_peers: tuple[tuple[str, int, int], ...] = ()
    """Prefill workers, best first, as the router ranked them: incarnation, prompts queued there, blocks of this prompt there."""
    prefill_ms: tuple[float, ...] = ()
    """For each of these, milliseconds until it is expected to have computed the prompt's KV; 0: its rate is not measured. A field of its
    own, since decode workers of an earlier minor version refuse entries of another length. Empty: nobody knows."""
    lost_peers: tuple[str, ...] = ()
    """Names of workers that died while they had this request."""
    hashes: "BlockHashes | None" = field(default=None, repr=False, compare=False)
    """Of the KV blocks of `tokens`, once somebody on this peer has computed them. Stays on this peer."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return {
            "request_id": self.request_id,
            "model": self.model,
            "tokens": pack_tokens(self.tokens),
            "sampling": self.sampling.to_wire(),
            "num_generated": self.num_generated,
            "prefill_peers": list(map(list, self.prefill_peers)),
            "prefill_ms": list(self.prefill_ms),
            "lost_peers": list(self.lost_peers),
        }

    @classmethod
    def from_wire(cls, data: Any) -> "GenerateRequest":
        """Raises ProtocolError where a field is missing or malformed."""
        if not isinstance(data, dict):
            raise ProtocolError("a generate request is a map")
        get = data.get
        request_id, model, num_generated, peers = get("request_id"), get("model"), get("num_generated"), get("prefill_peers")
        if not isinstance(request_id, str) or not isinstance(model, str) or not isinstance(num_generated, int):
            raise ProtocolError("a generate request names its id, its model and its position")
        if not isinstance(peers, list) or len(peers) > 1024 or (peers and not all(map(_is_ranked_peer, peers))):
            raise ProtocolError("prefill peers are an incarnation, a queue length and a number of blocks each")
        expected = get("prefill_ms") or []
        if not isinstance(expected, list) or (expected and not all(map(_is_expected_ms, expected))):
            raise ProtocolError("the expected times of prefill peers are milliseconds")
        lost = get("lost_peers") or []
        if not isinstance(lost, list) or (lost and not all(isinstance(name, str) for name in lost)):
            raise ProtocolError("lost peers are names")
        tokens = unpack_tokens(get("tokens"))
        if not tokens or not 0 <= num_generated < len(tokens):
            raise ProtocolError("a prompt has at least one token")
        return cls(
            request_id,
            model,
            tokens,
            Sampling.from_wire(get("sampling")),
            num_generated,
            tuple([(peer, queued, overlap_blocks) for peer, queued, overlap_blocks in peers]),
            tuple(expected) if len(expected) == len(peers) else (),
            tuple(lost),
        )


def _is_ranked_peer(peer: Any) -> bool:
    return isinstance(peer, list) and [type(part) for part in peer] == [str, int, int]


def _is_expected_ms(value: Any) -> bool:
    return type(value) is float and 0.0 <= value < _MOST_EXPECTED_MS

"""From what a client asked to what a worker is asked: prompts of tokens, and how to sample. Pure."""

import json
from array import array
from dataclasses import dataclass
from typing import Any

from meshserve.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from meshserve.roles.processor.calling import call_schema, tools_of, wants_call, writes_calls
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.generation import Sampling
from meshserve.wire.structs import is_shallow

MAX_SCORED_PROMPT_TOKENS = 16_384
"""Of a prompt that is echoed with log probabilities: they make a message many times as long as the prompt."""

MAX_PROMPT_TOKENS = 1_048_576
"""Of one request's prompts, each as often as it is answered: so much is sent to workers at once."""
MAX_UNASKED_TOKENS = 4096
"""What a client gets that names no limit: workers set room aside for all that may come. Higher serves fewer of them at a time."""


def check_features(request: CompletionRequest, card: ModelCard) -> None:
    """Raises Unsupported, which names the field, for what this model's engine cannot do."""
    has_tools, is_forced = request.tool_choice != "none", wants_call(request, card)
    is_parsed = has_tools and writes_calls(card)
    asked = (
        ("logprobs", "logprobs", request.logprobs >= 0),
        ("presence_penalty", "penalties", request.presence_penalty != 0),
        ("frequency_penalty", "penalties", request.frequency_penalty != 0),
        ("logit_bias", "logit_bias", bool(request.logit_bias)),
        ("repetition_penalty", "penalties", request.repetition_penalty not in (None, 1)),
        ("tools", "tools", has_tools and not is_parsed),
        ("tools", "json_schema", has_tools and not is_parsed),
        ("tool_choice", "json_schema", is_forced and is_parsed),
        ("response_format", "json_schema", bool(request.json_schema)),
        ("structured_outputs", "regex", bool(request.regex or request.choices)),
    )
    for name, feature, is_asked in asked:
        if is_asked and feature not in card.features:
            raise Unsupported(f"{name} is not supported by the model {card.model!r}", param=name)


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    """For :meth:`~meshserve.roles.processor.templating.ChatTemplate.render`."""


def chat_of(request: CompletionRequest, card: ModelCard) -> Chat:
    """A chat, as models' templates expect it."""
    messages = [_for_template(message) for message in request.messages or ()]
    variables: dict[str, Any] = {"add_generation_prompt": request.add_generation_prompt}
    if writes_calls(card):
        variables["tells_tools"] = True
    return Chat(messages, tools_of(request) or None, variables)


def not_empty(request: CompletionRequest, prompts: list["array[int]"]) -> list["array[int]"]:
    """The same prompts. Raises InvalidRequest if one of them has no tokens."""
    if not all(prompts):
        raise InvalidRequest("the prompt is empty", param="messages" if request.kind == "chat" else "prompt")
    return prompts


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """As models' templates expect it: calls in OpenAI's form, but with the arguments as an object."""
    if "tool_calls" not in message:
        return message
    calls = [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": _parsed(call["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _parsed(arguments: str) -> Any:
    """Clients send arguments as text; what is not JSON, or too deep for what templates do with it, stays text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and is_shallow(value) else arguments


def check_prompts(request: CompletionRequest, prompts: list["array[int]"], card: ModelCard, vocab_size: int) -> None:
    """Raises ContextLengthExceeded for a prompt that leaves no room, InvalidRequest for what is too much or no token at all."""
    wanted = request.max_tokens or 1
    longest = len(prompts[0]) if len(prompts) == 1 else max(map(len, prompts))
    if longest + wanted > card.context_length:
        raise ContextLengthExceeded(
            f"this model's context is {card.context_length} tokens; {longest} of prompt and {wanted} of completion are too many",
            param="messages" if request.kind == "chat" else "prompt",
        )
    if request.echo and request.logprobs >= 0 and longest > MAX_SCORED_PROMPT_TOKENS:
        raise InvalidRequest(
            f"echo with logprobs takes prompts of up to {MAX_SCORED_PROMPT_TOKENS} tokens, and this one has {longest}", param="echo"
        )
    if longest * len(prompts) * request.n > MAX_PROMPT_TOKENS and sum(map(len, prompts)) * request.n > max(
        MAX_PROMPT_TOKENS, card.context_length
    ):
        raise InvalidRequest(
            f"all prompts, each times n, have more than {MAX_PROMPT_TOKENS} tokens", param="n" if request.n > 1 else "prompt"
        )
    if request.kind == "completion" and not isinstance(request.prompt, str) and max(map(max, prompts)) >= vocab_size:
        raise InvalidRequest(f"the prompt has a token above this model's last, {vocab_size - 1}", param="prompt")


def sampling_of(request: CompletionRequest, card: ModelCard, num_prompt_tokens: int, drawn_seed: int) -> Sampling:
    """What the client left open is filled in by the model's card, the room that is left, and a seed that was drawn for it."""
    room = min(MAX_UNASKED_TOKENS, card.context_length - num_prompt_tokens)
    defaults = card.sampling_defaults
    found = Sampling(
        room if request.max_tokens is None else max(1, request.max_tokens),
        request.min_tokens,
        request.temperature if request.temperature is not None else defaults.temperature,
        request.top_p if request.top_p is not None else defaults.top_p,
        request.top_k if request.top_k is not None else defaults.top_k,
        request.seed if request.seed is not None else drawn_seed,
        request.ignore_eos,
    )
    found.min_p = request.min_p if request.min_p is not None else defaults.min_p
    penalty = request.repetition_penalty
    found.repetition_penalty = penalty if penalty is not None else defaults.repetition_penalty
    if request.needs_features:
        found.presence_penalty, found.frequency_penalty = request.presence_penalty, request.frequency_penalty
        found.logit_bias, found.logprobs = request.logit_bias, request.logprobs
        found.json_schema, found.regex, found.choices = constraint_of(request, card)
        found.prompt_logprobs = request.logprobs if request.echo else -1
    return found


def constraint_of(request: CompletionRequest, card: ModelCard) -> tuple[str, str, tuple[str, ...]]:
    """Schema, expression and choices that the output must keep to: a call if it is made to be one, else what the client asked for."""
    if wants_call(request, card):
        return call_schema(tools_of(request), request.tool_name if request.tool_choice == "function" else ""), "", ()
    return request.json_schema, request.regex, request.choices


def check_bias(request: CompletionRequest, vocab_size: int) -> None:
    """Raises InvalidRequest for a bias on a token that does not exist."""
    if any(token >= vocab_size for token, _ in request.logit_bias):
        raise InvalidRequest(f"logit_bias names a token above this model's last, {vocab_size - 1}", param="logit_bias")

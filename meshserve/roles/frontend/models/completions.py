"""`/v1/completions`, `/generate`, and the routes that count tokens of a prompt: their fields, and what these become. Pure."""

from array import array
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from meshserve.errors import InvalidRequest, Unsupported
from meshserve.roles.frontend.models.common import (
    STREAM_ONLY,
    STREAM_RULE,
    AnyModel,
    Body,
    Fields,
    NonEmpty,
    NotDone,
    NumChoices,
    NumLogprobs,
    Parsed,
    Rules,
    Schema,
    Stream,
    TokenCount,
    TokenLimit,
    either,
    given,
    mistake,
    not_done,
)
from meshserve.roles.frontend.models.openai import OpenAiBody, StreamOptions, openai_fields, stream_of
from meshserve.roles.frontend.models.reading import read, read_object
from meshserve.wire.completion import (
    MAX_CHOICES,
    MAX_COUNT,
    CompletionRequest,
    DetokenizeRequest,
    Prompts,
)

_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
_TOKENS: Schema = {"type": "array", "items": _TOKEN_ID}
_TEXT_OR_TOKENS: list[Schema] = [{"type": "string"}, {**_TOKENS, "minItems": 1}]


def _prompts(most: int) -> Schema:
    """Text or token ids, or a list of these: `msgspec` knows no union of two kinds of lists."""
    several = {"type": "array", "items": either(*_TEXT_OR_TOKENS), "minItems": 1, "maxItems": most}
    return either(*_TEXT_OR_TOKENS, several)


_NOT_IN_COMPLETIONS = {
    **OpenAiBody.NOT_DONE,
    **not_done(null="prompt_embeds", empty="tools", suffix=("",)),
}
_PROMPTS = f"Text or token ids, or a list of these. Prompts times `n` are {MAX_CHOICES} at most."
_LIMIT = f"must be an integer between 1 and {MAX_COUNT}, or 0 with echo"
_LOGPROBS = Meta(description="So many alternatives for each token.")
_BEST_OF = Meta(description="Equal to `n`: no answers are made to be thrown away.")
_LABEL = Meta(description="The client's own name for the request; it comes back with each line.")


class CompletionBody(OpenAiBody, kw_only=True):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, Meta(description=_PROMPTS, extra_json_schema=_prompts(MAX_CHOICES))]
    n: NumChoices = 1
    best_of: Annotated[NumChoices | None, _BEST_OF] = None
    echo: Annotated[bool, Meta(description="The text begins with the prompt.")] = False
    logprobs: Annotated[NumLogprobs | None, _LOGPROBS] = None
    max_tokens: Annotated[TokenCount, mistake(_LIMIT), Meta(description="0 with `echo` only.")] = 16
    stream: Stream = False
    stream_options: Annotated[StreamOptions | None, STREAM_ONLY] = None

    NOT_DONE: ClassVar[NotDone] = _NOT_IN_COMPLETIONS
    RULES: ClassVar[Rules] = (
        STREAM_RULE,
        either(
            {"properties": {"max_tokens": {"type": ["integer", "null"], "minimum": 1}}},
            given("echo", const=True),
        ),
    )
    EXAMPLE: ClassVar[Fields] = {"model": "dummy", "prompt": "Hello", "max_tokens": 16}


class GenerateBody(OpenAiBody, kw_only=True):
    """`POST /generate`."""

    prompt: Annotated[Any, Meta(description="One prompt.", extra_json_schema=_prompts(1))]
    request_id: Annotated[str | None, _LABEL] = None
    max_tokens: TokenLimit = 64
    model: AnyModel = None  # type: ignore[assignment]  # a default, where the other APIs have none

    NOT_DONE: ClassVar[NotDone] = {
        **_NOT_IN_COMPLETIONS,
        **not_done(null="logprobs", false="echo", n=(1,), best_of=(1,)),
    }
    EXAMPLE: ClassVar[Fields] = {"prompt": "Hello", "max_tokens": 16}


class TokenizePrompt(Body, kw_only=True):
    """`POST /tokenize` of a prompt."""

    prompt: NonEmpty
    model: AnyModel = None
    messages: None = None
    return_token_strs: Annotated[bool, Meta(description="The tokens' texts too.")] = False

    NOT_DONE: ClassVar[NotDone] = not_done(
        false="continue_final_message",
        empty="documents",
        add_special_tokens=(True,),
        chat_template=("",),
        chat_template_kwargs=({},),
    )
    EXAMPLE: ClassVar[Fields] = {"prompt": "Hello"}


class DetokenizeBody(Body, kw_only=True):
    """`POST /detokenize`."""

    tokens: Annotated[Any, Meta(extra_json_schema=_TOKENS)]
    model: AnyModel = None

    EXAMPLE: ClassVar[Fields] = {"tokens": [72, 101, 108, 108, 111]}


def parse_completion(body: bytes, request_id: str, client_id: str) -> Parsed:
    """`POST /v1/completions`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    asked = read(CompletionBody, fields)
    prompt, n = _read_prompt(asked.prompt), asked.n
    if n * (len(prompt) if isinstance(prompt, tuple) else 1) > MAX_CHOICES:
        words = f"n times the number of prompts must be at most {MAX_CHOICES}"
        raise InvalidRequest(words, param="n" if n > 1 else "prompt")
    if asked.best_of not in (None, n):
        words = f"best_of must be {n}, as n is: no answers are made to be thrown away"
        raise Unsupported(words, param="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise InvalidRequest(f"max_tokens {_LIMIT}", param="max_tokens")
    request = CompletionRequest(
        request_id,
        "completion",
        prompt=prompt,
        n=n,
        echo=asked.echo,
        logprobs=-1 if asked.logprobs is None else asked.logprobs,
        max_tokens=asked.max_tokens,
        client_id=client_id,
        **openai_fields(asked, fields, asked.max_tokens),
    )
    return request, stream_of(asked.stream, asked.stream_options)


def parse_generate(body: bytes, request_id: str, client_id: str, default_model: str) -> CompletionRequest:
    """`POST /generate`: the simple form, `{"prompt", "request_id"}`. Raises InvalidRequest that names the field."""
    fields = read_object(body)
    asked = read(GenerateBody, fields)
    asked.model = asked.model or default_model
    prompt = _read_prompt(asked.prompt)
    if isinstance(prompt, tuple):
        raise InvalidRequest("prompt must be one prompt", param="prompt")
    return CompletionRequest(
        request_id,
        "completion",
        prompt=prompt,
        max_tokens=asked.max_tokens,
        client_id=client_id if asked.request_id is None else asked.request_id[:256],
        **openai_fields(asked, fields, asked.max_tokens),
    )


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """`POST /detokenize`. The model is empty if the client named none."""
    asked = read(DetokenizeBody, read_object(body))
    return DetokenizeRequest(asked.model or "", _token_ids(asked.tokens, "tokens", "a list of token ids"))


def _read_prompt(value: Any) -> Prompts:
    """Text, token ids, or a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > MAX_CHOICES:
            words = f"prompt must be at most {MAX_CHOICES} prompts, not {len(value)}"
            raise InvalidRequest(words, param="prompt")
        prompts = tuple(part if isinstance(part, str) else _prompt_tokens(part) for part in value)
        return prompts if len(prompts) > 1 else prompts[0]
    return _prompt_tokens(value)


def _prompt_tokens(value: Any) -> "array[int]":
    form = "a string, a list of token ids, or a list of one of these"
    tokens = _token_ids(value, "prompt", form)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def _token_ids(value: Any, param: str, form: str) -> "array[int]":
    """A list of them, checked at 30 ns each: a prompt may have 100,000."""
    try:
        kinds = set(map(type, value)) if isinstance(value, list) else {None}
        if kinds <= {int}:
            return array("I", value)
        if kinds <= {int, float} and all(map(float.is_integer, map(float, value))):
            return array("I", map(int, value))
    except OverflowError:
        pass
    raise InvalidRequest(f"{param} must be {form}", param=param)

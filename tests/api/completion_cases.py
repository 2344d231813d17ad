"""Cases for OpenAI's completions; see :mod:`tests.api.cases`."""

from typing import Any

from tests.api.cases import case, completion
from tests.api.clients import Clients, gather, plain


@case
def a_completion(clients: Clients) -> Any:
    reply = completion(clients)
    assert reply.id.startswith("cmpl-") and reply.object == "text_completion" and reply.usage.total_tokens == 16 + 6
    return plain(reply)


@case
def a_completion_streamed(clients: Clients) -> Any:
    made = gather(completion(clients, stream=True, stream_options={"include_usage": True}))
    assert made.texts[0] == completion(clients).choices[0].text
    return made.outcome()


@case
def a_prompt_of_tokens(clients: Clients) -> Any:
    reply = completion(clients, prompt=list(b"Once upon a time"))
    assert plain(reply) == plain(completion(clients))
    return plain(reply)


@case
def several_prompts_n_times_each(clients: Clients) -> Any:
    reply = completion(clients, prompt=["Once upon a time", "The end"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == completion(clients).choices[0].text
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (16 + 7, 24)
    return plain(reply)


@case
def several_prompts_of_tokens_streamed(clients: Clients) -> Any:
    made = gather(completion(clients, prompt=[list(b"Once upon a time"), list(b"The end")], stream=True))
    assert made.texts[0] == completion(clients).choices[0].text and made.texts.keys() == {0, 1}
    return made.outcome()


@case
def an_echo(clients: Clients) -> Any:
    reply = completion(clients, echo=True)
    assert reply.choices[0].text == "Once upon a time" + completion(clients).choices[0].text
    return plain(reply)


@case
def an_echo_streamed_of_tokens(clients: Clients) -> Any:
    made = gather(completion(clients, prompt=list("Où est-il?".encode()), echo=True, stream=True))
    assert made.texts[0].startswith("Où est-il?")
    return made.outcome()


@case
def an_echo_alone(clients: Clients) -> Any:
    reply = completion(clients, echo=True, max_tokens=0)
    assert reply.choices[0].text == "Once upon a time" and reply.usage.completion_tokens == 0
    return plain(reply)


@case
def a_completions_logprobs(clients: Clients) -> Any:
    reply = completion(clients, logprobs=2)
    found = reply.choices[0].logprobs
    assert "".join(found.tokens) == reply.choices[0].text and found.text_offset[0] == 0
    assert all(len(top) in (2, 3) for top in found.top_logprobs)
    return plain(reply)


@case
def best_of_as_many_as_are_asked_for(clients: Clients) -> Any:
    return plain(completion(clients, n=2, best_of=2))

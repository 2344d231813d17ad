"""What begins an exchange, by path."""

from collections.abc import Callable
from functools import partial

from meshserve.roles.frontend import apis
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.exchange import Exchange
from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.models.common import Parsed
from meshserve.roles.frontend.models.completions import parse_generate


def handlers_of(completions: Completions) -> dict[str, Callable[[Request], Exchange]]:
    """Of all APIs that complete; all with POST."""

    def parse(body: bytes, request_id: str, client_id: str) -> Parsed:
        return parse_generate(body, request_id, client_id, completions.first_model())

    return {api.path: partial(Exchange, completions, api) for api in (*apis.APIS, apis.lines(parse))}

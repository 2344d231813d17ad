#!/usr/bin/env bash
# httptools 0.9.0: a request that offers an upgrade is complete after its head, whatever Content-Length says.
#
# One would guess: `Upgrade` is an offer, which a server may ignore (RFC 9110, 7.8), so the parser reads the body as of any other
# request, and says besides that an upgrade was offered.
#
# What happens: after the head the parser calls `on_message_complete` and raises HttpParserUpgrade with the offset in the bytes
# that it was fed; `on_body` is never called. Whoever answers that message answers a request without its body, and takes the body
# for the next request.
#
# Why it matters: Java's HttpClient offers h2c with every first request, and curl with --http2. Their JSON arrives as an empty
# body. Who ignores the offer has to feed a head without the two headers, or to read the body by himself from the offset on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet httptools==0.9.0

"$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import httptools


def told(head: bytes) -> list[str]:
    """What a parser tells of a POST with these headers and a body of five bytes."""
    events: list[str] = []

    class Handler:
        def on_body(self, data: bytes) -> None:
            events.append(f"body {data.decode()}")

        def on_message_complete(self) -> None:
            events.append("complete")

    data = b"POST / HTTP/1.1\r\nHost: example\r\nContent-Length: 5\r\n" + head + b"\r\nhello"
    try:
        httptools.HttpRequestParser(Handler()).feed_data(data)
    except httptools.HttpParserUpgrade as upgrade:
        events.append(f"upgrade, {len(data) - upgrade.args[0]} bytes unread")
    return events


print("httptools", version("httptools"))
seen = {
    "plain": told(b""),
    "with an offer": told(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"),
}
for what, events in seen.items():
    print(f"{what}: {', '.join(events)}")
assert seen == {"plain": ["body hello", "complete"], "with an offer": ["complete", "upgrade, 5 bytes unread"]}, "this changed"
END

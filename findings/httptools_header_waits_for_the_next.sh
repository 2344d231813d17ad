#!/usr/bin/env bash
# httptools 0.9.0: a header is given out when the next one begins, not when its line ends, and never in parts.
#
# One would guess: `on_header` is called as soon as the line of the header is complete, and of the request's target, which
# `on_url` gives out part by part, one learns that a value may come in parts too.
#
# What happens: `on_url` is called with each part of the target as it comes. `on_header` is called once for each header, with the
# whole value, and only when the first byte of the following header (or of the empty line's end) has been fed. Until then
# the parser keeps the parts, and nothing says that a header is on its way.
#
# Why it matters: a server that counts the size of a head in these callbacks counts a header when all of it is in memory, and a
# deadline that such a callback renews sees no progress while a header comes. Count the bytes that are fed since the head began.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet httptools==0.9.0

"$folder/venv/bin/python" - <<'END'
import httptools


class Heard:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_url(self, part: bytes) -> None:
        self.calls.append(f"url {part.decode()}")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.calls.append(f"header {name.decode()}={value.decode()}")

    def on_headers_complete(self) -> None:
        self.calls.append("head complete")


print("httptools", httptools.__version__)
heard = Heard()
parser = httptools.HttpRequestParser(heard)
seen = []
for part in (b"GET /a", b"bc HTTP/1.1\r\n", b"first: on", b"e\r\n", b"s", b"econd: two\r\n", b"\r\n"):
    heard.calls = []
    parser.feed_data(part)
    seen.append(heard.calls)
    print(f"{part!r:20} {', '.join(heard.calls) or '-'}")
expected = [["url /a"], ["url bc"], [], [], ["header first=one"], [], ["header second=two", "head complete"]]
print("as described" if seen == expected else "CHANGED")
raise SystemExit(0 if seen == expected else 1)
END

#!/usr/bin/env bash
# msgspec 0.22.0: a bound of an integer beyond 64 bits passes the definition, and fails when the first message is read.
#
# One would guess: a constraint that the library does not support is refused where it stands, when the class is made. msgspec does so for
# bounds that are not finite: Meta(lt=math.inf) raises at once.
#
# What happens: with Meta(lt=2**63) for "any number that fits into 63 bits" the class is made, objects of it are made, and they are
# encoded. The first read of such a message, a sound one, raises ValueError: the bound does not fit into an int64. That is not a
# ValidationError, so code that takes refused messages for malformed ones lets it pass up. Meta(le=2**63 - 1), the same set of numbers,
# works.
#
# Why it matters: tests that only make and send messages stay green, and the receiving side fails in a place that handles bad input, not
# programming errors. Read one message of each type in a test.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet msgspec==0.22.0

"$folder/venv/bin/python" - <<'END'
import math
from typing import Annotated

import msgspec
from msgspec import Meta, Struct


def outcome(call) -> str:
    try:
        return repr(call())
    except Exception as error:
        return f"{type(error).__mro__[0].__module__}.{type(error).__name__}: {error}"


class Wide(Struct):
    count: Annotated[int, Meta(ge=0, lt=2**63)]


class Same(Struct):
    count: Annotated[int, Meta(ge=0, le=2**63 - 1)]


print("msgspec", msgspec.__version__)
seen = {
    "Meta(lt=inf)": outcome(lambda: Meta(lt=math.inf)),
    "make Wide": outcome(lambda: Wide(7)),
    "encode Wide": outcome(lambda: msgspec.json.encode(Wide(7))),
    "read Wide": outcome(lambda: msgspec.json.decode(b'{"count":7}', type=Wide)),
    "read Same": outcome(lambda: msgspec.json.decode(b'{"count":7}', type=Same)),
}
for what, found in seen.items():
    print(f"{what:14} {found}")
same = seen["Meta(lt=inf)"].startswith("builtins.ValueError") and seen["make Wide"] == "Wide(count=7)"
same &= seen["encode Wide"] == repr(b'{"count":7}') and seen["read Wide"].startswith("builtins.ValueError")
same &= seen["read Same"] == "Same(count=7)" and not issubclass(ValueError, msgspec.ValidationError)
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

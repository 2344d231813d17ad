#!/usr/bin/env bash
# huggingface_hub 2.4.0: whether a 401 means "no such repository" depends on https.
#
# One would guess: `hf_raise_for_status` maps a response to an error class by its status and headers. `RepositoryNotFoundError` is what a
# caller of `hf_hub_download` catches for a repository that does not exist; the address of the hub (HF_ENDPOINT) plays no part.
#
# What happens: the hub answers 401 to strangers who ask for a missing repository, and the library knows these answers by a pattern of the
# URL that starts with https. From an endpoint with plain http (a mirror or cache in the own network, a test server) the same answer
# becomes the general HfHubHTTPError. The library's pattern for buckets allows both.
#
# Why it matters: code that catches `RepositoryNotFoundError` works against the hub and not against a local mirror, and a test on loopback
# shows the branch that the real hub never takes. Look at the status of HfHubHTTPError too, or let the mirror send X-Error-Code.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0

"$folder/venv/bin/python" - <<'END'
from importlib.metadata import version

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

PATHS = ("/someone/model/resolve/main/model.bin", "/api/models/someone/model")


def error_for(scheme: str, path: str, headers: dict[str, str]) -> str:
    response = httpx2.Response(401, headers=headers, request=httpx2.Request("GET", f"{scheme}://mirror.example{path}"))
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        return type(error).__name__
    return "none"


print("huggingface_hub", version("huggingface_hub"))
same = True
for path in PATHS:
    for scheme, headers, expected in (
        ("https", {}, "RepositoryNotFoundError"),
        ("http", {}, "HfHubHTTPError"),
        ("http", {"X-Error-Code": "RepoNotFound"}, "RepositoryNotFoundError"),
    ):
        seen = error_for(scheme, path, headers)
        print(f"401 for {scheme}://mirror.example{path} {headers or ''}: {seen}")
        same = same and seen == expected
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

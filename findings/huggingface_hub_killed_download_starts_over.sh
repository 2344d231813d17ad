#!/usr/bin/env bash
# huggingface_hub 2.4.0: a download that was killed starts again at byte 0, and its part stays on the disk.
#
# One would guess: `hf_hub_download` resumes. It keeps an `.incomplete` file beside the blob, named after the hash of the content, and it
# does ask the server for the rest (Range) when a connection breaks.
#
# What happens: it resumes within one call only. Each call has a random part in the name of its `.incomplete` file, so the next process
# does not find the file of the one before it, asks for the whole content, and deletes nothing: each killed attempt leaves its part.
#
# Why it matters: a worker that is restarted by a supervisor in the middle of a model of 40 GB never gets further on a slow link than one
# life of the process allows, and fills the disk. Who needs to go on must download by other means, or keep the process alive.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0

"$folder/venv/bin/python" - "$folder/cache" <<'END'
import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

CACHE = Path(sys.argv[1])
CONTENT = random.Random(1).randbytes(25 << 20)  # the client writes in pieces of 10 MiB
ETAG = hashlib.sha256(CONTENT).hexdigest()
DOWNLOAD = "import huggingface_hub; print(huggingface_hub.hf_hub_download('someone/model', 'model.bin'))"
ranges, interruption = [], "break"  # "break": the server closes; "stall": the server falls silent; "none"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        if "/resolve/" not in self.path:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        self.first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        headers = {"ETag": f'"{ETAG}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes", "Content-Length": len(CONTENT) - self.first}
        if asked:
            headers["Content-Range"] = f"bytes {self.first}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.send_response(206 if asked else 200)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if "/resolve/" not in self.path:
            return
        ranges.append(self.headers.get("Range") or "all")
        is_whole = interruption == "none" or self.first > 0
        self.wfile.write(CONTENT[self.first :] if is_whole else CONTENT[: 21 << 20])
        if not is_whole and interruption == "stall":
            time.sleep(60)

    def log_message(self, *arguments):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}


def start(cache: str) -> subprocess.Popen:
    environment = os.environ | {"HF_HOME": str(CACHE / cache)}
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def parts(cache: str) -> list[int]:
    return sorted(path.stat().st_size >> 20 for path in (CACHE / cache).rglob("*.incomplete"))


print("huggingface_hub", version("huggingface_hub"))
ended = [start("one").wait(120)]
within, ranges[:] = list(ranges), []
print("connection broken within one call: asked for", within)
interruption = "stall"
for attempt in (1, 2):
    process, deadline = start("two"), time.monotonic() + 60
    while parts("two") != [20] * attempt and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.wait()
interruption = "none"
ended.append(start("two").wait(120))
print("two calls killed at 20 MiB, then a third: asked for", ranges, "- left on the disk, MiB:", parts("two"))
same = ended == [0, 0] and within == ["all", f"bytes={20 << 20}-"] and ranges == ["all"] * 3 and parts("two") == [20, 20]
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END

#!/usr/bin/env bash
# Codex CLI 0.171.0 asks for a WebSocket first; which 4xx refuses that decides whether a turn starts at once or seconds later.
#
# One would guess: a server that speaks HTTP only answers the GET on /v1/responses with 405 Method Not Allowed, as RFC 9110
# says of a route that takes POST, and the program goes on with POST.
#
# What happens: Codex takes 405 for a fault that may pass. It asks for the WebSocket again with growing pauses, seven times in
# all, before it sends the POST. 426 Upgrade Required makes it send the POST at once, without a second try.
#
# Why it matters: a server with correct status codes looks slow at the start of every session, and nothing in its log says why.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" @openai/codex@0.171.0 >/dev/null

FOLDER=$folder python3 - <<'END'
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CODEX = str(Path(os.environ["FOLDER"], "node_modules", ".bin", "codex"))
MESSAGE = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
           "content": [{"type": "output_text", "text": "Hello.", "annotations": []}]}
RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "output": [MESSAGE],
            "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
                      "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}}
EVENTS = [
    {"type": "response.created", "response": {**RESPONSE, "status": "in_progress", "output": []}},
    {"type": "response.output_item.done", "output_index": 0, "item": MESSAGE},
    {"type": "response.completed", "response": RESPONSE},
]


def upgrades_before_post(status: int) -> tuple[int, int]:
    """How often Codex asks for a WebSocket before its first POST, and its exit code, where the server answers with `status`."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("upgrade", "").lower() == "websocket":
                asked.append("upgrade")
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            asked.append("post")
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in EVENTS).encode()
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    home = Path(os.environ["FOLDER"], f"home{status}")
    home.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    options = ["-c", f'openai_base_url="{url}"', "-m", "some-model", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check"]
    environment = {**os.environ, "HOME": str(home), "CODEX_HOME": str(home), "CODEX_API_KEY": "a-key"}
    done = subprocess.run([CODEX, "exec", *options, "Say hello"], cwd=home, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)
    server.shutdown()
    return asked.index("post"), done.returncode


print(subprocess.run([CODEX, "--version"], capture_output=True, text=True).stdout.strip())
seen = {status: upgrades_before_post(status) for status in (405, 426)}
for status, (num, code) in seen.items():
    print(f"{status}: asked for a WebSocket {num} times before the first POST; exit code {code}")
assert seen == {405: (7, 0), 426: (1, 0)}, "this changed"
END

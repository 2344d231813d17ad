#!/usr/bin/env bash
# anthropic 2.14.0: the official client has no sampling parameters.
#
# One would guess: `client.messages.create(..., temperature=0)` works, as it does in most code written for this client, in the client for
# OpenAI's API, and in the client's own releases up to 0.125.0. At worst the server refuses what a model does not support.
#
# What happens: `temperature`, `top_p` and `top_k` are gone from the client itself (from `messages` and `beta.messages`). The call raises
# TypeError before anything is sent. What is put in `extra_body` still arrives at the top of the body, as before.
#
# Why it matters: a server that offers this API must not drop the fields, since older clients and plain HTTP callers send them. Its tests
# with the official client need `extra_body` for reproducible text, and so does every user who moves from a hosted model to an own one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.125.0 2.14.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "anthropic==$version"
done

cat > "$folder/call.py" <<'END'
"""Calls a server on loopback with a temperature and prints what arrived."""
import http.server
import json
import threading

import anthropic

ANSWER = {"id": "m", "type": "message", "role": "assistant", "model": "any", "content": [{"type": "text", "text": "yes"}],
          "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
bodies = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        content = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}", max_retries=0)
shared = {"model": "any", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
outcomes = []
for named in ({"temperature": 0.25}, {"extra_body": {"temperature": 0.25}}):
    try:
        client.messages.create(**shared, **named)
        outcomes.append(f"arrived: {bodies[-1].get('temperature')}")
    except TypeError:
        outcomes.append("TypeError")
print(f"anthropic {anthropic.__version__}: argument: {outcomes[0]}; extra_body: {outcomes[1]}")
END

seen=$("$folder/0.125.0/bin/python" "$folder/call.py"; "$folder/2.14.0/bin/python" "$folder/call.py")
echo "$seen"
expected="anthropic 0.125.0: argument: arrived: 0.25; extra_body: arrived: 0.25
anthropic 2.14.0: argument: TypeError; extra_body: arrived: 0.25"
if [ "$seen" = "$expected" ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

#!/usr/bin/env bash
# pyzmq 27.3.0 (libzmq inside): a ROUTER names its peers the same in every process.
#
# One would guess: the routing id that a ROUTER gives to a peer without an identity is random, since libzmq starts its counter at a random
# number. So an id that is left from before a restart is unknown to the new process, and a message to it goes to nobody.
#
# What happens: libzmq draws from the C library's random generator and does not seed it. The first peers of every process have the same
# ids, counted up from the same number. An answer kept over a restart goes to a peer that never asked, and ROUTER_MANDATORY sees nothing
# wrong.
#
# Why it matters: routing ids must not be stored, logged as names, or compared between processes. Answers need a name of their own: an
# identity from the first message, with a number that is new for each start.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyzmq==27.3.0

cat > "$folder/router.py" <<'END'
"""A router and three peers. Prints the ids of the peers; given an id, prints which peer receives what is sent to that id."""
import sys

import zmq

context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.setsockopt(zmq.ROUTER_MANDATORY, 1)
port = router.bind_to_random_port("tcp://127.0.0.1")
peers, routing_ids = [], []
for number in range(3):
    peer = context.socket(zmq.DEALER)
    peer.connect(f"tcp://127.0.0.1:{port}")
    peer.send(b"hello")
    routing_ids.append(router.recv_multipart()[0].hex())
    peers.append(peer)
if len(sys.argv) == 1:
    print(*routing_ids)
else:
    router.send_multipart([bytes.fromhex(sys.argv[1]), b"answer to a question before the restart"])
    received = [number for number, peer in enumerate(peers) if peer.poll(2000)]
    print(*(f"peer {number}: {peers[number].recv().decode()}" for number in received))
context.destroy(0)
END

python=$folder/venv/bin/python
"$python" -c 'import zmq; print("pyzmq", zmq.__version__, "libzmq", zmq.zmq_version())'
first=$("$python" "$folder/router.py")
second=$("$python" "$folder/router.py")
echo "ids in one process:     $first"
echo "ids in another process: $second"
answer=$("$python" "$folder/router.py" "${first%% *}")
echo "sent by a third process to the first id of the first: $answer"
if [ "$first" = "$second" ] && [ "$answer" = "peer 0: answer to a question before the restart" ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

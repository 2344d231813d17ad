"""A frontend whose loop measures its callbacks: `python -m tests.harness.measured MESH SEED`; SIGUSR1 has it say and forget the worst."""

import asyncio
import signal
import sys

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from tests.harness.callbacks import TimedLoop


async def serve(mesh: str, seed: str) -> None:
    """Until SIGTERM."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TimedLoop)
    told_to_stop = asyncio.Event()

    def say() -> None:
        print(f"worst {loop.worst_s * 1e3:.3f} {loop.worst}", flush=True)
        loop.forget()

    loop.add_signal_handler(signal.SIGUSR1, say)
    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)
    config = MeshConfig(mesh=mesh, roles=("frontend",), interface="127.0.0.1", use_mdns=False, seeds=(seed,))
    peer = Peer(config, ServeConfig(http_port=0), lambda line: print(line, flush=True))
    await peer.start()
    loop.forget()
    await told_to_stop.wait()
    await peer.stop()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=TimedLoop) as runner:
        runner.run(serve(*sys.argv[1:]))

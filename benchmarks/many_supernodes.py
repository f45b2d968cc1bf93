"""Many SuperNodes as forks of one process that has loaded Flower: their connections are real, what they load is shared.

python -m benchmarks.many_supernodes SUPERLINK KEYS LOGS PORT...    one for each port; keys node0.key, node1.key, ...

It imports no torch, as a SuperNode imports none: what answers the messages is another process.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from zofed.federated import flower_internals

PR_SET_PDEATHSIG = 1
BETWEEN_S = 0.1  # starts, so that not all of them shake hands at once


def serve(superlink: str, keys: str, logs: Path, index: int, ports: list[str]) -> NoReturn:
    """Be the SuperNode of that index until a signal ends it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it goes with its parent, whatever ends that
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until Flower sets its own
    log = os.open(logs / f"node{index}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    security = ["--insecure"]
    if keys:
        key = Path(keys) / "nodes" / f"node{index}.key"
        security = ["--root-certificates", f"{keys}/ca.crt", "--auth-supernode-private-key", str(key)]
    sys.argv = [
        "flower-supernode", "--superlink", superlink, *security, "--isolation", "process", "--port", ports[index],
        "--node-config", f'partition-id={index} num-partitions={len(ports)} mode="fo"',
    ]  # fmt: skip
    try:
        flower_internals.run_supernode()
    finally:
        os._exit(0)


def main() -> None:
    superlink, keys, logs, *ports = sys.argv[1:]
    pids: dict[int, int] = {}  # to the index

    def start(index: int) -> None:
        if pid := os.fork():
            pids[pid] = index
            time.sleep(BETWEEN_S)
        else:
            serve(superlink, keys, Path(logs), index, ports)

    for index in range(len(ports)):
        start(index)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while True:  # one that ends is started anew, as zofed supernode does
            pid, _ = os.wait()
            start(pids.pop(pid))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    main()

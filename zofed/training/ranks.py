"""The processes of one run that torchrun started, on one machine or several: rank 0 runs it, the others measure for it.

Each rank has a model and data of its own, by the same command. torchrun's store tells the others where rank 0 listens;
all that follows is what the pipes of a `device_pool` carry: journal entries one way, raw losses the other. A connection
begins with a proof of a key that only this store knows.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from zofed.base.errors import UserError

_ADDRESS, _READY = "zofed/address", "zofed/rank"  # keys of the store
_LONGEST = timedelta(days=30)  # until rank 0 listens, which loads a model before


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among those of a run. local: among those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place() -> Place:
    """By torchrun's environment variables; the only one of a run that it did not start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(rank, world, local)


@dataclass(frozen=True, slots=True)
class Other:
    """A rank that measures: its number, the machine it is on, what it read, and the way to it."""

    rank: int
    host: str
    read: dict[str, Any]
    pipe: Connection


def gathered(patience: float) -> list[Other]:
    """The other ranks, on rank 0, once each has loaded model and data. patience: seconds that this may take.

    Raises UserError where one has not come by then.
    """
    world, store = place().world, _store()
    host = os.environ["MASTER_ADDR"]
    if int(os.environ["LOCAL_WORLD_SIZE"]) == world:  # on one machine, which its name need not lead to
        host = "127.0.0.1"
    key = secrets.token_bytes(32)
    with Listener((host if host == "127.0.0.1" else "0.0.0.0", 0), backlog=world, authkey=key) as listener:
        store.set(_ADDRESS, json.dumps([host, listener.address[1], key.hex()]))
        found = []
        for rank in range(1, world):
            try:
                store.wait([f"{_READY}{rank}"], timedelta(seconds=patience))
            except RuntimeError as error:
                raise UserError(
                    f"rank {rank} of {world} has not come within round-timeout = {patience:g} seconds: look at what "
                    "it says (torchrun --tee 3), or raise round-timeout"
                ) from error
            pipe = listener.accept()
            found.append(Other(**json.loads(pipe.recv_bytes()), pipe=pipe))
    return sorted(found, key=lambda other: other.rank)


@contextmanager
def released() -> Iterator[None]:
    """On rank 0: the others end where the block has ended without asking for them."""
    if place().world == 1:
        yield
        return
    store = _store()
    try:
        yield
    finally:
        with suppress(RuntimeError):
            store.compare_set(_ADDRESS, "", "null")


def joined(read: dict[str, Any]) -> Connection | None:
    """The way to rank 0 from another rank; None where it needs no help. read: what this rank loaded, as JSON can hold.

    Raises UserError where rank 0 is gone.
    """
    try:
        store, own = _store(), place().rank
        store.wait([_ADDRESS], _LONGEST)
        address = json.loads(store.get(_ADDRESS))
        if address is None:
            return None
        host, port, key = address
        store.set(f"{_READY}{own}", "")
        pipe = Client((host, port), authkey=bytes.fromhex(key))
        pipe.send_bytes(json.dumps({"rank": own, "host": socket.gethostname(), "read": read}).encode())
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError("rank 0 of the run has gone: look at what it says") from error
    return pipe


@cache
def _store() -> Any:
    """torchrun's, apart for each of its attempts."""
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://")))[0]

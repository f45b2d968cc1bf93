"""The processes of one run that torchrun started, on one machine or several: rank 0 runs it, the others measure for it.

Each rank has a model and data of its own, by the same command. torchrun's store tells the others where rank 0 listens;
all that follows is what the pipes of a `device_pool` carry: journal entries one way, raw losses the other. A connection
begins with a proof of a key that only this store knows.
"""

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from zofed.base import arithmetic
from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.base.torchrun import place

_LONGEST = timedelta(days=30)  # until rank 0 listens, which loads a model before


@dataclass(frozen=True, slots=True)
class Other:
    """A rank that measures: its number, the machine it is on, what it read and computes with, and the way to it."""

    rank: int
    host: str
    read: dict[str, Any]
    arithmetic: dict[str, Any]
    pipe: Connection


def gathered(patience: float) -> list[Other]:
    """The other ranks, on rank 0, once each has loaded model and data. patience: seconds that this may take.

    Raises UserError where one has not come by then.
    """
    world, deadline = place().world, time.monotonic() + patience
    host = os.environ["MASTER_ADDR"]
    if int(os.environ["LOCAL_WORLD_SIZE"]) == world:  # on one machine, which its name need not lead to
        host = "127.0.0.1"
    key, come = secrets.token_bytes(32), queue.SimpleQueue[Other]()
    with Listener((host if host == "127.0.0.1" else "0.0.0.0", 0), backlog=world) as listener:
        threading.Thread(target=_accept, args=(listener, key, come), daemon=True).start()
        with _store() as store:
            store.set(_key(), json.dumps([host, listener.address[1], key.hex()]))
        found: dict[int, Other] = {}
        while missing := sorted(set(range(1, world)) - found.keys()):
            try:
                other = come.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise UserError(
                    f"rank {missing[0]} of {world} has not come within round-timeout = {patience:g} seconds: look at "
                    "what it says (torchrun --tee 3), or raise round-timeout"
                ) from None
            found[other.rank] = other
    return [found[rank] for rank in sorted(found)]


def _accept(listener: Listener, key: bytes, come: "queue.SimpleQueue[Other]") -> None:
    """Let ranks in, until the listener is closed; whoever else calls is let go, and keeps nobody waiting."""
    with suppress(OSError):
        while True:
            threading.Thread(target=_greet, args=(listener.accept(), key, come), daemon=True).start()


def _greet(pipe: Connection, key: bytes, come: "queue.SimpleQueue[Other]") -> None:
    try:
        deliver_challenge(pipe, key)
        answer_challenge(pipe, key)
        come.put(Other(**json.loads(pipe.recv_bytes()), pipe=pipe))
    except (AuthenticationError, OSError, EOFError, ValueError, TypeError, AssertionError):
        pipe.close()


@contextmanager
def released() -> Iterator[None]:
    """On rank 0: the others end where the block has ended without asking for them."""
    try:
        yield
    finally:
        if place().world > 1:
            with suppress(UserError), _store() as store:
                store.compare_set(_key(), "", "null")


def joined(read: dict[str, Any]) -> Connection | None:
    """The way to rank 0 from another rank; None where it needs no help. read: what this rank loaded, as JSON can hold.

    Raises UserError where rank 0 is gone or cannot be reached.
    """
    with _store() as store:
        store.wait([_key()], _LONGEST)
        address = json.loads(store.get(_key()))
    if address is None:
        return None
    host, port, key = address
    own = {"rank": place().rank, "host": socket.gethostname(), "read": read, "arithmetic": arithmetic.described()}
    try:
        pipe = Client((host, port), authkey=bytes.fromhex(key))
        pipe.send_bytes(json.dumps(own).encode())
    except (OSError, EOFError) as error:
        raise UserError(
            f"rank 0 cannot be reached at {host}:{port} ({error}): look at what it says, and let the machines of a run "
            "reach one another on all ports"
        ) from error
    return pipe


def _key() -> str:
    """Where torchrun's store holds the address, apart for each of its attempts."""
    return f"zofed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@contextmanager
def _store() -> Iterator[Any]:
    """torchrun's. Raises UserError where it has gone."""
    try:
        yield _opened()
    except (RuntimeError, OSError) as error:
        raise UserError(f"torchrun's store has gone ({said_by(error)}): look at what torchrun says") from error


@cache
def _opened() -> Any:
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://")))[0]

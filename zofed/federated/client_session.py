"""What a client keeps between the messages of a run: its replica, moved to where each plan stands, and its data."""

import re
import sys

from flwr.app import Context

from zofed.base.errors import UserError
from zofed.core import gradient_codec, sanitize, snapshots
from zofed.core.digests import tensors_digest
from zofed.core.measure import Update
from zofed.core.replica import catch_up
from zofed.federated.protocol import Plan
from zofed.training import shards
from zofed.training.problem import Place, Problem
from zofed.training.replicas import tell_placement
from zofed.training.shards import Data

UPDATES_KEPT = 2  # guides and updates that entries soon to come will name


class ClientSession:
    """This process's one copy of the model, and the data of the clients it has served."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.settings = problem, problem.settings
        self.replica = problem.replica()
        tell_placement(self.replica, self.settings)
        self.genesis = self.replica.origin
        self._parts: dict[Place, tuple[Data, Data | None]] = {}
        self._names: dict[Place, str] = {}
        self._updates: dict[bytes, Update] = {}
        self.is_unsound = False  # at the head of the last plan, but with other weights
        self.probe = b""  # of the replica where the last plan led it; empty where it led nowhere

    def parts(self, context: Context) -> tuple[Data, Data | None]:
        """What the node trains and, with `client-held-out-fraction`, evaluates on."""
        share = place(context)
        if share not in self._parts:
            self._parts[share] = self.problem.parts(share, context)
        return self._parts[share]

    def examples(self, context: Context) -> int:
        """How many examples the node trains on."""
        return len(shards.of(self.settings, self.parts(context)[0]))

    def name_of_data(self, context: Context) -> str:
        """What names the examples that the node trains on, whatever the run."""
        share = place(context)
        if share not in self._names:
            data = self.parts(context)[0]
            self._names[share] = tensors_digest(data) if isinstance(data, dict) else "of an app"
        return self._names[share]

    def counts(self, context: Context) -> dict[str, int]:
        """What the node holds, by label or source."""
        return self.problem.counts(place(context), context)

    def catch_up(self, plan: Plan) -> bool:
        """Move to the plan's head and weights; from the base, anew, when the plan brings the whole history.

        False when this process cannot get there: the answer then tells the server, which sends everything.
        """
        self.probe = b""
        try:
            brought = [gradient_codec.decoded(raw, self.replica.shapes) for raw in gradient_codec.split(plan.updates)]
        except ValueError as error:
            return self._unreachable(plan, error)
        for update in brought:
            self.keep(update, len(brought))
        if not plan.rebuild and not plan.snapshot and self._follow(plan):
            return True
        if plan.rebuild:
            self.replica = self.problem.replica()
        if plan.snapshot:
            try:
                snapshots.restore(self.replica, plan.snapshot)
            except ValueError as error:
                return self._unreachable(plan, error)
        elif plan.after != self.genesis:
            return False
        elif not plan.rebuild:
            self.replica = self.problem.replica()
        return self._follow(plan)

    def _unreachable(self, plan: Plan, error: ValueError) -> bool:
        """Tell of updates or a snapshot that cannot be used; the answer will be that the replica is behind."""
        self.is_unsound = False
        print(f"round {plan.round} cannot be reached: {error}", file=sys.stderr, flush=True)
        return False

    def keep(self, update: Update, count: int = UPDATES_KEPT) -> None:
        """Have an update or a guide at hand for the entry that names it. count: that are kept together, at least."""
        digest = bytes.fromhex(tensors_digest(update))
        self._updates.pop(digest, None)  # the newest stand last
        self._updates[digest] = update
        while len(self._updates) > max(UPDATES_KEPT, count):
            del self._updates[next(iter(self._updates))]

    def _follow(self, plan: Plan) -> bool:
        arrived = catch_up(self.replica, plan.after, plan.entries, self._updates)
        self.probe = self.replica.probe() if arrived else b""
        self.is_unsound = arrived and self.probe != plan.probe
        return arrived and not self.is_unsound


def place(context: Context) -> tuple[int, int]:
    """Index of this client and how many there are, from the node's configuration.

    Raises UserError where one is missing or no whole number, or where the two are no place.
    """
    found = []
    for key in ("partition-id", "num-partitions"):
        value = context.node_config.get(key)
        if value is None:
            raise UserError(f"this node has no {key!r}: start it with --node-config 'partition-id=0 num-partitions=2'")
        found.append(int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value) else value)
    client, clients = found
    if problem := sanitize.misplaced(client, clients):
        raise UserError(problem)
    return client, clients

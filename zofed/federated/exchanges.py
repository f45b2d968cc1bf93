"""One exchange with clients: plans out, answers in, each checked; those behind are sent what they lack."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import aggregation, gradient_codec, sanitize, snapshots
from zofed.core.digests import tensors_digest
from zofed.core.journal import Entry, Journal, position
from zofed.core.measure import Update
from zofed.core.replica import Replica, update_digest
from zofed.federated import messages, protocol
from zofed.federated.membership import Members, exchange
from zofed.federated.protocol import Answer, Contribution, Plan, Reply
from zofed.federated.traffic import Traffic
from zofed.federated.wire import Evaluation, Final, Malformed
from zofed.training.trainer import diverged

ATTEMPTS = 3  # times a round is asked before it is given up

Checked = TypeVar("Checked", Final, Evaluation)
Judge = Callable[[Message, Plan], tuple[Any, Any, str]]  # -> what to use, the answer, "used" or why not


class Exchanges:
    """All that goes between the server and its clients in one run.

    seconds_moving: seconds the server's own replica took for all moves so far, as the price of a replay.
    """

    def __init__(
        self,
        grid: Grid,
        members: Members,
        replica: Replica,
        journal: Journal,
        settings: Settings,
        folder: Path,
        traffic: Traffic,
        seconds_moving: Callable[[], float],
    ) -> None:
        self.grid, self.members, self.replica, self.journal = grid, members, replica, journal
        self.settings, self.folder, self.traffic, self.seconds_moving = settings, folder, traffic, seconds_moving
        self.genesis = replica.origin
        self.updates: dict[bytes, bytes] = {}  # encoded, by digest
        self._probe = (b"", b"")  # head, probe there
        self._held = 0  # entries up to that head

    def remember(self, raw: bytes, update: Update) -> bytes:
        """Keep an encoded update for the clients that will need it; returns its digest."""
        digest = bytes.fromhex(tensors_digest(update))
        self.updates[digest] = raw
        while len(self.updates) > protocol.UPDATES_SENT:
            del self.updates[next(iter(self.updates))]
        return digest

    def slopes(
        self, round_: int, task: protocol.Task, clients: Collection[int], steps: int = 1, guide: bytes = b""
    ) -> dict[int, Answer]:
        """Usable answers of integers, by client; empty where a round is to be skipped."""

        def judge(reply: Message, plan: Plan) -> tuple[Any, Answer, str]:
            count = protocol.integers_asked(self.settings, plan.task, plan.steps)
            answer = messages.unpack(Answer, reply.content, integers=count)
            return answer, answer, protocol.check(answer, plan, count, self.settings.epsilon) or "used"

        return self._collected(round_, task, "train.zo", clients, judge, steps, guide)

    def contributions(
        self, round_: int, task: protocol.Task, clients: Collection[int]
    ) -> dict[int, tuple[Update, Contribution]]:
        """Usable updates or gradients, by client; empty where a round is to be skipped."""

        largest = gradient_codec.largest(self.replica.shapes)

        def judge(reply: Message, plan: Plan) -> tuple[Any, Contribution, str]:
            answer = messages.unpack(Contribution, reply.content, largest)
            limit = self.settings.max_update_norm
            update, reason = protocol.check_update(answer, plan, self.replica, limit)
            return (update, answer), answer, reason or "used"

        return self._collected(round_, task, "train.guide" if task == "gradient" else "train.fo", clients, judge)

    def _collected(
        self,
        round_: int,
        task: protocol.Task,
        message_type: str,
        clients: Collection[int],
        judge: Judge,
        steps: int = 1,
        guide: bytes = b"",
    ) -> dict[int, Any]:
        """Ask until enough have answered. Raises UserError where all are needed and some never do."""
        self.traffic.ask(len(clients))
        need = min(self.settings.quorum, len(clients)) or len(clients)
        if len(clients) < self.settings.quorum or not clients:
            return {}
        good: dict[int, Any] = {}
        for attempt in range(ATTEMPTS):
            missing = [client for client in clients if client not in good]
            if attempt:
                self.members.look(at_once=True)  # one that gave no answer may have gone
            self.members.wait_for(missing)
            good |= self._asked(missing, attempt, task, message_type, judge, steps, guide)
            if task in ("slopes", "coefficients", "guided"):
                for client in aggregation.implausible(good, self.settings.clip_slopes, self.replica.spread.value):
                    del good[client]
                    self.traffic.revise(client, "implausible")
            if len(good) >= need:
                break
        self.traffic.settle()
        for client in clients:
            self.members.note(client, round_, is_well=client in good)
        if len(good) >= need:
            return good
        results = dict(+self.traffic.now.results)
        # Where others were not asked, or are not needed, one that lies must not end the run: its round is skipped.
        is_everybody = self.members.strict or set(clients) >= set(self.members.found)
        if is_everybody and set(results) == {"not_finite"}:
            raise diverged(round_, self.settings)
        if is_everybody and set(results) <= {"not_finite", "out_of_range"} and results and round_ > 1:
            beyond = f"is beyond {protocol.LARGEST_LOSS:,.0f} nats for all clients that were asked"
            raise diverged(round_, self.settings, what=beyond)
        if self.members.strict:
            missing = sorted(set(clients) - set(good))
            # In the first round nothing has moved yet, so that it is the fault of some client's data.
            if set(results) == {"not_finite", "used"} and round_ > 1:
                where = f"; it is so of clients {missing}: see clients.csv in {self.folder}"
                raise diverged(round_, self.settings, where)
            limit = f"raise max-update-norm = {self.settings.max_update_norm:g}, " if "too_large" in results else ""
            raise UserError(
                f"round {round_}: clients {missing} gave no usable reply in {ATTEMPTS} attempts ({results}): see "
                f"clients.csv in {self.folder}, {limit}or set quorum below the number of clients"
            )
        return {}

    def _asked(
        self,
        clients: Collection[int],
        attempt: int,
        task: protocol.Task,
        message_type: str,
        judge: Judge,
        steps: int,
        guide: bytes,
    ) -> dict[int, Any]:
        """One attempt: send each client its plan and check what comes back; those behind are sent what they lack."""
        good: dict[int, Any] = {}
        waiting_for = list(clients)
        for _ in range(2):  # a second time for those whose replica was older than known, or not sound
            plans = {client: self.plan(client, attempt, task, steps, guide) for client in waiting_for}
            replies = self.send(plans, message_type)
            waiting_for = []
            for client, plan in plans.items():
                node = self._node(client)
                found, answer, result = self._judged(replies.get(node), plan, judge)
                self.traffic.result(plan, node, answer, result)
                if result == "used":
                    good[client] = found
                if self._follows(plan, answer, result):
                    waiting_for.append(client)
            if not waiting_for:
                break
        return good

    def _judged(self, reply: Message | None, plan: Plan, judge: Judge) -> tuple[Any, Any, str]:
        if reply is None:
            return None, None, "late"
        if reply.has_error():
            print(f"client {plan.client}: {sanitize.reason(reply.error.reason)}", file=sys.stderr, flush=True)
            return None, None, "error"
        try:
            return judge(reply, plan)
        except Malformed as error:
            print(f"client {plan.client}: malformed reply: {error}", file=sys.stderr, flush=True)
            return None, None, "malformed"

    def _follows(self, plan: Plan, answer: Reply | None, result: str) -> bool:
        """Note where a client's replica stands; whether it is to be asked again with all it lacks."""
        client, member = plan.client, self.members.found[plan.client]
        if result == "used":
            member.held, member.rebuild, member.doubted = self._held, False, False
            member.updates = set(self.updates) if plan.guide else set()
        elif answer is not None and result == "behind":
            member.updates = set()
            known = position(self.journal.entries, self.genesis, answer.head)
            member.held, member.rebuild = known or 0, known is None
        elif result == "desync":
            print(f"client {client}: its weights are not the run's; it replays all from the base", flush=True)
            member.held, member.rebuild, member.updates = 0, True, set()
        elif result == "not_finite" and not member.doubted:
            # Its weights may be what is not finite, where the probe does not look: once, it is to start anew.
            member.rebuild, member.doubted, member.updates = True, True, set()
        return result in ("behind", "desync")

    def _node(self, client: int) -> int:
        return self.members.found[client].node

    def plan(
        self, client: int, attempt: int = 0, task: protocol.Task = "none", steps: int = 1, guide: bytes = b""
    ) -> Plan:
        member = self.members.found[client]
        if self._probe[0] != self.replica.head:  # the weights have moved; one probe serves all clients
            self._probe = (self.replica.head, self.replica.probe())
            self._held = position(self.journal.entries, self.genesis, self.replica.head) or 0
        # The journal may be ahead of the weights: a round's lines are being written while later ones stand in it.
        held = 0 if member.rebuild else member.held
        is_ahead = held > self._held  # only weights lead back, since no record can be undone
        rebuild = member.rebuild or (is_ahead and not member.told.snapshots)
        held = 0 if rebuild else min(held, self._held)
        after = self.journal.entries[held - 1].chain if held else self.genesis
        missing = self.journal.entries[held : self._held]
        plan = protocol.plan_for(
            self.replica, after, missing, client=client, attempt=attempt, task=task, steps=steps,
            guide=guide,
            probe=self._probe[1],
        )  # fmt: skip
        plan = replace(plan, classes=self.members.classes, names=self.members.names)
        digests = (update_digest(entry.record) for entry in missing)
        needed = [digest for digest in digests if digest is not None and digest not in member.updates]
        updates = [self.updates[digest] for digest in needed if digest in self.updates]
        rest = {"rebuild": int(rebuild), "updates": gradient_codec.joined(updates)}
        is_better = is_ahead or self._snapshot_is_cheaper(missing, len(rest["updates"]))
        if len(updates) < len(needed) or (is_better and member.told.snapshots):
            rest = {"after": self.replica.head, "entries": b"", "rebuild": int(member.rebuild)}
            rest["snapshot"] = snapshots.taken(self.replica)
        return replace(plan, **rest)

    def _snapshot_is_cheaper(self, missing: Sequence[Entry], updates: int) -> bool:
        """Whether the weights reach a client sooner than it can fetch and replay what it lacks, as measured here."""
        if len(missing) < 2:
            return False
        seconds_per_byte = 8e-6 / self.settings.link_megabits
        moved = max(1, self.replica.round)
        replaying = self.seconds_moving() / moved * len(missing)
        tail = (sum(len(entry.raw) for entry in missing) + updates) * seconds_per_byte + replaying
        return snapshots.size(self.replica) * seconds_per_byte < tail

    def send(self, plans: Mapping[int, Plan], message_type: str) -> dict[int, Message]:
        """Replies to the plans of clients, by node."""
        began = time.monotonic()
        contents = {self._node(client): messages.pack(plan) for client, plan in plans.items()}
        replies, duplicates = exchange(self.grid, contents, message_type, self.settings.round_timeout)
        if duplicates:
            self.traffic.now.results["duplicate"] += duplicates
        extra = sum(len(plan.updates) + len(plan.guide) + len(plan.snapshot) for plan in plans.values())
        in_round = message_type.startswith("train")
        self.traffic.sent(contents, replies, time.monotonic() - began, extra, in_round)
        return replies

    def digests(self, clients: Collection[int], task: protocol.Task = "none") -> dict[int, str]:
        """SHA-256 of clients' weights now, by client; empty for one that does not answer. task: `end` ends the run."""
        digests = dict.fromkeys(sorted(clients), "")
        for _ in range(2):  # a replica older than known is sent everything the second time
            left = [client for client, digest in digests.items() if not digest]
            if not left:
                break
            replies = self.send({client: self.plan(client, task=task) for client in left}, "query.digest")
            for client in left:
                member, told = self.members.found[client], _told(Final, client, replies.get(self._node(client)))
                if told is None:
                    continue
                digests[client] = told.digest
                if not told.digest:
                    member.updates = set()
                known = position(self.journal.entries, self.genesis, told.head)
                member.held, member.rebuild = known or 0, known is None
        return digests

    def evaluations(self, round_: int) -> str:
        """Losses on the clients' own held-out parts, in words; of a round asked about before, those it gave then."""
        if (rows := self.traffic.log.scores.get(round_)) is None:
            rows = self._evaluated(round_)
        if not rows:
            return ""
        self.traffic.evaluated(rows)
        scores = [row["loss"] for row in rows]
        spread = statistics.pstdev(scores)
        return f"  clients' own {statistics.fmean(scores):.4f} (worst {max(scores):.4f}, spread {spread:.4f})"

    def _evaluated(self, round_: int) -> list[dict[str, Any]]:
        """A row for each client that scored itself."""
        replies = self.send({client: self.plan(client) for client in self.members.there()}, "evaluate.zofed")
        rows = []
        for client, member in self.members.found.items():
            found = _told(Evaluation, client, replies.get(member.node))
            if found is None or not found.examples:
                continue
            if not abs(found.loss) <= protocol.LARGEST_LOSS or not 0 < found.examples <= sanitize.LARGEST_COUNT:
                what = f"a loss of {found.loss:g} on {sanitize.brief(found.examples)} examples"
                print(f"client {client}: {what} cannot be: left out of the scores", file=sys.stderr, flush=True)
                continue
            measures = found.measures()
            if found.metrics and not measures:
                most = sanitize.MOST_MEASURES
                what = f"its metrics are no table of 1 to {most} names with finite numbers: left out of the scores"
                print(f"client {client}: {what}", file=sys.stderr, flush=True)
            own = {"metrics": json.dumps(measures)} if measures else {}
            rows.append({"round": round_, "client": client, "loss": found.loss, "examples": found.examples} | own)
        return rows


def _told(kind: type[Checked], client: int, reply: Message | None) -> Checked | None:
    """What a client's reply holds; None where there is none, or none of that client's that can be read."""
    if reply is None:
        return None
    if reply.has_error():
        problem = sanitize.reason(reply.error.reason)
    else:
        try:
            found = messages.unpack(kind, reply.content)
        except Malformed as error:
            problem = f"malformed reply: {error}"
        else:
            if found.client == client:
                return found
            problem = f"it answers as client {sanitize.brief(found.client)}"
    print(f"client {client}: {problem}", file=sys.stderr, flush=True)
    return None

"""Rounds over a Flower grid: plan, send, check, merge, write down, move, announce."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from zofed import config, federation, messages
from zofed.config import Settings
from zofed.errors import UserError
from zofed.estimators import forward_passes
from zofed.federation import Answer, Plan
from zofed.finish import finish, status_kept
from zofed.journal import Journal, canonical
from zofed.messages import Final, Greeting, Introduction, Malformed
from zofed.records import Record, Skipped
from zofed.runs import Row, RunFolder, Table
from zofed.task import Task, prepare_process, with_absolute_paths
from zofed.trainer import Step, Trainer, diverged
from zofed.worker import Worker

ROUNDS = (
    "round", "loss", "eval_loss", "replies_used", "replies_rejected", "replies_late", "bytes_up", "bytes_down",
    "seconds_compute", "seconds_waiting", "seconds_flower",
)  # fmt: skip
CLIENTS = (
    "round", "attempt", "client", "result", "loss", "examples", "bytes_up", "bytes_down", "seconds_compute"
)  # fmt: skip
ATTEMPTS = 3  # times a round is asked before it is given up
POLL_SECONDS = 0.05
QUIET_SECONDS = 1.0  # "all nodes that are there": no new one came for so long

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from Flower's run configuration; the output folder is absolute and printed."""
    try:
        run(grid, config.resolve(dict(context.run_config)), f"flower-{context.run_id}")
    except UserError as error:
        # Flower marks a run as failed only if an exception leaves the app, and logs it: one line will do for this one.
        sys.tracebacklimit = 0
        raise error from None


def run(grid: Grid, settings: Settings, name: str) -> dict[str, Any]:
    """One federated run over `grid`; returns its summary. name: of its folder, where settings.out is empty."""
    if settings.mode != "zo":
        raise UserError(
            f"mode = {settings.mode!r} does not run in a federation yet: use zofed train --mode {settings.mode}"
        )
    if settings.devices:
        raise UserError(
            f"devices = {settings.devices!r} does not split a federated run, whose clients compute on a device each: "
            "set device, or use zofed train"
        )
    if ":" in settings.objective:
        raise UserError(
            f"objective = {settings.objective!r} would have clients run code the server names: a federation takes "
            "loss, accuracy or f1"
        )
    out = config.absolute(settings.out or Path.home() / "zofed-runs" / name, "out")
    if settings.out and not Path(os.path.expanduser(settings.out)).is_absolute():
        raise UserError(f"out = {settings.out!r}: the server's working folder is not yours, give an absolute path")
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings.model_copy(update={"out": str(out)})))
    task.check_held_out()
    worker = task.worker()
    nodes = meet(grid, task.settings, worker)
    folder = RunFolder.create(out, task.settings, task.inputs())
    print(f"run folder: {out}\n{len(nodes)} clients, {len(task.held_out)} documents held out", flush=True)
    with (
        status_kept(folder),
        Journal.create(folder.journal, worker.genesis) as journal,
        Table(folder.path / "rounds.csv", ROUNDS) as rounds,
        Table(folder.path / "clients.csv", CLIENTS) as clients,
    ):
        return Server(grid, nodes, task, worker, journal, folder, rounds, clients).run()


def meet(grid: Grid, settings: Settings, worker: Worker) -> dict[int, int]:
    """Wait for the nodes, ask each who it is; node ids by client index. Raises UserError for whatever is amiss."""
    wanted = settings.clients
    if settings.quorum > wanted > 0:
        raise UserError(f"quorum = {settings.quorum}: only {wanted} clients take part; set quorum to {wanted} or less")
    node_ids = _wait_for_nodes(grid, wanted, settings.node_timeout)
    greeting = messages.pack(Greeting(canonical(worker.genesis)))
    replies = exchange(grid, dict.fromkeys(node_ids, greeting), "query.status", settings.round_timeout)
    found: dict[int, int] = {}
    for node in node_ids:
        reply = replies.get(node)
        if reply is None or reply.has_error():
            reason = "no answer" if reply is None else reply.error.reason
            raise UserError(f"node {node} could not be asked who it is ({reason}): see its log")
        introduction = messages.unpack(Introduction, reply.content)
        if introduction.problem:
            raise UserError(introduction.problem)
        if introduction.client in found:
            raise UserError(f"two nodes say they are client {introduction.client}: give each its own partition-id")
        found[introduction.client] = node
    chosen = {client: found[client] for client in sorted(found)[: wanted or None]}
    if settings.quorum > len(chosen):
        raise UserError(f"quorum = {settings.quorum}: only {len(chosen)} clients are here; set quorum to that or less")
    return chosen


def _wait_for_nodes(grid: Grid, wanted: int, seconds: float) -> list[int]:
    """Ids of the nodes once `wanted` are there; for 0, once one is there and no other has come for a while."""
    deadline = time.monotonic() + seconds
    seen: list[int] = []
    since = time.monotonic()
    while True:
        now = sorted(grid.get_node_ids())
        if now != seen:
            seen, since = now, time.monotonic()
        if seen and (len(seen) >= wanted if wanted else time.monotonic() - since >= QUIET_SECONDS):
            return seen
        if time.monotonic() > deadline:
            need = wanted or 1
            raise UserError(
                f"clients = {wanted}: the federation has {len(seen)} of {need} nodes after {seconds:g} s; start more, "
                f"in simulation with --federation-config 'num-supernodes={need}'"
            )
        time.sleep(POLL_SECONDS)


def exchange(grid: Grid, contents: dict[int, RecordDict], message_type: str, seconds: float) -> dict[int, Message]:
    """Send one message to each node and wait at most `seconds` for the replies; replies by node id."""
    sent = [
        Message(content=content, dst_node_id=node, message_type=message_type, ttl=seconds)
        for node, content in contents.items()
    ]
    open_ids = dict(zip(grid.push_messages(sent), contents, strict=True))
    replies: dict[int, Message] = {}
    deadline = time.monotonic() + seconds
    while open_ids and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(open_ids)):
            # An error reply comes from the SuperLink, so it is known by what it answers, not by who sent it.
            node = open_ids.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = reply
        if open_ids:
            time.sleep(POLL_SECONDS)
    return replies


@dataclass
class Traffic:
    """What the present round cost and how its replies fared."""

    up: int = 0
    down: int = 0
    results: Counter[str] = field(default_factory=Counter)
    compute: float = 0.0
    waiting: float = 0.0


class Server:
    """The server's side of one run; the law of the house is kept by the Trainer it drives."""

    def __init__(
        self,
        grid: Grid,
        nodes: dict[int, int],
        task: Task,
        worker: Worker,
        journal: Journal,
        folder: RunFolder,
        rounds: Table,
        clients: Table,
    ) -> None:
        self.grid, self.nodes, self.task, self.settings, self.worker = grid, nodes, task, task.settings, worker
        self.journal, self.folder, self.rounds, self.clients = journal, folder, rounds, clients
        self.genesis = worker.head
        self.held = dict.fromkeys(nodes, 0)  # client index -> entries its replica held when it last answered
        self.traffic = Traffic()
        self.bytes_up = self.bytes_down = self.plans = 0

    def run(self) -> dict[str, Any]:
        trainer = Trainer(self.worker, self.journal, self.folder, self.settings, self.task.evaluate, self._show)
        totals = trainer.run(self.settings.rounds, self._round)
        digests = self._final_digests()
        wrong = [client for client, digest in sorted(digests.items()) if digest != self.worker.digest()]
        if wrong:
            raise UserError(
                f"clients {wrong} end with other weights than the server ({digests}): do not trust their machines; "
                "run without them"
            )
        summary = finish(
            self.task,
            self.worker,
            self.journal,
            self.folder,
            totals,
            {
                "bytes_up_per_client_round": self.bytes_up / self.plans,
                "bytes_down_per_client_round": self.bytes_down / self.plans,
                "client_digests": {str(client): digest for client, digest in sorted(digests.items())},
            },
        )
        print(
            f"held-out {summary['eval_loss_start']:.4f} -> {summary['eval_loss_end']:.4f}; the replay and all "
            f"{len(digests)} clients end with the server's weights; results in {self.folder.path}",
            flush=True,
        )
        return summary

    def _round(self, round_: int) -> Step:
        """Ask all clients about one round, again until enough have answered, and merge what is usable."""
        self.traffic = Traffic()
        need = self.settings.quorum or len(self.nodes)
        good: dict[int, Answer] = {}
        for attempt in range(ATTEMPTS):
            missing = [client for client in self.nodes if client not in good]
            good |= self._ask(missing, attempt)
            if len(good) >= min(need, len(self.nodes)):
                break
        self.bytes_up += self.traffic.up
        self.bytes_down += self.traffic.down
        self.plans += len(self.nodes)
        if set(self.traffic.results) == {"not_finite"}:
            raise diverged(round_, self.settings)
        if len(good) < need and self.settings.quorum == 0:
            missing = sorted(set(self.nodes) - set(good))
            raise UserError(
                f"round {round_}: clients {missing} gave no usable reply in {ATTEMPTS} attempts "
                f"({dict(self.traffic.results)}): see clients.csv in {self.folder.path}, or set quorum below the "
                "number of clients"
            )
        record: Record = Skipped(round_)
        if len(good) >= need:
            record = federation.record_of(self.settings, self.worker, good, self.settings.rounds)
        own = federation.examples_per_query(self.settings)
        batch = federation.examples_seen(self.settings)
        passes = len(good) * (
            2 * self.settings.queries if own else forward_passes(self.settings.estimator, self.settings.queries)
        )
        return Step(
            record=record,
            loss=sum(answer.loss for answer in good.values()) / len(good) if good else math.nan,
            epoch=round_ * batch * len(good) / max(1, sum(answer.examples for answer in good.values())),
            batch_size=batch * len(good),
            forward_passes=passes,
            forward_equivalents=passes * (own or self.settings.batch_size),
            tokens=batch * len(good) * self.settings.block_size,
            bytes=self.traffic.up + self.traffic.down,
        )

    def _ask(self, clients: Iterable[int], attempt: int) -> dict[int, Answer]:
        """One attempt: send each client its plan and check what comes back; those behind are sent what they lack."""
        good: dict[int, Answer] = {}
        waiting_for = list(clients)
        for _ in range(2):  # a second time for those whose replica was older than known, or not sound
            plans = {client: self._plan(client, attempt) for client in waiting_for}
            replies = self._send(plans, "train.zo")
            behind = []
            for client, plan in plans.items():
                reply = replies.get(self.nodes[client])
                answer, result = self._judge(reply, plan)
                self.traffic.results[result] += 1
                self._note(client, plan, answer, result, reply)
                if answer is not None and result == "used":
                    good[client] = answer
                    self.held[client] = len(self.journal.entries)
                elif answer is not None and result in ("behind", "desync"):
                    known = federation.position(self.journal.entries, self.genesis, answer.head)
                    self.held[client] = known or 0 if result == "behind" else 0
                    behind.append(client)
            waiting_for = behind
            if not behind:
                break
        return good

    def _plan(self, client: int, attempt: int) -> Plan:
        held, entries = self.held[client], self.journal.entries
        after = entries[held - 1].chain if held else self.genesis
        return federation.plan_for(self.settings, self.worker, after, entries[held:], client=client, attempt=attempt)

    def _judge(self, reply: Message | None, plan: Plan) -> tuple[Answer | None, str]:
        if reply is None:
            return None, "late"
        if reply.has_error():
            print(f"client {plan.client}: {reply.error.reason}", file=sys.stderr, flush=True)
            return None, "error"
        try:
            answer = messages.unpack(Answer, reply.content)
        except Malformed as error:
            print(f"client {plan.client}: malformed reply: {error}", file=sys.stderr, flush=True)
            return None, "malformed"
        return answer, federation.check(answer, plan) or "used"

    def _note(self, client: int, plan: Plan, answer: Answer | None, result: str, reply: Message | None) -> None:
        up = messages.size(reply.content) if reply is not None and reply.has_content() else 0
        if answer is not None:
            self.traffic.compute = max(self.traffic.compute, answer.seconds)
        self.clients.write(
            {
                "round": plan.round,
                "attempt": plan.attempt,
                "client": client,
                "result": result,
                "loss": answer.loss if answer else None,
                "examples": answer.examples if answer else None,
                "bytes_up": up,
                "bytes_down": messages.size(messages.pack(plan)),
                "seconds_compute": answer.seconds if answer else None,
            }
        )

    def _send(self, plans: dict[int, Plan], message_type: str) -> dict[int, Message]:
        began = time.monotonic()
        contents = {self.nodes[client]: messages.pack(plan) for client, plan in plans.items()}
        replies = exchange(self.grid, contents, message_type, self.settings.round_timeout)
        self.traffic.waiting += time.monotonic() - began
        self.traffic.down += sum(messages.size(content) for content in contents.values())
        self.traffic.up += sum(messages.size(reply.content) for reply in replies.values() if reply.has_content())
        return replies

    def _final_digests(self) -> dict[int, str]:
        """SHA-256 of every client's weights at the end of the run, by client index."""
        digests: dict[int, str] = {}
        for _ in range(2):  # a replica older than known is sent everything the second time
            open_clients = [client for client in self.nodes if not digests.get(client)]
            if not open_clients:
                break
            replies = self._send({client: self._plan(client, 0) for client in open_clients}, "query.digest")
            for client in open_clients:
                reply = replies.get(self.nodes[client])
                usable = reply is not None and reply.has_content()
                digests[client] = messages.unpack(Final, reply.content).digest if reply and usable else ""
                if not digests[client]:
                    self.held[client] = 0
        return digests

    def _show(self, row: Row) -> None:
        round_, traffic = row["step"], self.traffic
        used = traffic.results["used"]
        held_out = f"  held-out {row['eval_loss']:.4f}" if row.get("eval_loss") is not None else ""
        if round_ == 0:
            print(f"round 0{held_out}", flush=True)
            return
        rejected = sum(traffic.results.values()) - used - traffic.results["late"]
        self.rounds.write(
            {
                "round": round_,
                "loss": row["loss"],
                "eval_loss": row.get("eval_loss"),
                "replies_used": used,
                "replies_rejected": rejected,
                "replies_late": traffic.results["late"],
                "bytes_up": traffic.up,
                "bytes_down": traffic.down,
                "seconds_compute": traffic.compute,
                "seconds_waiting": traffic.waiting,
                "seconds_flower": max(0.0, traffic.waiting - traffic.compute),
            }
        )
        print(
            f"round {round_}/{self.settings.rounds}  loss {row['loss']:.4f}{held_out}  up {traffic.up} B  "
            f"down {traffic.down} B  {row['seconds']:.1f} s",
            flush=True,
        )

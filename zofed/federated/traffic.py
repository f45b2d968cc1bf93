"""What rounds cost and how their replies fared: the tables of a federated run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from flwr.app import Message, RecordDict

from zofed.base.texts import is_count
from zofed.federated import messages
from zofed.federated.protocol import Plan, Reply
from zofed.runs.round_log import RoundLog
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, Table, keep_rows, sure_rows
from zofed.training.trainer import sure_lines

ROUNDS = (
    "round", "loss", "eval_loss", "slope_size", "clients_asked", "replies_used", "replies_rejected", "replies_late",
    "bytes_up", "bytes_down", "payload_up", "payload_down", "bytes_updates", "seconds_compute", "seconds_waiting",
    "seconds_flower",
)  # fmt: skip
CLIENTS = (
    "round", "attempt", "client", "task", "result", "loss", "examples", "bytes_up", "bytes_down", "payload_up",
    "payload_down", "seconds_compute",
)  # fmt: skip
EVALUATIONS = ("round", "client", "loss", "examples", "metrics")
SIZES = ("bytes_up", "bytes_down", "payload_up", "payload_down")  # of a reply
# What FlowerTune's board allows a run, in its MB of 2^20 bytes: the arrays of all training messages, both ways.
FLOWERTUNE_BUDGET = 200_000

Size = tuple[int, int]  # bytes of a message's content, and of zofed's own among them
NO_BYTES: Size = (0, 0)


@dataclass
class Round:
    """The present exchange. updates: bytes of guides, updates and snapshots, which travel down only."""

    asked: int = 0
    up: int = 0
    down: int = 0
    payload_up: int = 0
    payload_down: int = 0
    updates: int = 0
    results: Counter[str] = field(default_factory=Counter)
    compute: float = 0.0
    waiting: float = 0.0

    @property
    def rejected(self) -> int:
        """Replies that came and were of no use; those behind were asked again."""
        return sum(self.results.values()) - self.results["used"] - self.results["late"]


class Traffic:
    """Tables of rounds, replies and clients' evaluations, and sums over the whole run.

    last_round: of the journal. `latest` is the last round whose lines all stand; those of later ones are cut here, and
    written again as the run passes its rounds, from what `log` kept of them.
    """

    def __init__(self, folder: RunFolder, last_round: int, *, losses_withheld: bool = False) -> None:
        self._losses_withheld = losses_withheld
        self._path = folder.path
        self.log = RoundLog(folder.path)
        self.now = Round()
        self._unsettled: list[Row] = []
        self._replies: list[Row] = []  # of the present exchange, settled
        self._sizes: tuple[dict[int, Size], dict[int, Size]] = ({}, {})  # of the last messages, down and up, by node
        self.up = self.down = self.payload_up = self.payload_down = self.plans = self.beside = 0
        self.reasons: dict[int, Counter[str]] = {}  # by client
        self.latest = self._cut(folder, last_round)
        self.rounds = Table(folder.path / "rounds.csv", ROUNDS)
        self.clients = Table(folder.path / "clients.csv", CLIENTS)
        self._evaluations: Table | None = None  # most runs have none

    def _cut(self, folder: RunFolder, last_round: int) -> int:
        """Keep the lines of rounds of which every table surely has its own; returns the last of those rounds."""
        metrics, _ = sure_lines(folder, last_round)
        told = sure_rows(self._path / "rounds.csv", ROUNDS, lambda index, row: row.get("round") == str(index + 1))
        latest = min(len(metrics) - 1, len(told))
        rounds = told[: max(0, latest)]

        def stands(_: int, row: Mapping[str, str]) -> bool:
            return all(is_count(row.get(key, "")) for key in ("round", "client", *SIZES))

        replies = [row for row in sure_rows(self._path / "clients.csv", CLIENTS, stands) if int(row["round"]) <= latest]
        kept = {round_: fact["replies"] for round_, fact in self.log.exchanges.items() if round_ <= latest}
        replies = [row for row in replies if int(row["round"]) not in kept]
        replies += [row for _, rows in sorted(kept.items()) for row in rows]
        replies.sort(key=lambda row: int(row["round"]))
        scores = sure_rows(
            self._path / "client_evaluations.csv", EVALUATIONS, lambda _, row: is_count(row.get("round", ""))
        )
        scores = [row for row in scores if int(row["round"]) not in self.log.scores]
        scores += [row for rows in self.log.scores.values() for row in rows]
        scores.sort(key=lambda row: int(row["round"]))
        keep_rows(self._path / "rounds.csv", ROUNDS, rounds)
        keep_rows(self._path / "clients.csv", CLIENTS, replies)
        keep_rows(self._path / "client_evaluations.csv", EVALUATIONS, [r for r in scores if int(r["round"]) <= latest])
        self.plans += sum(int(row["clients_asked"] or 0) for row in rounds)
        for row in replies:
            self._count(row)
        return latest

    def _count(self, row: Row) -> None:
        """Add a reply to the sums."""
        self.reasons.setdefault(int(row["client"]), Counter())[row["result"]] += 1
        for name, column in zip(("up", "down", "payload_up", "payload_down"), SIZES, strict=True):
            setattr(self, name, getattr(self, name) + int(row[column]))

    NOTHING: ClassVar[Row] = {"now": vars(Round()), "replies": []}  # of a round that an earlier one's exchange gave

    def facts(self) -> Row:
        """What the present exchange found out, to be logged: `again` brings it back."""
        return {"now": vars(self.now), "replies": self._replies}

    def again(self, facts: Row) -> None:
        """Begin a round that an earlier process asked clients about, with what it found out, and write its replies."""
        self.now = Round(**facts["now"] | {"results": Counter(facts["now"]["results"])})
        self.plans += self.now.asked
        for row in facts["replies"]:
            self._count(row)
            self.clients.write(row)

    def begin(self) -> None:
        """A round begins; it may take several exchanges, or none where an earlier one asked for it."""
        self.now, self._replies = Round(), []

    def ask(self, clients: int) -> None:
        """Count clients that are asked."""
        self.now.asked += clients
        self.plans += clients

    def sent(
        self, contents: Mapping[int, Any], replies: Mapping[int, Message], seconds: float, updates: int, in_round: bool
    ) -> None:
        """Count an exchange: contents and replies by node. in_round: not one that greets, checks or evaluates."""
        sent = {node: _size(content) for node, content in contents.items()}
        came = {node: _size(reply.content) for node, reply in replies.items() if reply.has_content()}
        self._sizes = sent, came
        (down, payload_down), (up, payload_up) = map(_total, self._sizes)
        if not in_round:
            self.beside += up + down
            return
        for name, count in (("up", up), ("down", down), ("payload_up", payload_up), ("payload_down", payload_down)):
            setattr(self.now, name, getattr(self.now, name) + count)
            setattr(self, name, getattr(self, name) + count)
        self.now.updates += updates
        self.now.waiting += seconds

    def result(self, plan: Plan, node: int, answer: Reply | None, result: str) -> None:
        """Note how a node's reply to the plan that was sent last fared, until `settle` writes it down."""
        self.now.results[result] += 1
        self.reasons.setdefault(plan.client, Counter())[result] += 1
        # What a client says it took is believed up to what the server waited for it.
        seconds = min(max(answer.milliseconds, 0) / 1000, self.now.waiting) if answer is not None else None
        if seconds is not None:
            self.now.compute = max(self.now.compute, seconds)
        down, up = (sizes.get(node, NO_BYTES) for sizes in self._sizes)
        self._unsettled.append(
            {
                "round": plan.round,
                "attempt": plan.attempt,
                "client": plan.client,
                "task": plan.task,
                "result": result,
                "loss": answer.loss if answer and not self._losses_withheld else None,
                "examples": answer.examples if answer else None,
                "bytes_up": up[0],
                "bytes_down": down[0],
                "payload_up": up[1],
                "payload_down": down[1],
                "seconds_compute": seconds,
            }
        )

    def revise(self, client: int, result: str) -> None:
        """A reply that was used until all of them were there is of no use after all."""
        row = next(row for row in reversed(self._unsettled) if (row["client"], row["result"]) == (client, "used"))
        row["result"] = result
        for counts in (self.now.results, self.reasons[client]):
            counts["used"] -= 1
            counts[result] += 1

    def settle(self) -> None:
        """Write down how the replies of one attempt fared."""
        self.clients.write(*self._unsettled)
        self._replies += self._unsettled
        self._unsettled = []

    def evaluated(self, rows: list[Row]) -> None:
        """Write down the clients' scores of a round on their own held-out parts."""
        if self._evaluations is None:
            self._evaluations = Table(self._path / "client_evaluations.csv", EVALUATIONS)
        if rows[0]["round"] not in self.log.scores:
            self.log.write({"round": rows[0]["round"], "scores": rows})
        self._evaluations.write(*rows)

    def tell(self, row: Row, slope_size: float | None) -> None:
        """Write down a round that ended."""
        now = self.now
        self.rounds.write(
            {
                "round": row["step"],
                "loss": row["loss"],
                "eval_loss": row.get("eval_loss"),
                "slope_size": slope_size,
                "clients_asked": now.asked,
                "replies_used": now.results["used"],
                "replies_rejected": now.rejected,
                "replies_late": now.results["late"],
                "bytes_up": now.up,
                "bytes_down": now.down,
                "payload_up": now.payload_up,
                "payload_down": now.payload_down,
                "bytes_updates": now.updates,
                "seconds_compute": now.compute,
                "seconds_waiting": now.waiting,
                "seconds_flower": max(0.0, now.waiting - now.compute),
            }
        )

    def summary(self, greetings: int) -> dict[str, Any]:
        """Mean bytes of a client and round, those of all beside, each client's results: for the summary.

        greetings: their bytes. flowertune_megabytes: by the rule of FlowerTune's board, which counts arrays. Here bytes
        stand in their place: all of zofed's own count, with the few that tell what a message asks or answers.
        """
        plans = max(1, self.plans)
        megabytes = (self.payload_up + self.payload_down) / 2**20
        return {
            "bytes_up_per_client_round": self.up / plans,
            "bytes_down_per_client_round": self.down / plans,
            "payload_up_per_client_round": self.payload_up / plans,
            "payload_down_per_client_round": self.payload_down / plans,
            "bytes_beside_rounds": self.beside + greetings,
            "flowertune_megabytes": megabytes,
            "flowertune_budget_share": megabytes / FLOWERTUNE_BUDGET,
            "replies": {str(client): dict(+counts) for client, counts in sorted(self.reasons.items())},
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        for table in (self.rounds, self.clients, self._evaluations):
            if table is not None:
                table.close()


def _size(content: RecordDict) -> Size:
    return messages.size(content), messages.payload(content)


def _total(sizes: Mapping[int, Size]) -> Size:
    return sum(whole for whole, _ in sizes.values()), sum(own for _, own in sizes.values())

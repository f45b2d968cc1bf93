"""Who takes part in a federation: meeting the nodes, asking some of them each round, leaving out those that fail."""

import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from zofed import __version__
from zofed.base import environment
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import sanitize
from zofed.core.journal import Journal, canonical, outline, position
from zofed.core.records import CLIENTS
from zofed.core.replica import Replica
from zofed.data.classes import Classes
from zofed.data.documents import random_order
from zofed.federated import messages, protocol
from zofed.federated.places import Places
from zofed.federated.wire import Greeting, Introduction, Malformed
from zofed.training.modes import mode_of

POLL_SECONDS = 0.05
QUIET_SECONDS = 1.0  # "all nodes that are there": no new one came for so long
LOOK_SECONDS = 1.0  # between looks for nodes that came or went
AGAIN_SECONDS = 30.0  # until a node that failed to say who it is is asked again; only then, and no oftener
AGAIN_WAIT_SECONDS = 5.0  # that a round then waits for such nodes, at most
PATIENCE, PAUSE = 5, 20  # failures in a row after which a client is not asked for so many rounds


@dataclass
class Member:
    """One client: its node, what it said of itself, how many journal entries its replica held when it last answered."""

    node: int
    told: Introduction
    held: int = 0
    rebuild: bool = False  # its weights were found wrong: all it has must go
    doubted: bool = False  # it was rebuilt for a loss that is not finite, and has given no other since
    updates: set[bytes] = field(default_factory=set)  # digests of guides it was sent and answered with
    failures: int = 0
    paused_until: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node takes no part, and when it is to be asked again (monotonic seconds); infinity: never."""

    reason: str
    ask_at: float = math.inf


def exchange(
    grid: Grid, contents: Mapping[int, RecordDict], message_type: str, seconds: float
) -> tuple[dict[int, Message], int]:
    """Send one message to each node and wait at most `seconds`: replies by node id, and how many came twice."""
    sent = [
        Message(content=content, dst_node_id=node, message_type=message_type, ttl=seconds)
        for node, content in contents.items()
    ]
    nodes = dict(zip(grid.push_messages(sent), contents, strict=True))
    replies: dict[int, Message] = {}
    duplicates = 0
    deadline = time.monotonic() + seconds
    while len(replies) < len(nodes) and time.monotonic() < deadline:
        waiting = [message_id for message_id, node in nodes.items() if node not in replies]
        for reply in grid.pull_messages(waiting):
            # An error reply comes from the SuperLink, so it is known by what it answers, not by who sent it.
            node = nodes.get(reply.metadata.reply_to_message_id)
            if node is None or node in replies:
                duplicates += 1
            else:
                replies[node] = reply
        if len(replies) < len(nodes):
            time.sleep(POLL_SECONDS)
    return replies, duplicates


class Members:
    """The clients of one run, by index. classes: of the run's classification, None for a language model."""

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        replica: Replica,
        journal: Journal | None = None,
        classes: Classes | None = None,
        places: Places | None = None,
    ) -> None:
        self.grid, self.settings, self.replica, self.journal = grid, settings, replica, journal
        self.classes, self.names = (len(classes), classes.packed()) if classes else (0, "")
        self.places = places or Places()
        self.found: dict[int, Member] = {}
        self.refused: dict[int, Refusal] = {}  # by node id
        self.bytes = 0  # of greetings and what answered them, as Flower serialises them
        self._looked = 0.0
        self._present: set[int] = set()

    @property
    def strict(self) -> bool:
        """Whether a round needs every client it asks."""
        return self.settings.quorum == 0

    def meet(self) -> None:
        """Wait for the nodes and ask each who it is. Raises UserError for whatever keeps the run from starting."""
        settings = self.settings
        if settings.quorum > settings.clients > 0:
            raise UserError(
                f"quorum = {settings.quorum}: only {settings.clients} clients take part; set quorum to "
                f"{settings.clients} or less"
            )
        self._present = set(_wait_for_nodes(self.grid, settings.clients, settings.node_timeout))
        if self.places.forget_strangers(self._present):
            print(
                "no node of before is here: another SuperLink gave all new ids; they take their places anew", flush=True
            )
        before = set(self.places.nodes)
        self._greet(sorted(self._present), settings.round_timeout)
        if self.strict and self.refused:
            raise UserError(next(iter(self.refused.values())).reason)
        for refusal in self.refused.values():
            print(f"goes on without a node: {refusal.reason}", file=sys.stderr, flush=True)
        in_turn = sorted(self.found, key=lambda client: (client not in before, client))
        for client in in_turn[settings.clients or len(in_turn) :]:
            self._refuse(client, f"clients = {settings.clients}: client {client} is one more")
        self.found = dict(sorted(self.found.items()))
        if settings.quorum > len(self.found) or not self.found:
            raise UserError(
                f"quorum = {settings.quorum}: only {len(self.found)} clients are here; set quorum to that or less"
            )
        if settings.only_client >= 0 and settings.only_client not in self.found:
            here = ", ".join(map(str, self.found))
            raise UserError(f"only-client = {settings.only_client}: the clients here are {here}; name one")
        asked = self.asked_each_round(len(self.found))
        if settings.quorum > asked:
            if settings.only_client >= 0:
                raise UserError(f"quorum = {settings.quorum}: only-client asks one client a round; leave one out")
            raise UserError(
                f"quorum = {settings.quorum}: participation = {settings.participation:g} asks {asked} clients a round; "
                "raise participation or lower quorum"
            )
        self._check_capabilities()

    def _check_capabilities(self) -> None:
        able = self.able()
        needed = mode_of(self.settings).backpropagating_clients
        if needed != "none" and not able:
            raise UserError(
                f"mode = {self.settings.mode!r} needs a client that can backpropagate, and all {len(self.found)} say "
                "mode = zo in their node configuration: use mode zo or subspace"
                + (", or gradient-source = server" if needed == "some" else "")
            )
        self._leave_out_unable()

    def _leave_out_unable(self) -> None:
        """Where all clients backpropagate, do without those that cannot, for good."""
        left = sorted(set(self.found) - set(self.able()))
        if mode_of(self.settings).backpropagating_clients == "all" and left:
            print(f"clients {left} say mode = zo and cannot train by backpropagation: left out", flush=True)
            for client in left:
                self._refuse(client, f"client {client} says mode = zo")

    def _refuse(self, client: int, reason: str) -> None:
        self.refused[self.found.pop(client).node] = Refusal(reason)
        self.places.free(client)

    @property
    def partitions(self) -> int:
        """How many clients the data are dealt out to."""
        return self.places.clients

    def there(self) -> list[int]:
        """Clients whose nodes are there, as far as was last seen."""
        return [client for client, member in self.found.items() if member.node in self._present]

    def able(self) -> list[int]:
        """Clients that can backpropagate."""
        return [client for client, member in self.found.items() if member.told.mode == "fo"]

    def asked_each_round(self, count: int) -> int:
        """How many of `count` clients a round asks."""
        return protocol.asked_each_round(self.settings, count)

    def sampled(self, round_: int, among: Collection[int] | None = None) -> list[int]:
        """The clients that a round asks: drawn from (seed, round) among those that are neither away nor paused."""
        only = self.settings.only_client
        there = sorted(client for client in (self.found if among is None else among) if only in (-1, client))
        if not self.strict:
            there = [c for c in there if self.found[c].paused_until < round_ and self.found[c].node in self._present]
        if not there:
            return []
        count = self.asked_each_round(len(there))
        order = random_order(len(there), "participation", self.settings.seed, round_)
        return sorted(there[int(at)] for at in order[:count])

    def note(self, client: int, round_: int, *, is_well: bool) -> None:
        """Count failures in a row; a client that keeps failing is left alone for a while, unless all are needed."""
        member = self.found[client]
        member.failures = 0 if is_well else member.failures + 1
        if member.failures >= PATIENCE and not self.strict:
            member.paused_until, member.failures = round_ + PAUSE, 0
            print(f"client {client} failed {PATIENCE} rounds in a row: not asked for {PAUSE} rounds", flush=True)

    def look(self, *, at_once: bool = False) -> None:
        """Take in nodes that came since the last look, and notice those that went; once a second, or at once.

        Nodes that could not be asked who they are are asked again now and then, unless all clients wanted are there.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS and not at_once:
            return
        self._present = set(self.grid.get_node_ids())
        known = {member.node for member in self.found.values()} | set(self.refused)
        self._take_in(sorted(self._present - known), self.settings.round_timeout)
        if not 0 < self.settings.clients <= len(self.there()):
            again = [node for node in sorted(self._present & set(self.refused)) if self.refused[node].ask_at <= now]
            self._take_in(again, min(AGAIN_WAIT_SECONDS, self.settings.round_timeout))
        self._looked = time.monotonic()

    def _take_in(self, nodes: list[int], seconds: float) -> None:
        """Ask nodes who they are and tell what came of it, but not what was told of the same node before."""
        if not nodes:
            return
        before = set(self.found)
        refused = {node: self.refused.pop(node).reason for node in nodes if node in self.refused}
        self._greet(nodes, seconds)
        self._leave_out_unable()
        self.places.save()
        for client in sorted(set(self.found) - before):
            print(f"client {client} joined", flush=True)
        for node in nodes:
            if node in self.refused and self.refused[node].reason != refused.get(node):
                print(f"a node is not taken in: {self.refused[node].reason}", file=sys.stderr, flush=True)

    def wait_for(self, clients: Iterable[int]) -> None:
        """Where all are needed, wait for those that are away; no longer than a run waits for its nodes."""
        deadline = time.monotonic() + self.settings.node_timeout
        while self.strict and time.monotonic() < deadline:
            if all(self.found[client].node in self._present for client in clients):
                return
            self.look(at_once=True)
            time.sleep(POLL_SECONDS)

    def _greet(self, nodes: list[int], seconds: float) -> None:
        """Ask nodes who they are, wait at most `seconds`, and put each among those found or refused."""
        greeting = messages.pack(Greeting(canonical(outline(self.replica.genesis)), self.classes, self.names))
        replies, _ = exchange(self.grid, dict.fromkeys(nodes, greeting), "query.status", seconds)
        self.bytes += len(nodes) * messages.size(greeting)
        self.bytes += sum(messages.size(reply.content) for reply in replies.values() if reply.has_content())
        heard = {node: self._introduced(node, replies.get(node)) for node in nodes}
        said = {node: told.clients for node, (told, problem) in heard.items() if told is not None and not problem}
        if not self.places.settle(list(said.values()), self.settings.clients):
            numbers = ", ".join(f"num-partitions = {said[node]} (node {node})" for node in sorted(said)[:4])
            raise UserError(f"nodes disagree, {numbers}: give all nodes the same, or set clients to the right number")
        ask_at = time.monotonic() + AGAIN_SECONDS
        for node in nodes:
            told, problem = heard[node]
            if told is not None and not problem:
                problem = self.places.refusal(node, told.client, told.clients, self._present)
            if told is None or problem:
                self.refused[node] = Refusal(problem, ask_at)  # it may be mended meanwhile
            else:
                self._tell_other_code(told)
                self.found[told.client] = Member(node, told, self._position(told.head))
                self.places.give(told.client, node)

    def _introduced(self, node: int, reply: Message | None) -> tuple[Introduction | None, str]:
        """What a node says of itself, and why it cannot take part; empty where it can."""
        if reply is None or reply.has_error():
            reason = "no answer" if reply is None else sanitize.reason(reply.error.reason)
            return None, f"node {node} could not be asked who it is ({reason}): see its log"
        try:
            told = messages.unpack(Introduction, reply.content)
        except Malformed as error:
            return None, f"node {node} runs another zofed ({error}): give all machines the same"
        if told.problem:
            is_known = not sanitize.misplaced(told.client, CLIENTS)
            return told, f"{f'client {told.client}' if is_known else 'a node'}: {told.problem}"
        if problem := told.faults():
            return told, f"node {node} is not taken in: {problem}"
        if (version := told.code.partition(" ")[0]) != __version__:
            where = f"client {told.client} runs zofed {version or 'of no version'}, the server {__version__}"
            return told, f"{where}: give all machines the same"
        return told, ""

    def _tell_other_code(self, told: Introduction) -> None:
        theirs, ours = (" ".join(code.split(" ")[1:2]) for code in (told.code, environment.code()))
        if theirs != ours:
            print(
                f"client {told.client} runs other code than the server under the same version {__version__} "
                f"({theirs or 'of no name'}, here {ours}): bring all machines to one commit if in doubt",
                file=sys.stderr,
                flush=True,
            )

    def _position(self, head: bytes) -> int:
        entries = self.journal.entries if self.journal else []
        return position(entries, self.replica.origin, head) or 0


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
                f"clients = {wanted}: the federation has {len(seen)} of {need} nodes after {seconds:g} s; start more "
                f"(zofed supernode), in simulation with --federation-config 'num-supernodes={need}'"
            )
        time.sleep(POLL_SECONDS)

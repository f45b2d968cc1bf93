"""Which node is which client of a run, and among how many: settled once, the same after a restart.

A client's index decides its share of the data and the seeds of its directions. So it belongs to the node that had it
first, as long as the run lasts: Flower knows a node by its key, and gives the same key the same id.
"""

import json
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from zofed.base.files import write_private
from zofed.base.texts import is_count
from zofed.core import sanitize

FILE = "members.json"  # in the run's folder
WITHOUT_KEYS = "ZOFED_NODES_WITHOUT_KEYS"  # environment: each start of a node gives it another id


@dataclass
class Places:
    """clients: of how many each index is one, 0 before it is settled. nodes: ids by index. are_lasting: whether a node
    that starts anew has the id it had."""

    clients: int = 0
    nodes: dict[int, int] = field(default_factory=dict)
    are_lasting: bool = True
    path: Path | None = None
    _indices: dict[int, int] = field(init=False, compare=False, repr=False)  # by node

    def __post_init__(self) -> None:
        self._indices = {node: index for index, node in self.nodes.items()}

    @classmethod
    def read(cls, folder: Path, *, are_lasting: bool = True) -> Self:
        """Those of an earlier start of the run in `folder`; none where there was none or its file is spoilt."""
        path = folder / FILE
        found = (sanitize.json_object(path.read_bytes()) if os.path.isfile(path) else None) or {}
        clients, nodes = found.get("num-partitions"), found.get("nodes")
        if type(clients) is not int or not isinstance(nodes, dict):
            return cls(are_lasting=are_lasting, path=path)
        places = {int(index): node for index, node in nodes.items() if is_count(index) and type(node) is int}
        return cls(clients, places, are_lasting, path)

    def settle(self, said: Collection[int], wanted: int) -> bool:
        """Among how many clients each is one, from what the nodes say and how many the settings want (0: any number).

        Where some node says the number wanted, that; else the larger number that most say. False where as many say
        another.
        """
        if self.clients:
            return True
        votes = Counter(number for number in said if number > wanted).most_common(2)
        if wanted and (wanted in said or not votes):
            self.clients = wanted
        elif votes and (len(votes) == 1 or votes[0][1] > votes[1][1]):
            self.clients = votes[0][0]
        return bool(self.clients) or not said

    def forget_strangers(self, present: Collection[int]) -> bool:
        """Where as many nodes are there as before and none is known, another SuperLink gave them other ids.

        Returns whether places were lost so. Fewer may be strangers that came before the nodes of the run.
        """
        lost = 0 < len(self.nodes) <= len(set(present)) and not set(self.nodes.values()) & set(present)
        if lost:
            self.nodes.clear()
            self._indices.clear()
        return lost

    def give(self, client: int, node: int) -> None:
        """An index is this node's from now on."""
        self.free(client)
        self.nodes[client], self._indices[node] = node, client

    def free(self, client: int) -> None:
        """An index is nobody's from now on."""
        self._indices.pop(self.nodes.pop(client, -1), None)

    def refusal(self, node: int, client: int, clients: int, present: Collection[int]) -> str:
        """Why a node cannot be this client among so many, with the remedy; empty where it can."""
        if clients != self.clients:
            return (
                f"client {client} says num-partitions = {clients}, others {self.clients}: give all nodes the same, "
                f"this one --num-partitions {self.clients}"
            )
        own = self._indices.get(node, client)
        if own != client:
            return (
                f"node {node} is client {own} of this run and now says partition-id = {client}: start it again with "
                f"--partition-id {own}"
            )
        holder = self.nodes.get(client, node)
        if holder == node:
            return ""
        if holder in present:
            return (
                f"two nodes say they are client {client}: give each its own partition-id; node {holder} had it first "
                f"and keeps it, node {node} is to be started with one that no other has"
            )
        if not self.are_lasting:
            return ""
        return (
            f"client {client} is node {holder} in this run, which is away, and node {node} says it were that client: "
            f"start the former again with its key, and this one with a partition-id that no other has; if the former "
            f"is gone for good, delete {self.path or FILE} and start the run again"
        )

    def keep_in(self, folder: Path) -> None:
        """From now on have them in the folder's file."""
        self.path = folder / FILE
        self.save()

    def save(self) -> None:
        """Write them down, where there is a folder yet."""
        if self.path is not None and self.path.parent.is_dir():
            nodes = {str(index): node for index, node in sorted(self.nodes.items())}
            write_private(self.path, json.dumps({"num-partitions": self.clients, "nodes": nodes}, indent=2) + "\n")

"""Which documents each client of a federation holds: a share of one data set, dealt out by a rule, or its own."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.data import subsets
from zofed.data.catalog import CATALOG
from zofed.data.columns import Roles
from zofed.data.documents import KNOWN_NAMES, Document, Reading, check_share, random_order, read, shard
from zofed.data.templates import Template

OTHERS = "others"  # the groups too small to be told apart in a table or a picture

Counts = Mapping[str, int]  # documents of each group


def deal(documents: Sequence[Document], clients: int, settings: Settings) -> list[list[Document]]:
    """The documents of each of so many clients, by settings.partition; every document has one client.

    All at once, as a process that serves a thousand clients needs them. A function of documents, clients, seed,
    partition and dirichlet-alpha alone, whoever asks. A client's documents
    come in the order of one permutation drawn from the seed, the same for every kind.

    - iid: `documents.shard`, equal numbers whatever the documents are;
    - dirichlet: the documents of each group (`group`) are cut into shares drawn from a symmetric Dirichlet
      distribution of concentration dirichlet-alpha (Hsu, Qi and Brown 2019, arXiv:1909.06335; drawn group by group as
      by Yurochkin et al. 2019, arXiv:1905.12022). While a client has nothing, the lowest such takes the last document
      of the client that holds most, of several the lowest;
    - source: with no more clients than sources, each source goes whole to the client with fewest documents so far,
      largest source first; with more, each client holds a share of one source, and each further client goes to the
      source that has most documents per client.

    One client holds everything. Raises UserError when there are more clients than documents, or the documents have no
    two groups (dirichlet) or sources (source) to tell apart.
    """
    check_share(len(documents), 0, clients)
    if settings.partition == "iid" or clients == 1:
        return [shard(documents, client, clients, settings.seed) for client in range(clients)]
    order = random_order(len(documents), "shard", settings.seed)
    names = [group(document, settings.partition) for document in documents]
    known = sorted(set(names))
    if len(known) < 2:
        raise UserError(_nothing_to_tell_apart(settings.partition, known[0]))
    number = {name: index for index, name in enumerate(known)}
    groups = tuple(number[names[position]] for position in order)
    if settings.partition == "source":
        owners = _owners_by_source(groups, clients)
    else:
        owners = _owners_by_dirichlet(groups, clients, settings.dirichlet_alpha, settings.seed)
    shares: list[list[Document]] = [[] for _ in range(clients)]
    for position, owner in zip(order.tolist(), owners.tolist(), strict=True):
        shares[owner].append(documents[position])
    return shares


def group(document: Document, partition: str) -> str:
    """What a partition tells a document by: its source (source); else its label, or topic, or source (iid, dirichlet).

    A topic counts without its source: two sources may share one.
    """
    if partition == "source":
        return document.source
    return f"label {document.label}" if document.label is not None else document.topic or document.source


def _nothing_to_tell_apart(partition: str, only: str) -> str:
    if partition == "source":
        return (
            f"partition = 'source' needs 2 sources, but every document is of {only!r}: merge data sets with "
            "zofed data merge, add a source column, or set partition to iid"
        )
    return (
        f"partition = 'dirichlet' needs 2 labels, topics or sources, but every document is of {only!r}: add a label or "
        "topic column, merge data sets with zofed data merge, or set partition to iid"
    )


def _owners_by_dirichlet(groups: tuple[int, ...], clients: int, alpha: float, seed: int) -> np.ndarray:
    """The client of each document, int64 (documents,), from the group of each in the order they are dealt in."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    # Least size 0: with more it draws anew a few times and then gives up, where ours is a rule that always ends.
    # Not shuffled: the documents come in a drawn order already.
    partitioner = DirichletPartitioner(clients, "group", alpha, min_partition_size=0, shuffle=False, seed=seed)
    partitioner.dataset = Dataset.from_dict({"group": groups, "position": range(len(groups))})
    owners = np.empty(len(groups), dtype=np.int64)
    for client in range(clients):
        owners[list(partitioner.load_partition(client)["position"])] = client
    _fill_empty(owners, clients)
    return owners


def _fill_empty(owners: np.ndarray, clients: int) -> None:
    """Give each client without a document the last one of the client that holds most, in place."""
    held = np.bincount(owners, minlength=clients)
    for client in np.flatnonzero(held == 0):
        richest = held.argmax()  # the first of several
        owners[np.flatnonzero(owners == richest)[-1]] = client
        held[richest] -= 1
        held[client] = 1


def _owners_by_source(sources: tuple[int, ...], clients: int) -> np.ndarray:
    """The client of each document, int64 (documents,), from the source of each in the order they are dealt in."""
    of_source = np.array(sources)
    sizes = np.bincount(of_source).tolist()
    owners = np.empty(len(sources), dtype=np.int64)
    for source, holders in enumerate(_holders(sizes, clients)):
        positions = np.flatnonzero(of_source == source)
        owners[positions] = np.resize(holders, len(positions))  # dealt in turns
    return owners


def _holders(sizes: Sequence[int], clients: int) -> list[list[int]]:
    """The clients of each source of `sizes` documents; together they hold at least one document each."""
    if clients <= len(sizes):
        whole: list[list[int]] = [[] for _ in sizes]
        held = [0] * clients
        for source in sorted(range(len(sizes)), key=lambda source: (-sizes[source], source)):
            poorest = held.index(min(held))
            held[poorest] += sizes[source]
            whole[source] = [poorest]
        return whole
    numbers = [1] * len(sizes)
    for _ in range(clients - len(sizes)):
        # Exact fractions: a tie falls to the first source on every machine. Never above one client a document, since
        # where clients are fewer than documents some source has more than one document per client.
        numbers[max(range(len(sizes)), key=lambda source: (Fraction(sizes[source], numbers[source]), -source))] += 1
    starts = np.cumsum([0, *numbers]).tolist()
    return [list(range(start, start + number)) for start, number in zip(starts, numbers, strict=False)]


def own(dataset: str, template: Template | None = None, roles: Roles = (), *, turns: bool = False) -> Reading:
    """What is read of a node's own data set, which its --node-config names: an absolute path or a known name.

    The other arguments are those of `documents.read`. Raises UserError, naming the key, for a relative path, a missing
    file and whatever cannot be read.
    """
    path = Path(os.path.expanduser(dataset))
    known = dataset in KNOWN_NAMES or dataset in CATALOG or subsets.find(dataset) is not None
    if not known and not path.is_absolute():
        raise UserError(
            f"node config dataset = {dataset!r} is neither an absolute path nor a known name: a node runs in a folder "
            f"of Flower's; start it with --node-config 'dataset=\"/...\"', or with one of {', '.join(KNOWN_NAMES)}"
        )
    if not known and not path.exists():
        raise UserError(
            f"node config dataset = {dataset!r}: there is no such file or folder on this node; "
            "put it there, or start the node with another --node-config 'dataset=\"/...\"'"
        )
    try:
        return read(dataset, template, roles, turns=turns)
    except UserError as error:
        raise UserError(f"node config dataset: {error}") from error


# Who holds what


def counts(documents: Iterable[Document], partition: str = "iid") -> dict[str, int]:
    """Documents of each group (see `group`), in the groups' order; of an absolute path as source the last part alone.

    A node may tell them to a server: they say nothing of the texts, nor of the node's folders.
    """
    names = (group(document, partition) for document in documents)
    found = Counter(os.path.basename(name) if os.path.isabs(name) else name for name in names)
    return {name: found[name] for name in in_order(found)}


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by their value: label 2 before label 10; what stands for the rest comes last."""

    def key(name: str) -> tuple[bool, list[str | tuple[int, str]]]:
        # Words and numbers take turns in the split, so that no word is ever compared with a number. A number without
        # its leading zeros is the larger the longer it is: one of thousands of digits is never made an integer.
        parts = re.split(r"([0-9]+)", name)
        numbers = [part.lstrip("0") for part in parts[1::2]]
        ordered: list[str | tuple[int, str]] = [*parts]
        ordered[1::2] = [(len(number), number) for number in numbers]
        return name == OTHERS, ordered

    return sorted(set(names), key=lambda name: (key(name), name))


def largest(counts_by_client: Mapping[int, Counts], limit: int) -> dict[int, dict[str, int]]:
    """The counts with at most `limit` >= 2 groups: where there are more, the smallest are summed as `others`.

    A group of that very name stays apart: the sum is then called `(others)`.
    """
    totals: Counter[str] = Counter()
    for held in counts_by_client.values():
        totals.update(held)
    if len(totals) <= limit:
        return {client: dict(held) for client, held in counts_by_client.items()}
    kept = sorted(totals, key=lambda name: (-totals[name], name))[: limit - 1]
    rest = OTHERS
    while rest in kept:
        rest = f"({rest})"
    return {
        client: {name: held.get(name, 0) for name in kept}
        | {rest: sum(count for name, count in held.items() if name not in kept)}
        for client, held in counts_by_client.items()
    }


def table(
    counts_by_client: Mapping[int, Counts], characters: Mapping[int, int] | None = None
) -> tuple[list[str], list[list[int]]]:
    """Columns and a row a client: its index, documents, characters where they are known, documents of each group."""
    groups = in_order(name for held in counts_by_client.values() for name in held)
    columns = ["client", "documents", *(["characters"] if characters is not None else []), *groups]
    rows = [
        [
            client,
            sum(held.values()),
            *([characters[client]] if characters is not None else []),
            *(held.get(name, 0) for name in groups),
        ]
        for client, held in sorted(counts_by_client.items())
    ]
    return columns, rows


def to_csv(counts_by_client: Mapping[int, Counts], characters: Mapping[int, int] | None = None) -> str:
    """The table as CSV, with a header."""
    columns, rows = table(counts_by_client, characters)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()

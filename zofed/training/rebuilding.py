"""A replica brought through what a run left: to a checkpoint, through records, or through records of random slopes."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from zofed.core import directions, snapshots
from zofed.core.journal import Entry, link
from zofed.core.measure import Update
from zofed.core.records import Guided, Record, Seeded
from zofed.core.replica import Replica
from zofed.runs import checkpoints
from zofed.runs.run_folder import RunFolder


def restore(replica: Replica, entries: Sequence[Entry], folder: RunFolder, latest: int) -> bool:
    """Bring the replica to the newest undamaged checkpoint of this history, no later than round `latest`.

    Returns whether there is one; else the replica stays where it is. A checkpoint is of the round that the journal
    gives its head; one that says another is damaged.
    """
    rounds = {entry.chain.hex(): entry.record.round for entry in entries}
    for path in reversed(folder.checkpoints()):
        found = checkpoints.read(path)
        tensors, facts = found or ({}, {})
        round_ = rounds.get(str(facts.get("head")))
        if found and round_ is None:
            continue  # of another history
        if round_ is None or round_ != facts.get("round") or not snapshots.fits(replica, tensors):
            warnings.warn(f"checkpoint {path} is damaged and left aside for what lies before it", stacklevel=2)
        elif round_ <= latest:
            snapshots.take_over(replica, tensors, round_, bytes.fromhex(facts["head"]))
            return True
    return False


def replay(replica: Replica, records: Iterable[Record], kept: Callable[[bytes], Update | None]) -> None:
    """Move the replica through records that no journal holds. kept: gradient or guide of a digest, where there is one.

    Raises NotKept for a record that needs one which was not kept; the replica stands before that record.
    """

    def linked() -> Iterator[Entry]:
        head = replica.head
        for record in records:
            entry = link(head, record)
            head = entry.chain
            yield entry

    replica.replay(linked(), kept)


def with_random_slopes(records: Iterable[Record], run_seed: int) -> list[Record]:
    """The control: the same records with the sign of every coefficient drawn at random.

    Steps of the same size along the same directions, but uninformed: what remains of a run's gain under it was not
    learnt. Of a guided record the noise alone is so treated, not the guide.
    """

    def flipped(record: Record) -> Record:
        if isinstance(record, Guided):
            return replace(record, seeded=flipped_seeded(record.seeded))
        return flipped_seeded(record) if isinstance(record, Seeded) else record

    def flipped_seeded(record: Seeded) -> Seeded:
        seed = directions.derive_seed("zofed-control", run_seed, record.round)
        coins: list[int] = directions.signs([seed], 0, 0, len(record.coefficients))[0].tolist()
        return replace(record, coefficients=tuple(c * coin for c, coin in zip(record.coefficients, coins, strict=True)))

    return [flipped(record) for record in records]

"""Whatever stands in a file or comes in a message: it is read, or refused by name, soon and in little memory.

With ZOFED_FUZZ_EXAMPLES=1000 each test tries so many inputs; `python -m benchmarks fuzz` tries many more, faster.
"""

import base64
import os
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz, fuzz_targets, mutations
from benchmarks.fuzz_targets import Target
from zofed.core import records
from zofed.core.records import Seeded

EXAMPLES = int(os.environ.get("ZOFED_FUZZ_EXAMPLES", "0"))
NUMBER = st.integers(0, mutations.LARGEST - 1)
EDITS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=mutations.MOST_EDITS)
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)  # to draw, is no fault of a reader
FEW = 8  # inputs of each reader in the fast tests
# The smallest inputs that were met with a traceback once, by their reader.
# A public key whose point is not written in full, which the library cannot read.
POINT = b"ecdsa-sha2-nistp256 " + base64.b64encode(
    b"".join(len(part).to_bytes(4, "big") + part for part in (b"ecdsa-sha2-nistp256", b"nistp256", b"\x02" + bytes(32)))
)
KEYS = (b"queries", b"steps", b"batch-size", b"block-size", b"rounds", b"eval-interval", b"clients")
DEEP = b"[" * 2000
FOUND = (
    ("Rice codes", b"\x01\x3f\x20" + bytes(8)),
    ("records", records.encode(Seeded(1, 0.5, (0,), 1, (0,), 0, 1.0))[:-2] + b"\x3f\x20" + bytes(8)),
    ("Flower's configuration", b"a = " + DEEP),
    ("Flower's configuration", b"superlink = 1"),
    ("info of a subset", DEEP),
    ("info of a subset", b'{"format": "zofed subset 1", "file": "' + b"1" * 300 + b'"}'),
    ("config.json of a model", DEEP),
    ("adapter_config.json", DEEP),
    ("adapter_config.json", b'{"base_model_name_or_path": "a", "peft_type": []}'),
    ("adapter_config.json", b'{"base_model_name_or_path": "a", "peft_type": "LORA", "modules_to_save": 1}'),
    ("typed options", b"\xff"),
    ("run, metrics.csv", b"step,seconds\n0,\n1,?\n"),
    ("run, metrics.csv", b"step\n" + b"9" * 5000 + b"\n"),
    ("table metrics.csv", b"step\n" + b"9" * 5000 + b"\n"),
    ("run, summary.json", b'{"status": "completed", "accuracy": {}}'),
    ("run, summary.json", b'{"status": "completed", "accuracy": 1' + b"0" * 400 + b"}"),
    ("run, summary.json", b'{"eval_loss_end": 1' + b"0" * 400 + b"}"),
    ("members.json", b'{"num-partitions": 2, "nodes": {"1' + b"0" * 5000 + b'": 1}}'),
    ("keys, enrolled", POINT),
    ("sweeps, own.toml", b"scale = 3"),
    ("sweeps, own.toml", b"scale = [1]"),
    ("sweeps, own.toml", b"[scale]\na = 1"),
    ("sweeps, own.toml", b"runs = 1\n[scale.a]\nruns = 2"),
    ("sweeps, own.toml", b"runs = [1]\n[scale.a]\nruns = [1]"),
    ("sweeps, own.toml", b"[[runs]]\nname = ['a']\n[scale.a]\nruns = [{ name = ['a'] }]"),
    ("sweeps, own.toml", b"[tune]\nqueries = { around = 1e300, factor = 1000, most = 99 }"),
    ("sweeps, own.toml", b"[tune]\nepsilon = { around = 1" + b"0" * 400 + b" }"),
    ("sweeps, own.toml", b"[grid]\n" + b"".join(b"%s = [1,2,3,4,5,6,7,8,9]\n" % key for key in KEYS)),
)

# Readers of what one function reads, so that each test has several.
GROUPS = {
    "decoders": ("records", "varint", "Rice codes", "entries", "message", "table of a node", "names of classes"),
    "journals": ("journal",),
    "tensors": ("gradient", "snapshot", "checkpoint", "facts of a", "kept states"),
    "rows": ("rows of", "setting columns", "info of a subset", "partitions"),
    "settings": ("settings", "typed options", "task files", "sweeps", "Flower's"),
    "templates": ("templates", "label words", "chat templates"),
    "models": ("adapter_config.json", "config.json of a model"),
    "keys": ("keys",),
    "runs": ("run,", "table metrics", "table evaluations", "samples", "round log", "members"),
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fuzz_targets.all_of(tmp_path_factory.mktemp("fuzz"))
        for target in found.values():
            fuzz.warm(target)
        yield found


def members(targets: dict[str, Target], group: str) -> list[Target]:
    return [target for name, target in targets.items() if name.startswith(GROUPS[group])]


def test_every_reader_is_in_a_group_and_takes_what_it_begins_from(targets: dict[str, Target]) -> None:
    assert set(targets) == {target.name for group in GROUPS for target in members(targets, group)}
    for target in targets.values():
        for raw in target.corpus:
            assert fuzz.fault_of(target, raw) == ("", True), (target.name, raw[:200])


@pytest.mark.parametrize(("name", "raw"), FOUND, ids=lambda part: part if isinstance(part, str) else repr(part)[:30])
def test_what_was_found_once_is_refused_by_name(targets: dict[str, Target], name: str, raw: bytes) -> None:
    assert fuzz.fault_of(targets[name], raw)[0] == ""


@pytest.mark.parametrize("group", GROUPS)
def test_changed_bytes_are_read_or_refused_by_name(targets: dict[str, Target], group: str) -> None:
    some = members(targets, group)

    @given(st.sampled_from(some), NUMBER, EDITS, st.one_of(st.none(), st.binary(max_size=40)))
    @settings(max_examples=EXAMPLES or FEW * len(some), deadline=None, database=None, suppress_health_check=SLOW)
    def inputs(target: Target, which: int, edits: list[mutations.Edit], alone: bytes | None) -> None:
        begin = target.corpus[which % len(target.corpus)] if alone is None else alone
        raw = mutations.edited(begin, edits, target.corpus, target.words)
        assert fuzz.fault_of(target, raw)[0] == "", (target.name, raw)

    inputs()

"""Who holds which documents: every one at one client, nobody without, the same wherever it is asked."""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.data import documents, encoding, mixing, partitions
from zofed.data.documents import Document, load_documents, shard
from zofed.runs import pictures
from zofed.training import pins
from zofed.training.task import Task

KINDS = ("iid", "dirichlet", "source")


def asked(partition: str, alpha: float = 0.5, seed: int = 0) -> Settings:
    return config.resolve({"partition": partition, "dirichlet-alpha": alpha, "seed": seed})


def dealt(found: Sequence[Document], clients: int, how: Settings) -> list[list[Document]]:
    return partitions.deal(found, clients, how)


def labelled(count: int, labels: int = 4) -> list[Document]:
    return [Document(f"text {number}", "test", number % labels) for number in range(count)]


def complaint(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Document], int]:
    """Documents of two or more sources, some labelled, some with a topic, in any order; and clients for them."""
    marks = draw(
        st.lists(
            st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 3), st.sampled_from(["", "x", "y"])),
            min_size=1,
            max_size=50,
        )
    )
    marks += [("first", 0, ""), ("second", 1, "")]
    found = [Document(f"text {number}", *mark) for number, mark in enumerate(draw(st.permutations(marks)))]
    return found, draw(st.integers(1, len(found)))


@settings(deadline=None, database=None, max_examples=60)
@given(
    corpus=corpora(),
    kind=st.sampled_from(KINDS),
    alpha=st.sampled_from([5e-324, 0.01, 0.5, 1e4, 1.7e308]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_document_has_one_client_and_every_client_a_document(
    corpus: tuple[list[Document], int], kind: str, alpha: float, seed: int
) -> None:
    found, clients = corpus
    shares = dealt(found, clients, asked(kind, alpha, seed))
    assert all(shares)
    assert Counter(document for share in shares for document in share) == Counter(found)
    assert shares == dealt(found, clients, asked(kind, alpha, seed))


@pytest.mark.parametrize("clients", [1, 2, 7, 60])
def test_iid_is_dealt_as_ever(clients: int) -> None:
    found = labelled(60)
    assert dealt(found, clients, asked("iid", seed=5)) == [shard(found, at, clients, 5) for at in range(clients)]


@pytest.mark.parametrize("kind", ["dirichlet", "source"])
def test_a_skewed_share_keeps_the_order_of_one_client_alone(kind: str) -> None:
    found = [Document(f"text {number}", "ab"[number % 2], number % 4) for number in range(60)]
    (order,) = dealt(found, 1, asked(kind, seed=5))
    assert order == shard(found, 0, 1, 5) != found
    for share in dealt(found, 3, asked(kind, seed=5)):
        assert share == sorted(share, key=order.index)


def skew(shares: Sequence[Sequence[Document]], labels: int) -> float:
    """Mean over clients of the total variation distance between their labels and everybody's: 0 is even."""
    counts = np.array([[sum(d.label == label for d in share) for label in range(labels)] for share in shares])
    whole = counts.sum(axis=0) / counts.sum()
    return float(np.mean(np.abs(counts / counts.sum(axis=1, keepdims=True) - whole).sum(axis=1) / 2))


@pytest.mark.slow
def test_a_small_alpha_concentrates_labels_and_a_large_one_evens_them_out() -> None:
    found = labelled(800, 8)
    skews = [
        np.mean([skew(dealt(found, 5, asked("dirichlet", alpha, seed)), 8) for seed in range(5)])
        for alpha in (0.01, 0.5, 1000.0)
    ]
    assert skews[0] > 0.6 and 0.2 < skews[1] < 0.6 and skews[2] < 0.06
    sizes = [len(share) for share in dealt(found, 5, asked("dirichlet", 1000.0))]
    assert max(sizes) - min(sizes) < 40


@pytest.mark.slow
def test_shares_of_a_label_follow_the_dirichlet_distribution() -> None:
    """Mean 1/K and variance (K-1)/(K^2 (K alpha + 1)) of one client's share of one label, over seeds."""
    found, alpha, clients = labelled(400, 2), 0.5, 4
    shares = [
        Counter(d.label for d in dealt(found, clients, asked("dirichlet", alpha, seed))[0])[0] / 200
        for seed in range(150)
    ]
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert abs(np.mean(shares) - 1 / clients) < 4 * (expected / 150) ** 0.5
    assert 0.65 < np.var(shares) / expected < 1.5


GOLDEN = [[2, 3, 18, 6, 22], [5, 21, 9, 13], [23, 12, 0, 4, 8, 15, 11, 1, 20, 17, 16, 14, 19, 7, 10]]


@pytest.mark.slow
def test_the_partition_is_the_same_on_every_machine() -> None:
    """Held against figures, so that another numpy or flwr-datasets that draws otherwise is noticed."""
    found = labelled(24)
    shares = dealt(found, 3, asked("dirichlet", 0.5, 8))
    assert [[found.index(document) for document in share] for share in shares] == GOLDEN
    code = (
        "from zofed import config; from zofed.data import partitions; from zofed.data.documents import Document;"
        "found = [Document(f'text {n}', 'test', n % 4) for n in range(24)];"
        "how = config.resolve({'partition': 'dirichlet', 'seed': 8});"
        "print([[found.index(d) for d in share] for share in partitions.deal(found, 3, how)])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == GOLDEN


def test_a_client_left_empty_gets_the_last_document_of_the_richest() -> None:
    owners = np.array([2, 2, 0, 2, 0, 2, 2])
    partitions._fill_empty(owners, 5)
    assert owners.tolist() == [2, 2, 0, 4, 0, 3, 1]
    owners = np.array([1, 0, 1, 0])
    partitions._fill_empty(owners, 3)
    assert owners.tolist() == [1, 0, 1, 2]


def of_sources(**sizes: int) -> list[Document]:
    return [Document(f"{name} {number}", name) for name, size in sizes.items() for number in range(size)]


def test_sources_stay_whole_until_clients_outnumber_them() -> None:
    found = of_sources(a=50, b=30, c=25, d=4)
    rising = of_sources(a=4, b=25, c=30, d=50)
    held = [partitions.counts(share, "source") for share in dealt(rising, 2, asked("source"))]
    assert held == [{"a": 4, "d": 50}, {"b": 25, "c": 30}]
    held = [partitions.counts(share, "source") for share in dealt(found, 4, asked("source"))]
    assert held == [{"a": 50}, {"b": 30}, {"c": 25}, {"d": 4}]
    held = [partitions.counts(share, "source") for share in dealt(found, 7, asked("source"))]
    assert held == [{"a": 17}, {"a": 17}, {"a": 16}, {"b": 15}, {"b": 15}, {"c": 25}, {"d": 4}]
    assert all(len(share) == 1 for share in dealt(found, len(found), asked("source")))


@settings(deadline=None, database=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8), data=st.data())
def test_a_client_of_many_holds_one_source_in_even_shares(sizes: list[int], data: st.DataObject) -> None:
    found = of_sources(**{f"s{at}": size for at, size in enumerate(sizes)})
    clients = data.draw(st.integers(len(sizes), len(found)))
    held = [partitions.counts(share, "source") for share in dealt(found, clients, asked("source"))]
    assert all(len(one) == 1 for one in held)
    for name in {document.source for document in found}:
        shares = [one[name] for one in held if name in one]
        assert max(shares) - min(shares) <= 1


def test_what_cannot_be_dealt_is_told_in_one_line() -> None:
    plain = [Document(f"text {number}", "prose") for number in range(9)]
    for kind in KINDS:
        found = labelled(9) if kind == "dirichlet" else of_sources(a=4, b=5)
        assert "10 clients are more clients than documents (9)" in complaint(
            lambda k=kind, f=found: dealt(f, 10, asked(k))
        )
    assert "'prose'" in complaint(lambda: dealt(plain, 2, asked("source"))) and dealt(plain, 1, asked("source"))
    assert "data merge" in complaint(lambda: dealt(plain, 2, asked("dirichlet")))
    assert "dirichlet-alpha = 0.0" in complaint(lambda: asked("dirichlet", 0.0))
    assert "partition = 'even'" in complaint(lambda: asked("even"))


def test_dirichlet_goes_by_label_else_topic_else_source(tmp_path: Path) -> None:
    assert partitions.group(Document("t", "s", 3, "x"), "dirichlet") == "label 3"
    assert partitions.group(Document("t", "s", None, "x"), "dirichlet") == "x"
    assert partitions.group(Document("t", "s"), "dirichlet") == "s"
    assert partitions.group(Document("t", "s", 3, "x"), "source") == "s"
    topics = Counter(document.topic for document in load_documents("sample-dclm"))
    assert len(topics) == 8 and topics["astronomy"] == 250
    rows = [{"text": "one", "topic": "x"}, {"text": "two", "topic": None}, {"text": "three"}, {"text": "4", "topic": 5}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [document.topic for document in load_documents(str(file))] == ["x", "", "", "5"]
    mixing.merge(["sample-dclm", str(file)], tmp_path / "merged", 0)
    merged = Counter(document.topic for document in load_documents(str(tmp_path / "merged")))
    assert merged == topics + Counter({"x": 1, "": 2, "5": 1})


# The table and the picture


def test_counts_are_in_order_and_tell_no_path() -> None:
    found = [Document("t", "s", label) for label in (10, 2, 2)] + [Document("t", "/home/someone/notes.txt")]
    assert list(partitions.counts(found).items()) == [("label 2", 2), ("label 10", 1), ("notes.txt", 1)]
    many = {0: {f"label {n}": n + 1 for n in range(12)}, 1: {"label 0": 5}}
    shown = partitions.largest(many, 10)
    assert shown[0] == {f"label {n}": n + 1 for n in range(4, 12)} | {"label 0": 1, "others": 2 + 3 + 4}
    assert sum(shown[1].values()) == 5 and partitions.largest(many, 12) == many
    columns, rows = partitions.table({1: {"b": 2}, 0: {"a": 1, "others": 7}})
    assert columns == ["client", "documents", "a", "b", "others"]
    assert rows == [[0, 8, 1, 0, 7], [1, 2, 0, 2, 0]]


@pytest.mark.slow
def test_the_command_writes_who_holds_what(tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]) -> None:
    where = tmp_path / "new"
    options = ("--clients", 3, "--partition", "dirichlet", "--dirichlet-alpha", 0.1, "--seed", 4, "--out", where)
    status, out, _ = zofed_command("data", "partition", "sample-sst2", *options)
    assert status == 0 and "label 1" in out
    train, _ = documents.split_held_out(load_documents("sample-sst2"), 0.1, 4)
    with (where / "partition.csv").open() as file:
        rows = list(csv.DictReader(file))
    for client, row in enumerate(rows):
        share = dealt(train, 3, asked("dirichlet", 0.1, 4))[client]
        assert int(row["documents"]) == len(share) and f"{len(share):,}" in out
        assert int(row["characters"]) == sum(len(document.text) for document in share)
        assert int(row["label 0"]) == sum(document.label == 0 for document in share)
    assert (where / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert zofed_command("data", "partition", "pydoc", "--clients", 3, "--partition", "source")[0] == 2
    (tmp_path / "file").touch()
    status, _, errors = zofed_command("data", "partition", "pydoc", "--clients", 3, "--out", tmp_path / "file")
    assert status == 2 and "--out" in errors


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 45])
def test_the_picture_takes_any_number_of_clients_and_groups(clients: int, tmp_path: Path) -> None:
    held = {client: {f"label {n}": n * client for n in range(13)} for client in range(clients)}
    assert pictures.partition(held, tmp_path / "a.png").stat().st_size > 1000


# What a task makes of it


def rows_of(examples: encoding.Examples) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for row in examples["input_ids"].tolist())


@pytest.mark.slow
def test_a_task_deals_by_its_setting_and_a_client_splits_off_its_own_held_out_part() -> None:
    values = {"task": "classification", "dataset": "sample-sst2", "partition": "dirichlet", "block-size": 32}
    task = Task.load(config.resolve(values))
    for client in (-1, 3):
        assert "use 0 to 2" in complaint(lambda c=client: task.client_documents(c, 3))
    found = [task.client_documents(client, 3) for client in range(3)]
    assert found == dealt(task.train, 3, task.settings) != dealt(task.train, 3, asked("iid"))
    for client, share in enumerate(found):
        whole = task.shard(client, 3)
        train, none = task.client_parts(client, 3, 0)
        assert none is None and torch.equal(train["input_ids"], whole["input_ids"])
        train, held = task.client_parts(client, 3, 0.25)
        assert held is not None and len(held["labels"]) == round(0.25 * len(share))
        assert rows_of(train) + rows_of(held) == rows_of(whole)
        assert torch.equal(held["input_ids"], (task.client_parts(client, 3, 0.25)[1] or {})["input_ids"])


def test_a_thousand_clients_of_one_process_cost_one_digest_of_the_tokenizer(
    quick: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary of 50,000 it takes half a second, which each of them would wait for."""
    asked_for: list[object] = []
    digest = encoding.tokenizer_digest
    monkeypatch.setattr(
        encoding, "tokenizer_digest", lambda tokenizer: asked_for.append(tokenizer) or digest(tokenizer)
    )
    task = Task.load(quick())
    for client in range(4):
        task.shard(client, 4)
    assert pins.digests(task)["tokenizer"] == digest(task.tokenizer)
    assert len(asked_for) == 1


def test_a_part_of_less_than_one_example_is_told(quick: Callable[..., Settings]) -> None:
    task = Task.load(quick())
    for share in (-0.1, 1.0):
        assert "client-held-out-fraction" in complaint(lambda s=share: task.client_parts(0, 2, s))
    assert "client-held-out-fraction" in complaint(lambda: task.client_parts(3, len(task.train), 0.5))
    long = Task.load(quick(block_size=512))
    assert "held-out part of client 0 of 4" in complaint(lambda: long.client_parts(0, 4, 0.01))
    assert "training part of client 0 of 4" in complaint(lambda: long.client_parts(0, 4, 0.99))
    assert complaint(lambda: long.shard(1, 30)).startswith("client 1 of 30: 2 document(s) give")


def test_a_resumed_run_must_find_the_groups_it_was_dealt_by(tmp_path: Path, quick: Callable[..., Settings]) -> None:
    digests = []
    for topic in ("x", "y"):
        file = tmp_path / f"{topic}.jsonl"
        rows = [{"text": f"a text of some words, number {n}", "topic": topic if n % 2 else "z"} for n in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        iid, by_topic = (pins.digests(Task.load(quick(dataset=str(file), partition=kind))) for kind in KINDS[:2])
        assert "groups" not in iid and {**iid, "groups": by_topic["groups"]} == by_topic
        digests.append(by_topic)
    assert digests[0]["documents"] == digests[1]["documents"] and digests[0]["groups"] != digests[1]["groups"]


# A node's own data


def test_a_node_reads_its_own_file_and_none_of_the_runs(tmp_path: Path, quick: Callable[..., Settings]) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"text": f"note {n} of this node, a few words"}) + "\n" for n in range(20)))
    how = quick(dataset="/only/the/server/has/this.jsonl", partition="source")
    task = Task.own(how, str(file))
    assert Counter(task.client_documents(0, 1)) == Counter(load_documents(str(file)))
    train, held = task.client_parts(0, 1, 0.2)
    assert held is not None and 0 < len(held["labels"]) < len(train["labels"])
    assert task.replica().genesis == Task.load(quick()).replica().genesis
    assert partitions.counts(task.client_documents(0, 1)) == {"own.jsonl": 20}
    assert Task.own(how, "sample-pubmedqa").shard(0, 1)["labels"].shape[1] == 16


def test_a_node_whose_own_file_will_not_do_is_told(tmp_path: Path) -> None:
    how = config.resolve({"task": "classification", "block-size": 32})
    for dataset in (str(tmp_path / "gone.jsonl"), "notes.jsonl", "", "sample-dclm"):
        told = complaint(lambda name=dataset: Task.own(how, name))
        assert told.startswith("node config dataset") and repr(dataset) in told
    (tmp_path / "bad.jsonl").write_text("{")
    assert complaint(lambda: Task.own(how, str(tmp_path / "bad.jsonl"))).startswith("node config dataset: line 1")
    (tmp_path / "one.jsonl").write_text('{"text": "good", "label": 2}\n')
    assert "classes are 0 to 1" in complaint(lambda: Task.own(how, str(tmp_path / "one.jsonl"), 2))
    task = Task.own(how, str(tmp_path / "one.jsonl"), 5)  # a node may lack classes that the run has
    assert task.labels == 5 and task.shard(0, 1)["labels"].tolist() == [2]


@pytest.mark.slow
def test_a_federation_trains_on_a_skewed_partition(
    tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    skewed = ("--clients", 3, "--partition", "dirichlet", "--dirichlet-alpha", 0.1)
    options = (*skewed, "--rounds", 2, "--queries", 2, "--block-size", 16)
    status, _, errors = zofed_command("simulate", *options, "--out", tmp_path / "run")
    assert status == 0, errors
    with (tmp_path / "run" / "clients.csv").open() as file:
        examples = {int(row["client"]): int(row["examples"]) for row in csv.DictReader(file)}
    task = Task.load(config.resolve({"partition": "dirichlet", "dirichlet-alpha": 0.1, "block-size": 16}))
    assert examples == {client: len(task.shard(client, 3)["labels"]) for client in range(3)}

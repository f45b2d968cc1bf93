"""Servers and submitters that want more than they may: a worker refuses or bounds each, and goes on serving."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import save

from zofed import config
from zofed.base.errors import UserError
from zofed.core import gradient_codec, journal, records, snapshots, varint
from zofed.core.records import Dense, Guided, Seeded, Skipped
from zofed.deployment import supernode, warm_worker
from zofed.federated import client, ledger, messages, policy, protocol
from zofed.federated.admission import TEMPLATES
from zofed.federated.flower_internals import Assignment
from zofed.federated.protocol import Answer, Plan
from zofed.federated.wire import Evaluation, Greeting, Introduction

SECONDS, MEGABYTES = 5.0, 200  # of a processor, which a busy machine does not stretch
STRICT = """
folders = ["{folder}"]
hub-models = false
modes = ["zo", "instruct"]
objectives = ["loss"]
scopes = ["full", "norms", "pattern"]
adapters = ["none"]
snapshots = false
smallest-batch = 2
integers-per-message = 64
tokens-per-message = 4096
records-per-message = 1000
megabytes-per-message = 8
seconds-per-message = 60
memory-per-message = 1000
threads = 4
cache-gigabytes = 8
"""


class Node:
    """A worker's own side: a context for each message, the policy in a file, the time and memory that each takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.policy = folder, folder / "policy.toml"
        self.data = folder / "data" / "texts.jsonl"
        self.data.parent.mkdir()
        self.data.write_text(
            "".join(f'{{"text": "the {n} small notes of a clinic, {n * n} words"}}\n' for n in range(60))
        )
        self.run = 0
        self.rule()

    def rule(self, **lines: Any) -> None:
        """Write the policy, with these lines beside or in place of the strict ones."""
        text = STRICT.format(folder=self.data.parent)
        kept = [
            line
            for line in text.splitlines()
            if line.partition(" =")[0] not in {key.replace("_", "-") for key in lines}
        ]
        more = [f"{key.replace('_', '-')} = {value}" for key, value in lines.items()]
        self.policy.write_text("\n".join([*kept, *more]))
        os.utime(self.policy, ns=(time.time_ns(), time.time_ns()))

    def settings(self, **changes: Any) -> dict[str, Any]:
        values = {
            "dataset": str(self.data), "block-size": 16, "batch-size": 2, "queries": 2, "rounds": 6, "device": "cpu",
            "hidden-states-gigabytes": 0.0,
        }  # fmt: skip
        known = config.resolve(values).model_dump(by_alias=True)
        return known | {key.replace("_", "-"): value for key, value in changes.items()}

    def context(self, **changes: Any) -> Context:
        own = {"partition-id": 0, "num-partitions": 1, "policy": str(self.policy)}
        return Context(1 + self.run, 2, own, RecordDict(), self.settings(**changes))

    def tell(self, content: Any, kind: str, **changes: Any) -> tuple[str, Any]:
        """What a worker answers: an error's or an introduction's text, and the content where there is one."""
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        packed = content if isinstance(content, RecordDict) else messages.pack(content)
        message = Message(packed, dst_node_id=2, message_type=kind, ttl=60)
        message.metadata.__dict__["_message_id"] = "1"
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply = warm_worker.reply_to(Assignment(message, self.context(**changes), warm_worker.APP), "cpu")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        assert time.process_time() - began < SECONDS and grown < MEGABYTES
        if reply.has_error():
            return reply.error.reason, None
        if kind == "query.status":
            told = messages.unpack(Introduction, reply.content)
            return told.problem, told
        return "", reply.content

    def plan(self, **changes: Any) -> Plan:
        here = client.session(self.context(), Greeting(b"", 0))
        fresh = here.problem.replica() if here.replica.round else here.replica
        here.replica = fresh
        return replace(protocol.plan_for(fresh, here.genesis, [], client=0), **changes)

    def genesis(self) -> bytes:
        return journal.canonical(journal.outline(client.session(self.context(), Greeting(b"", 0)).replica.genesis))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    client.forget()
    threads = torch.get_num_threads()
    made = Node(tmp_path_factory.mktemp("node"))
    outside = made.folder / "outside.jsonl"
    outside.write_text('{"text": "not for you"}\n')
    (made.data.parent / "link.jsonl").symlink_to(outside)
    os.mkfifo(made.data.parent / "pipe.jsonl")
    os.mkfifo(made.data.parent / "pipe.toml")
    yield made
    client.forget()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def strict(node: Node) -> None:
    node.rule()
    ledger.of.cache_clear()  # what earlier tests of this process were asked


def test_an_honest_server_is_answered(node: Node) -> None:
    problem, told = node.tell(Greeting(node.genesis(), 0), "query.status")
    assert not problem and told.examples > 2
    for _ in range(2):
        problem, content = node.tell(node.plan(), "train.zo")
        assert not problem and len(messages.unpack(Answer, content).coefficients) == 2
    assert node.tell(node.plan(task="end", round=7), "query.digest")[0] == ""


FOLDERS = "is in none of the folders, but this node's policy has folders = "
# What a submitter's settings say, where {data} is the folder that is allowed and {out} the one around it; what the
# worker answers.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a file elsewhere": ({"dataset": "/etc/passwd"}, FOLDERS),
    "a file elsewhere that is not there": ({"dataset": "/etc/no-such-file"}, FOLDERS),
    "the home of a user": ({"dataset": "~/notes.txt"}, FOLDERS),
    "a way out": ({"dataset": "{data}/../outside.jsonl"}, FOLDERS),
    "a link out": ({"dataset": "{data}/link.jsonl"}, FOLDERS),
    "a folder whose name begins alike": ({"dataset": "{data}2/texts.jsonl"}, FOLDERS),
    "a pipe": ({"dataset": "{data}/pipe.jsonl"}, FOLDERS),
    "a device": ({"dataset": "/dev/zero"}, FOLDERS),
    "a process's secrets": ({"dataset": "/proc/self/environ"}, FOLDERS),
    "all files": ({"dataset": "/"}, FOLDERS),
    "data of evaluations": ({"eval-dataset": "/etc/passwd"}, FOLDERS),
    "data of backpropagation": ({"bp-dataset": "/etc/passwd"}, FOLDERS),
    "a model elsewhere": ({"model": "/etc"}, FOLDERS),
    "a tokenizer elsewhere": ({"tokenizer": "/etc"}, FOLDERS),
    "a chat template elsewhere": ({"chat-template": "/etc/passwd"}, FOLDERS),
    "a chat template of an odd name": ({"chat-template": "/etc/{none}.jinja"}, FOLDERS),
    "a task file elsewhere": ({"task": "{out}/policy.toml"}, FOLDERS),
    "a task file that never ends": ({"task": "{data}/pipe.toml"}, FOLDERS),
    "a task of a long name": ({"task": "x" * 100_000}, FOLDERS),
    "a model of the hub": ({"model": "somebody/private"}, "is of the hub, but this node's policy has hub"),
    "updates": ({"mode": "fo"}, "mode = 'fo', but this node's policy has modes = [\"zo\", \"instruct\"]"),
    "another objective": ({"objective": "accuracy"}, "policy has objectives = [\"loss\"]: take loss"),
    "an objective that is code": ({"objective": "os:system"}, "would have clients run code the server names"),
    "another scope": ({"scope": "head"}, "scope = 'head', but this node's policy has scopes ="),
    "another number of blocks": ({"scope": "last-" + "9" * 900}, "but this node's policy has scopes ="),
    "a pattern that backtracks": ({"scope": "^(.+)+Z$"}, "takes more than 1 second"),
    "a pattern that backtracks without a repetition": ({"scope": "(?:.|..)" * 26 + "Z"}, "takes more than 1 second"),
    "a long pattern": ({"scope": "a|" * 2000}, "has 4,000 characters, more than 1,000"),
    "an adapter": ({"adapter": "lora"}, "adapter = 'lora', but this node's policy has adapters = [\"none\"]"),
    "many queries": ({"queries": 16384}, "16,384 slopes or coefficients in a message, but this node's"),
    "many local steps": ({"local-steps": 1024}, "integers-per-message = 64: lower queries, local-steps or steps-per"),
    "many rounds at once": ({"steps-per-message": 1024}, "integers-per-message = 64"),
    "one example": ({"batch-size": 1}, "this node's policy has smallest-batch = 2: raise batch-size"),
    "one example a query": ({"query-batches": "per-query", "query-batch-size": 1}, "query-batch-size = 1, but"),
    "one example of backpropagation": ({"mode": "instruct", "bp-batch-size": 1}, "bp-batch-size = 1, but"),
    "a batch of a million": ({"batch-size": 2**20}, "a message reads 16,777,216 tokens"),
    "a block beyond memory": ({"block-size": 2**61}, "tokens, but this node's policy has tokens-per-message = 4096"),
    "evaluations of one example": ({"client-held-out-fraction": 0.1, "eval-examples": 1}, "eval-examples = 1, but"),
    "a million accumulated": ({"mode": "instruct", "gradient-accumulation": 2**20}, "tokens-per-message = 4096"),
    "a thousand threads": ({"threads": 1024}, "threads = 1024, but this node's policy has threads = 4"),
    "the disk": ({"hidden-states-gigabytes": 1e6}, "policy has cache-gigabytes = 8.0: lower it"),
    "several devices": ({"devices": "cpu,cpu"}, "does not split a federated run"),
    "rounds without end": ({"rounds": 2**63}, "should be less than 2**63"),
    "a step of no size": ({"epsilon": 0.0}, "epsilon = 0.0"),
    "a text for a number": ({"queries": "x" * 100_000}, "queries = 'xxx"),
    "a text with an escape": ({"dataset": "\x1b[2J"}, "holds a line break, a control character"),
    "a setting that is none": ({"shell": "rm"}, "shell"),
    "a setting of a long name": ({"x" * 200_000: 1}, "is longer than 131,072 characters"),
    "a name that takes long to compare": ({"ab" * 60_000: 1}, "abab"),
    "a long text": ({"template": "x" * 200_000}, "a setting of the run, template, is longer than 131,072"),
    "a thousand settings": ({f"s{n}": n for n in range(1000)}, "settings: there are fewer than 500"),
    "a template that loops": (
        {"task": "prompt", "template": "{% for a in text %}{% for b in text %}{% for c in text %}{{ a }}{% endfor %}"
         "{% endfor %}{% endfor %}", "label-words": " a, b"}, "",
    ),
    "a template that grows": ({"task": "instruction", "template": "{{ 'x' * 10**10 }}"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_beyond_the_policy_are_refused(node: Node, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, said = SETTINGS[name]
    places = {"data": str(node.data.parent), "out": str(node.folder)}
    given = {
        key: value.replace("{data}", places["data"]).replace("{out}", places["out"])
        if isinstance(value, str)
        else value
        for key, value in changes.items()
    }
    problem, _ = node.tell(Greeting(b"{}", 0), "query.status", **given)
    assert problem and said in problem, problem
    assert len(problem) < 3000
    if "this node's policy has" in said:
        assert f"refused: {problem}" in capfd.readouterr().err, "the node's own log names it too"


ASKS = "{% if 'clinic' in text %}{{ text }}{% endif %}"


@pytest.mark.parametrize("key", ["template", "calibration-prompt", "label-words", "chat-template"])
def test_templates_that_could_ask_what_is_in_a_row_are_refused(node: Node, key: str) -> None:
    own = {"task": "prompt", "template": "{{ text }} It was", "label-words": " a, b"} | {key: ASKS}
    problem, _ = node.tell(Greeting(b"{}", 0), "query.status", **own)
    assert "policy has templates" not in problem
    node.rule(templates="false")
    problem, _ = node.tell(Greeting(b"{}", 0), "query.status", **own)
    assert "but this node's policy has templates = false: take those of a task of zofed tasks" in problem
    shipped = config.resolve({"task": "sst2", "dataset": str(node.data)}).model_dump(by_alias=True)
    problem, _ = node.tell(Greeting(b"{}", 0), "query.status", **{name: shipped[name] for name in TEMPLATES})
    assert "policy has templates" not in problem


def test_a_model_that_is_there_is_told_as_one_that_is_not(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.folder / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(node.folder)
    for allowed in ("true", "false"):
        node.rule(hub_models=allowed)
        told = {
            node.tell(Greeting(b"{}", 0), "query.status", model=name)[0].replace(name, "")
            for name in ("some/model", "some/other")
        }
        assert len(told) == 1 and not told & {""}


def test_a_refusal_tells_nothing_of_what_lies_on_the_node(node: Node) -> None:
    told = {
        node.tell(Greeting(b"{}", 0), "query.status", dataset=path)[0].replace(path, "")
        for path in ("/etc/passwd", "/et/no")
    }
    assert len(told) == 1


def raw(content: bytes) -> RecordDict:
    return RecordDict({messages.KEY: ConfigRecord({messages.KEY: content})})


def joined(*some: records.Record) -> bytes:
    return b"".join(varint.packed((len(body),)) + body for body in map(records.encode, some))


def bodies(*some: bytes) -> bytes:
    return b"".join(varint.packed((len(body),)) + body for body in some)


def of_no_queries(steps: int) -> bytes:
    """A guided record of so many local steps and no query, which `encode` would write down as it is."""
    body = records.encode(Guided(Seeded(1, 0.5, (0,), 0, (), 0, 1.0), bytes(32), 0.1, 0.5, 0.25, False))
    tail = varint.packed((0, 1, 0, 1, 0))
    assert body.endswith(tail)
    return body[: -len(tail)] + varint.packed((0, steps, 0, 1, 0))


MILLION = bodies(*(bytes([Skipped.kind]) + varint.packed((round_,)) for round_ in range(1, 10**5))) * 10
OF_ONE = Seeded(1, 0.5, (0,), 1, (0,), 0, 1.0)  # whose coefficient's codes are two bytes
UPDATE = gradient_codec.joined([b"x" * 9] * 5)
GREETINGS: dict[str, tuple[Any, str]] = {
    "2^40 classes": (Greeting(b"{}", 2**40), "damaged (1099511627776 classes"),
    "fewer than no class": (Greeting(b"{}", -1), "damaged (-1 classes"),
    "names of other classes": (Greeting(b"{}", 3, '[true, "a"]'), "does not name 3 classes"),
    "names without end": (Greeting(b"{}", 3, "[" * 10**6), "nested deeper than is read"),
    "no genesis": (Greeting(b"\xff\x00", 0), "holds no outline"),
    "a genesis without end": (Greeting(b'{"a":' * 10**5, 0), "holds no outline"),
    "another genesis": (Greeting(b'{"seed": "00000000"}', 0), "it has another seed than the server"),
    "a whole genesis, of an earlier zofed": (Greeting(b'{"seed": 1}', 0), "holds no outline of a genesis"),
    "ten megabytes": (Greeting(b" " * 10**7, 0), "a message of 10.0 MB, but this node's policy has megabytes-per"),
    "noise": (raw(b"\x03" + b"\xff" * 99), "reads the server's messages otherwise"),
    "nothing": (RecordDict(), "reads the server's messages otherwise"),
}
NO_GRADIENTS = "the server sends gradients in a run of mode = zo: such a run has none"
# Plans of a run that has gradients, in a round without one.
WITH_GRADIENTS = ("five updates", "an update that is cut", "an update that is none", "local steps 2^60 x 0 queries")
Made = Callable[[Node], Plan | RecordDict]
PLANS: dict[str, tuple[str, Made, str]] = {
    "10^9 rounds at once": ("train.zo", lambda n: n.plan(steps=10**9), "a plan of 1000000000 rounds at once"),
    "2^62 rounds at once": ("train.zo", lambda n: n.plan(steps=2**62), "rounds at once from round 1 on"),
    "no round": ("train.zo", lambda n: n.plan(steps=0), "a plan of 0 rounds at once"),
    "fewer than none": ("train.zo", lambda n: n.plan(steps=-1), "a plan of -1 rounds at once"),
    "round 0": ("train.zo", lambda n: n.plan(round=0), "a plan of round 0 in a run of rounds = 6"),
    "a round after the last": ("train.zo", lambda n: n.plan(round=7), "a plan of round 7 in a run of rounds = 6"),
    "round 2^62": ("train.zo", lambda n: n.plan(round=2**62), "in a run of rounds = 6"),
    "a round that its records do not reach": ("train.zo", lambda n: n.plan(round=4), "whose records lead to round 0"),
    "a gradient": ("train.guide", lambda n: n.plan(task="gradient"), "asks for 'gradient' in a message train.guide"),
    "a gradient as slopes": ("train.zo", lambda n: n.plan(task="gradient"), "such a round asks for slopes"),
    "an update": ("train.fo", lambda n: n.plan(task="update"), "in round 1 of a run of mode = zo"),
    "coefficients": ("train.zo", lambda n: n.plan(task="coefficients"), "such a round asks for slopes"),
    "guided slopes": ("train.zo", lambda n: n.plan(task="guided", guide=b"x"), "such a round asks for slopes"),
    "a task that is none": ("train.zo", lambda n: n.plan(task="\x1b[2J" * 1000), "such a round asks for slopes"),
    "slopes as a score": ("evaluate.zofed", lambda n: n.plan(), "such a round asks for none or end"),
    "slopes as a digest": ("query.digest", lambda n: n.plan(), "such a round asks for none or end"),
    "10^6 skipped records": ("train.zo", lambda n: n.plan(entries=MILLION), "more than 0 records before round 1: a"),
    "more records than rounds": (
        "train.zo", lambda n: n.plan(entries=joined(*(Skipped(r) for r in range(1, 900)))), "a round has one at most"),
    "local steps 2^60 x 0 queries": (  # in a run that has such records
        "train.zo", lambda n: n.plan(round=2, entries=bodies(of_no_queries(2**60))), ""),
    "a record without an end": ("train.zo", lambda n: n.plan(entries=b"\xff" * 99), "are damaged"),
    "a record of 2^62 bytes": ("train.zo", lambda n: n.plan(entries=varint.packed((2**62,)) + b"x"), "are damaged"),
    "a record of no kind": ("train.zo", lambda n: n.plan(round=2, entries=bodies(b"\x09\x02")), ""),
    "a coefficient beyond 64 bits": (
        "train.zo",
        lambda n: n.plan(round=2, entries=bodies(records.encode(OF_ONE)[:-2] + b"\x3f\x20" + bytes(8))), ""),
    "rounds that fall": (
        "train.zo", lambda n: n.plan(round=4, entries=joined(Skipped(3), Skipped(2), Skipped(1))), ""),
    "skipped rounds that no plan tells": (
        "train.zo", lambda n: n.plan(round=2, entries=joined(Skipped(5))), ""),
    "a step to nowhere": (
        "train.zo", lambda n: n.plan(round=2, entries=joined(Seeded(1, 1e308, (0,), 2, (2**17, -(2**17)), 100, 2.0))),
        ""),
    "five updates": ("train.zo", lambda n: n.plan(round=2, updates=UPDATE), "a plan brings 4 at most"),
    "an update that is cut": ("train.zo", lambda n: n.plan(round=2, updates=b"\xff\xff\xff\xff"), ""),
    "an update that is none": ("train.zo", lambda n: n.plan(round=2, updates=gradient_codec.joined([b"x" * 99])), ""),
    "an update where there are none": ("train.zo", lambda n: n.plan(updates=UPDATE), NO_GRADIENTS),
    "a guide where there is none": ("train.zo", lambda n: n.plan(guide=b"x"), NO_GRADIENTS),
    "a record of an update": (
        "train.zo", lambda n: n.plan(round=2, entries=joined(Dense(1, 1.0, bytes(32)))), NO_GRADIENTS),
    "a record of a guide among others": (
        "train.zo", lambda n: n.plan(round=3, entries=joined(Skipped(1)) + bodies(of_no_queries(1))), NO_GRADIENTS),
    "a snapshot": ("train.zo", lambda n: n.plan(snapshot=b"x"), "policy has snapshots = false"),
    "2^40 classes in a plan": ("train.zo", lambda n: n.plan(classes=2**40), "damaged (1099511627776 classes"),
    "names in a plan": ("train.zo", lambda n: n.plan(classes=2, names="[true]"), "does not name 2 classes"),
    "a plan of ten megabytes": ("train.zo", lambda n: n.plan(guide=bytes(10**7)), "policy has megabytes-per"),
    "other weights": ("train.zo", lambda n: n.plan(probe=b"x" * 8), ""),
    "another history": ("train.zo", lambda n: n.plan(after=b"x" * 16), ""),
    "a plan as an answer": ("train.zo", lambda n: raw(b"\x01" * 20), "are no Plan"),
    "a plan with more behind it": (
        "train.zo", lambda n: raw(messages.pack(n.plan())[messages.KEY][messages.KEY] + b"x"), "follow the last field"),
    "two records": ("train.zo", lambda n: RecordDict({"zofed": ConfigRecord(), "more": ConfigRecord()}), "Malformed"),
    "a message of no kind": ("train.everything", lambda n: n.plan(), ""),
}  # fmt: skip
# Answered, with nothing to use in them: the server is told that this node is elsewhere.
BOUNDED = (
    "other weights", "another history", "local steps 2^60 x 0 queries", "a record of no kind", "rounds that fall",
    "skipped rounds that no plan tells", "a step to nowhere", "an update that is none", "an update that is cut",
    "a coefficient beyond 64 bits",
)  # fmt: skip


@pytest.mark.parametrize("name", GREETINGS)
def test_greetings_that_none_sends_are_refused(node: Node, name: str) -> None:
    content, said = GREETINGS[name]
    problem, _ = node.tell(content, "query.status")
    assert problem and said in problem, problem


@pytest.mark.parametrize("name", PLANS)
def test_plans_beyond_settings_and_policy_are_refused(node: Node, name: str) -> None:
    kind, make, said = PLANS[name]
    sent = make(node)
    problem, content = node.tell(
        sent, kind, **({"mode": "instruct", "bp-interval": 5} if name in WITH_GRADIENTS else {})
    )
    if name in BOUNDED:
        assert isinstance(sent, Plan)
        answer = messages.unpack(Answer, content)
        assert not answer.coefficients and (answer.head or answer.problem or answer.probe != sent.probe)
    else:
        assert problem and said in problem, problem


BEYOND = b'{"round":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}'
SNAPSHOTS: dict[str, Callable[[bytes], bytes]] = {
    "noise": lambda whole: b"x" * 999,
    "a header of 2^62 bytes": lambda whole: (2**62).to_bytes(8, "little") + b"{}",
    "cut": lambda whole: whole[: len(whole) // 2],
    "nothing but a place": lambda whole: save({"round": torch.tensor(3), "head": torch.zeros(16, dtype=torch.uint8)}),
    "two rounds": lambda whole: save({"round": torch.zeros(2), "head": torch.zeros(16, dtype=torch.uint8)}),
    "a head of two rows": lambda whole: save({"round": torch.tensor(3), "head": torch.zeros(2, 8, dtype=torch.uint8)}),
    "a shape beyond 64 bits": lambda whole: len(BEYOND).to_bytes(8, "little") + BEYOND,
    "another model": lambda whole: save(
        {"weight/x": torch.zeros(9), "round": torch.tensor(0), "head": torch.zeros(16, dtype=torch.uint8)}
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_that_are_none_move_nothing(node: Node, name: str) -> None:
    node.rule(snapshots="true")
    plan = node.plan()
    here = client.session(node.context(), Greeting(b"", 0))
    before = here.replica.digest()
    problem, content = node.tell(replace(plan, snapshot=SNAPSHOTS[name](snapshots.taken(here.replica))), "train.zo")
    assert not problem and not messages.unpack(Answer, content).coefficients
    assert here.replica.digest() == before


def test_slopes_of_an_example_and_in_all_run_out_and_a_restart_brings_none_back(node: Node) -> None:
    kept = node.folder / "ledger.json"
    for line in ("slopes-per-example = 8", "slopes-in-all = 8"):
        key, _, limit = line.partition(" = ")
        node.rule(**{key: limit, "ledger": f'"{kept}"'})
        answered = 0
        while not (told := node.tell(node.plan(), "train.zo"))[0]:
            answered += 1
            client.ledger.of.cache_clear()
        assert answered == 4 and line in told[0], told
        kept.unlink()
        client.ledger.of.cache_clear()


def test_workers_that_share_a_ledger_count_together(tmp_path: Path) -> None:
    kept = tmp_path / "ledger.json"
    own = policy.DEFAULT.model_copy(update={"slopes_per_example": 9})
    first, second = ledger.Ledger.read(kept), ledger.Ledger.read(kept)
    first.spend("some", 3, [(np.array([0, 2]), 4)], 4, own)
    second.spend("some", 3, [(np.array([2]), 4)], 4, own)
    with pytest.raises(policy.Refused, match="one example would have been read for 12 slopes"):
        first.spend("some", 3, [(np.array([2]), 4)], 4, own)
    first.spend("some", 5, [(np.array([4]), 4)], 4, own)  # of an app whose data have grown
    found = ledger.Ledger.read(kept)
    assert found.in_all == 12 and found.examples["some"].tolist() == [4, 0, 8, 0, 4]


def test_a_ledger_that_cannot_be_kept_is_told_before_a_run_and_in_it(node: Node) -> None:
    lost = node.folder / "no-such-folder" / "ledger.json"
    node.rule(slopes_in_all=8, ledger=f'"{lost}"')
    with pytest.raises(UserError, match=f"ledger {lost} cannot be written .*: have the policy name a file"):
        supernode.node_config(0, 1, "", "zo", str(node.policy))
    problem, _ = node.tell(node.plan(), "train.zo")
    assert f"ledger {lost} cannot be written" in problem


def evaluations(node: Node, plan: Plan, **changes: Any) -> list[Evaluation | str]:
    """What a node answers servers that ask for its held-out part's scores, until it refuses; four at most."""
    found: list[Evaluation | str] = []
    while len(found) < 4 and not (found and isinstance(found[-1], str)):
        problem, content = node.tell(plan, "evaluate.zofed", **{"client-held-out-fraction": 0.1} | changes)
        found.append(problem or messages.unpack(Evaluation, content))
    return found


def test_losses_are_withheld_bounded_and_counted_as_slopes_are(node: Node) -> None:
    plan = node.plan(task="none")
    told = evaluations(node, plan)
    assert all(isinstance(one, Evaluation) and one.loss > 0 and one.examples >= 2 for one in told) and len(told) == 4
    withheld = evaluations(node, plan, **{"losses-withheld": True})
    assert all(isinstance(one, Evaluation) and one.examples == 0 for one in withheld)
    node.rule(slopes_per_example=3)
    assert [isinstance(one, Evaluation) for one in evaluations(node, plan)] == [True, True, True, False]
    node.rule(smallest_batch=20)
    (refused,) = evaluations(node, plan, **{"batch-size": 20, "eval-examples": 20})
    assert "examples to evaluate on, but this node's policy has smallest-batch = 20" in str(refused)


def test_a_run_that_lasts_too_long_is_refused(node: Node) -> None:
    node.rule(minutes_per_run="0.000001")
    node.run += 1
    node.tell(node.plan(), "train.zo")
    assert "minutes, but this node's policy has minutes-per-run" in node.tell(node.plan(), "train.zo")[0]


def test_a_message_that_takes_too_long_or_too_much_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for work, line, limit in (
        (lambda: time.sleep(60), "seconds-per-message", 0.2),
        (lambda: bytearray(10**9), "memory-per-message", 200.0),
        (lambda: torch.zeros(10**9), "memory-per-message", 200.0),
    ):
        for details in ("true", "false"):
            node.rule(**{line: str(limit), "details": details})
            monkeypatch.setattr(client.ClientSession, "catch_up", lambda *_, work=work: work())
            assert f"{line} = {limit}" in node.tell(node.plan(), "train.zo")[0]
            assert client._session.cache_info().currsize == 0
    monkeypatch.undo()
    node.rule()
    assert node.tell(node.plan(), "train.zo")[0] == ""


def test_what_the_data_are_like_is_told_where_the_policy_says_so(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    for details, said in (("true", "column"), ("false", client.WITHHELD)):
        node.rule(details=details)
        problem, _ = node.tell(Greeting(b"{}", 0), "query.status", columns="text=diagnosis")
        assert said in problem
        assert ("diagnosis" in capfd.readouterr().err) is (details == "false"), "what is withheld is in the node's log"
    problem, told = node.tell(Greeting(node.genesis(), 0), "query.status")
    assert not problem and told.counts == ""


def test_a_worker_lets_go_of_a_run_that_is_over_or_silent(node: Node) -> None:
    node.rule(idle_seconds="50")
    node.tell(node.plan(), "train.zo")
    assert not client.forget_after(49.0)
    node.tell(node.plan(task="end", round=1), "query.digest")
    assert client.forget_after(2.0) and not client.forget_after(1e9)
    assert client._session.cache_info().currsize == 0
    node.tell(node.plan(), "train.zo")
    assert client.forget_after(51.0)

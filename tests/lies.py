"""What one lying client of a federation says in place of the truth, each with what it is refused for."""

import gzip
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from exchanges import odd_contents
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from zofed import __version__
from zofed.core import gradient_codec, records, rice, varint
from zofed.federated import messages
from zofed.federated.local_grid import CLIENT_FAILED
from zofed.federated.protocol import Answer, Contribution, Plan
from zofed.federated.wire import Evaluation, Final, Introduction

QUERIES = 2
ALL_BUT_GREETINGS = ("train", "query.digest", "evaluate")
ESCAPES = "\x1b[2J\x1b]0;owned\x07\nround 9/9  loss 0.0000 \ud800 $\\frac$ "
ON_WIRE = ESCAPES.replace("\ud800", "")  # Flower's wire and ours take no half of a pair
Forge = Callable[[Plan, random.Random], RecordDict]


@dataclass
class Asked:
    """A question to the liar. true: what an honest client would answer. others: true answers of another client to
    the questions of its kind, so far; own: of the liar's, held back."""

    message: Message
    true: Callable[[], RecordDict]
    others: list[RecordDict]
    own: list[RecordDict]
    chance: random.Random

    @property
    def kind(self) -> str:
        return self.message.metadata.message_type

    @property
    def plan(self) -> Plan:
        return messages.unpack(Plan, self.message.content)


Tell = Callable[[Asked], RecordDict | Error]


@dataclass(frozen=True)
class Lie:
    """tell: the answer to each question of a kind that begins with `to`, or one of these; all others are
    answered truly.

    results: what becomes of its answers in the rounds, one or more each, as clients.csv has it. None of them: it is not
    taken in. said: what is printed. plan: of the run (`PLANS`), with these settings beside. delay: seconds until the
    answer is there. times: that it comes.
    """

    tell: Tell
    results: tuple[str, ...] = ()
    said: str = ""
    to: str | tuple[str, ...] = "train"
    plan: str = "slopes"
    settings: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    times: int = 1

    @property
    def is_heard(self) -> bool:
        """Whether what it measured counts, for it lies in words alone."""
        return "used" in self.results


# What a run asks, by name. Each round of `gradients` asks for a gradient alone, each of `guided` for one and then for
# slopes along directions that the gradient shapes; `checked` compares weights and scores in every round.
PLANS: dict[str, dict[str, Any]] = {
    "slopes": {"queries": QUERIES},
    "shared": {"queries": QUERIES, "direction-seeds": "shared", "aggregation": "trimmed"},
    "coefficients": {"mode": "subspace", "queries": QUERIES, "subspace-size": 4, "subspace-interval": 1},
    "updates": {"mode": "fo", "max-update-norm": 100.0},
    "gradients": {"mode": "calibrate", "queries": QUERIES, "bp-interval": 1},
    "guided": {"mode": "instruct", "queries": QUERIES, "bp-interval": 1},
    "checked": {"queries": QUERIES, "client-held-out-fraction": 0.3, "weight-check-interval": 1, "eval-interval": 1},
}


def failure(reason: str, code: int = CLIENT_FAILED) -> Error:
    """What Flower answers for a client that failed."""
    return Error(code=code, reason=reason)


def raw(content: bytes) -> RecordDict:
    """A message that lies as zofed's do, of any bytes."""
    return RecordDict({messages.KEY: ConfigRecord({messages.KEY: content})})


def bytes_of(content: RecordDict) -> bytes:
    return bytes(content[messages.KEY][messages.KEY])  # type: ignore[index, arg-type]


# --- answers of integers ---


def answer(plan: Plan, **changes: Any) -> RecordDict:
    """What an honest client might say, but for the changes."""
    good = Answer(
        plan.genesis, plan.round, plan.attempt, plan.client, b"", plan.probe, "", 5.0, 10, 1, (99, -98), -7
    )  # fmt: skip
    return messages.pack(replace(good, **changes))


def with_huge_number(plan: Plan, chance: random.Random) -> RecordDict:
    """More bits than any integer of a message has, where the exponent stands."""
    tail = varint.packed((-7,))
    return raw(bytes_of(answer(plan))[: -len(tail)] + varint.packed((2 ** chance.randint(64, 300),)))


def with_integers(plan: Plan, count: int) -> RecordDict:
    """So many zeros, a bit each; to make a tuple of them first would be the memory that the server must not take."""
    zeros = (2**count - 1 << -count % 8).to_bytes(-(-count // 8), "big")
    return with_codes(plan, count, b"\x00" + zeros)


def with_codes(plan: Plan, count: int, codes: bytes) -> RecordDict:
    """So many integers, in these codes."""
    three = varint.packed((3,)) + rice.packed((7, 7, 7))
    whole = bytes_of(answer(plan, coefficients=(7, 7, 7)))
    at = whole.rindex(three)
    return raw(whole[:at] + varint.packed((count,)) + codes + whole[at + len(three) :])


def odd(plan: Plan, chance: random.Random) -> RecordDict:
    return chance.choice(list(odd_contents().values()))


def fail() -> RecordDict:
    raise RuntimeError("out of memory")


# One answer each, refused for one reason whatever chance chooses.
SLOPES: dict[str, tuple[str, Forge]] = {
    "no number for a loss": ("not_finite", lambda p, c: answer(p, loss=c.choice([math.nan, math.inf, -math.inf]))),
    "a loss of 1e30": ("out_of_range", lambda p, c: answer(p, loss=c.choice([1e30, -1e30, 1.1e6]))),
    "a loss beyond float32": ("not_finite", lambda p, c: answer(p, loss=1e300)),
    "slopes of 1e30": ("out_of_range", lambda p, c: answer(p, coefficients=(1, c.choice([1, -1])), exponent=99)),
    "an exponent of no float": ("out_of_range", lambda p, c: answer(p, exponent=c.choice([101, 1024, -451, 2**62]))),
    "numbers too large": ("out_of_range", lambda p, c: answer(p, coefficients=(0, c.choice([1, -1]) << 18))),
    "numbers of 64 bits": ("out_of_range", lambda p, c: answer(p, coefficients=(-(2**63), 2**63 - 1))),
    "none": ("wrong_length", lambda p, c: answer(p, coefficients=())),
    "too few or many": ("wrong_length", lambda p, c: answer(p, coefficients=(1,) * c.choice([1, 3, 999]))),
    "no examples": ("out_of_range", lambda p, c: answer(p, examples=c.choice([0, -1, -(2**60)]))),
    "more examples than there are": ("out_of_range", lambda p, c: answer(p, examples=2 ** c.randint(41, 62))),
    "another run": ("wrong_genesis", lambda p, c: answer(p, genesis=c.randbytes(c.choice([0, 3, 5, 16])))),
    "an older round": ("wrong_round", lambda p, c: answer(p, round=p.round - c.randint(1, 9))),
    "a later round": ("wrong_round", lambda p, c: answer(p, round=c.choice([p.round + 1, 2**63 - 1]))),
    "an earlier attempt": ("stale_attempt", lambda p, c: answer(p, attempt=p.attempt - 1)),
    "another client": ("wrong_client", lambda p, c: answer(p, client=c.choice([0, p.client + 1, -1, 2**62]))),
    "no such history": ("behind", lambda p, c: answer(p, head=c.randbytes(c.randint(1, 40)))),
    "at the start": ("behind", lambda p, c: answer(p, head=p.after)),
    "other weights": ("desync", lambda p, c: answer(p, probe=c.randbytes(c.choice([0, 7, 9])))),
    "a made-up reason": ("malformed", lambda p, c: answer(p, problem=c.choice(["late", "used", "x" * 999]))),
    "a loss that diverged": ("not_finite", lambda p, c: answer(p, problem="not_finite", coefficients=())),
    "cut": ("malformed", lambda p, c: raw(bytes_of(answer(p))[: c.randint(0, 20)])),
    "longer": ("malformed", lambda p, c: raw(bytes_of(answer(p)) + c.randbytes(c.randint(1, 99)))),
    "another kind": ("malformed", lambda p, c: messages.pack(Final(p.client, "", b""))),
    "noise": ("malformed", lambda p, c: raw(bytes([7]) + c.randbytes(99))),
    "an integer of any size": ("malformed", with_huge_number),
    "a coefficient beyond 64 bits": ("malformed", lambda p, c: with_codes(p, 1, b"\x3f\x20" + bytes(8))),
    "other records": ("malformed", odd),
    "an exception": ("error", lambda p, c: fail()),
}  # fmt: skip
IMPLAUSIBLE = ("implausible", lambda p, c: answer(p, coefficients=(2**17, c.choice([1, -1]) << 17), exponent=9))

MEGABYTES = 20 * 10**6  # of a message that is far too long
TOO_LONG = "and what is asked for has 65,554 at most"


def truly(asked: Asked) -> RecordDict:
    """The truth, which then comes late, or more than once."""
    return asked.true()


def by_turns(first: Tell, *more: Tell) -> Tell:
    """Each lie in its turn, then the first again."""
    turn = [first, *more]

    def tell(asked: Asked) -> RecordDict | Error:
        turn.append(turn.pop(0))
        return turn[-1](asked)

    return tell


def replayed(asked: Asked) -> RecordDict | Error:
    """The true answer of the round before, in place of that of this one; there is none in the first."""
    asked.own.append(asked.true())
    return asked.own[-2] if len(asked.own) > 1 else failure("nothing to replay yet")


def beside(asked: Asked, more: Any) -> RecordDict:
    """The true answer, and another record in the same message."""
    return RecordDict({messages.KEY: asked.true()[messages.KEY], "arrays": more})


def arrays(megabytes: int = 4) -> ArrayRecord:
    return ArrayRecord([np.zeros(megabytes * 250_000, dtype=np.float32)])


def of_integers() -> Iterator[tuple[str, Lie]]:
    for name, (reason, forge) in SLOPES.items():
        yield name, Lie(lambda a, forge=forge: forge(a.plan, a.chance), (reason,))
    yield from {
        "slopes out of all proportion": Lie(lambda a: IMPLAUSIBLE[1](a.plan, a.chance), ("implausible",)),
        "slopes next to nothing": Lie(
            lambda a: answer(a.plan, coefficients=(1, -1), exponent=records.SMALLEST_EXPONENT), ("implausible",)),
        "shared slopes out of all proportion": Lie(
            lambda a: IMPLAUSIBLE[1](a.plan, a.chance), ("implausible",), plan="shared"),
        "the steepest that a loss allows": Lie(
            lambda a: answer(a.plan, coefficients=(2**17, 1), exponent=14), ("implausible",)),
        "its answer of the round before": Lie(replayed, ("error", "wrong_round"), said="nothing to replay yet"),
        "the answer of another client": Lie(lambda a: a.others[-1], ("wrong_client",)),
        "its greeting": Lie(lambda a: messages.pack(Introduction(2, 3, 9, "zo", b"", "", "", "")), ("malformed",)),
        "the plan itself": Lie(lambda a: a.message.content, ("malformed",)),
        "text with escapes": Lie(lambda a: answer(a.plan, problem=ON_WIRE * 900), ("malformed",)),
        "text that is no text": Lie(
            lambda a: raw(bytes_of(answer(a.plan, problem="####")).replace(b"####", b"\xff\xfe\xfd\xfc")),
            ("malformed",), "field problem of Answer is cut or no str"),
        "millions of integers": Lie(
            lambda a: with_integers(a.plan, 8 * MEGABYTES), ("malformed",), f"reply: 20,000,033 bytes, {TOO_LONG}"),
        "a few more integers than are read": Lie(
            lambda a: with_integers(a.plan, 70_000), ("malformed",), "70000 integers where 65538 are read at most"),
        "megabytes of text": Lie(
            lambda a: answer(a.plan, problem="x" * MEGABYTES + "\U0001f600"), ("malformed",), TOO_LONG),
        "megabytes of history": Lie(lambda a: answer(a.plan, head=bytes(MEGABYTES)), ("malformed",), TOO_LONG),
        "megabytes of a probe": Lie(lambda a: answer(a.plan, probe=bytes(MEGABYTES)), ("malformed",), TOO_LONG),
        "a long history of its own": Lie(lambda a: answer(a.plan, head=bytes(60_000)), ("behind",)),
        "an array beside": Lie(
            lambda a: beside(a, arrays()), ("malformed",), "expected one record 'zofed', got ['zofed', 'arrays']"),
        "an array in its place": Lie(lambda a: RecordDict({messages.KEY: arrays()}), ("malformed",), "got ['zofed']"),
        "a number beside": Lie(lambda a: beside(a, MetricRecord({"loss": math.nan})), ("malformed",)),
        "ten thousand records": Lie(
            lambda a: RecordDict({f"record {n}": ConfigRecord() for n in range(10_000)}), ("malformed",)),
        "a record of a long name": Lie(
            lambda a: RecordDict({ON_WIRE * 10**5: ConfigRecord()}), ("malformed",), r"got ['\x1b[2J"),
        "a field of a long name": Lie(
            lambda a: RecordDict({messages.KEY: ConfigRecord({ON_WIRE * 10**5: b""})}), ("malformed",), r"got ['\x1b["),
        "a failure in megabytes": Lie(lambda a: failure("x" * MEGABYTES), ("error",), "client 2: xxx"),
        "a failure with escapes": Lie(
            lambda a: failure(ESCAPES * 99), ("error",), r"client 2: round 9/9 loss 0.0000 \ud800"),
        "a failure without a word": Lie(lambda a: failure(" \n\x00\n "), ("error",), r"client 2: \x00"),
        "a failure of an odd code": Lie(lambda a: failure("", -(2**31)), ("error",), "client 2: no reason given"),
        "no answer": Lie(truly, ("late",), settings={"round-timeout": 0.2}, delay=math.inf),
        "no answer to anything but the greeting": Lie(
            truly, ("late",), to=ALL_BUT_GREETINGS, plan="checked", settings={"round-timeout": 0.1}, delay=math.inf),
        "an answer after the deadline": Lie(truly, ("late",), settings={"round-timeout": 0.2}, delay=0.3),
        "an answer just before it, each time": Lie(truly, ("used",), settings={"round-timeout": 2.0}, delay=0.2),
        "an answer that comes twice": Lie(truly, ("used",), times=2),
        "a refused answer that comes a thousand times": Lie(
            lambda a: answer(a.plan, loss=math.nan), ("not_finite",), times=1000),
        "none, round after round": Lie(
            truly, ("late",), "client 2 failed 5 rounds in a row: not asked for 20 rounds",
            settings={"rounds": 8, "round-timeout": 0.1}, delay=math.inf),
        "another excuse each time": Lie(
            by_turns(
                lambda a: answer(a.plan, head=bytes(16)), lambda a: answer(a.plan, probe=b""),
                lambda a: answer(a.plan, problem="not_finite"), lambda a: failure("a disk is full"),
            ),
            ("behind", "desync", "not_finite", "error"), "a disk is full", settings={"rounds": 4}),
        "other weights, ever again": Lie(
            lambda a: answer(a.plan, probe=b""), ("desync",), "client 2 failed 5 rounds in a row",
            settings={"rounds": 8}),
        "a wait of 2^62 ms": Lie(lambda a: said_of(a, Answer, milliseconds=2**62), ("used",)),
        "a wait of less than none": Lie(lambda a: said_of(a, Answer, milliseconds=-(2**62)), ("used",)),
        "slopes for coefficients": Lie(lambda a: answer(a.plan), ("wrong_length",), plan="coefficients"),
        "coefficients without end": Lie(
            lambda a: with_integers(a.plan, 8 * MEGABYTES), ("malformed",), "at most", plan="coefficients"),
        "coefficients out of all proportion": Lie(
            lambda a: answer(a.plan, coefficients=(1, -1, 1, 1), exponent=18), ("implausible",), plan="coefficients"),
        "a gradient and no slopes along it": Lie(
            lambda a: failure("no") if a.kind == "train.guide" else answer(a.plan, coefficients=()),
            ("error", "wrong_length"), plan="guided"),
        "slopes in place of a gradient": Lie(
            lambda a: answer(a.plan, loss=math.nan), ("malformed", "not_finite"), "are no Contribution", plan="guided"),
        "a gradient in place of slopes": Lie(
            lambda a: update(a, {}, loss=math.nan), ("not_finite", "malformed"), "are no Answer", plan="guided"),
        "implausible slopes along a refused gradient": Lie(
            lambda a: update(a, {}) if a.kind == "train.guide" else IMPLAUSIBLE[1](a.plan, a.chance),
            ("wrong_tensors", "implausible"), plan="guided"),
    }.items()  # fmt: skip


# --- updates and gradients ---


def said_of(asked: Asked, kind: type[Any], **changes: Any) -> RecordDict:
    """The true answer, but for the changes."""
    return messages.pack(replace(messages.unpack(kind, asked.true(), MEGABYTES), **changes))


def update(asked: Asked, tensors: dict[str, Any] | bytes, **changes: Any) -> RecordDict:
    """A contribution with these tensors, or bytes."""
    plan, encoded = asked.plan, tensors if isinstance(tensors, bytes) else gradient_codec.whole(tensors)
    good = Contribution(plan.genesis, plan.round, plan.attempt, plan.client, b"", plan.probe, "", 5.0, 10, 1, encoded)
    return messages.pack(replace(good, **changes))


def described(tensors: dict[str, tuple[str, tuple[int, ...]]], data: bytes = b"") -> bytes:
    """Bytes that describe tensors by type and shape as safetensors do, whatever lies behind."""
    header = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]} for name, (kind, shape) in tensors.items()
    }
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data


def factors(shapes: gradient_codec.Shapes, rank: int, exponent: int = -20) -> bytes:
    """An update of matrices as factors of this rank, all else whole, each worth 2^exponent."""
    parts: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            parts[f"left:{name}"], parts[f"right:{name}"] = torch.ones(shape[0], rank), torch.ones(rank, shape[1])
        else:
            parts[f"whole:{name}"] = torch.ones(shape)
    integers = {key: tensor.to(torch.int16) for key, tensor in parts.items()}
    return gradient_codec.save(integers | {"exponents": torch.full((len(parts),), exponent, dtype=torch.int16)})


Tensors = dict[str, torch.Tensor]


def of_tensors(shapes: gradient_codec.Shapes) -> Iterator[tuple[str, Lie]]:
    """Those of a model of these shapes, the first of which is a matrix."""
    first, *_ = shapes
    size = 4 * sum(math.prod(shape) for shape in shapes.values())

    def sound() -> Tensors:
        return {name: torch.full(shape, 1e-3) for name, shape in shapes.items()}

    def put(value: float) -> Tensors:
        changed = sound()
        changed[first].view(-1)[-1] = value
        return changed

    def kind_of(dtype: torch.dtype) -> bytes:
        return gradient_codec.save({f"float:{name}": tensor.to(dtype) for name, tensor in sound().items()})

    limit = 2**16 + gradient_codec.largest(shapes)
    too_long = f"and what is asked for has {limit:,} at most"
    made: dict[str, tuple[str, Callable[[], Tensors | bytes], str]] = {
        "no tensors": ("wrong_tensors", dict, ""),
        "a tensor too few": ("wrong_tensors", lambda: dict(list(sound().items())[1:]), ""),
        "a tensor too many": ("wrong_tensors", lambda: sound() | {"more": torch.ones(2)}, ""),
        "a tensor of another shape": ("wrong_tensors", lambda: sound() | {first: torch.ones(3)}, ""),
        "a transposed tensor": ("wrong_tensors", lambda: sound() | {first: torch.ones(shapes[first][::-1])}, ""),
        "a tensor of other words": ("wrong_tensors", lambda: {ON_WIRE + name: t for name, t in sound().items()}, ""),
        "a tensor of a long name": ("wrong_tensors", lambda: sound() | {"x" * 60_000: torch.ones(1)}, ""),
        "float64": ("wrong_tensors", lambda: kind_of(torch.float64), ""),
        "float16": ("wrong_tensors", lambda: kind_of(torch.float16), ""),
        "integers": ("wrong_tensors", lambda: kind_of(torch.int32), ""),
        "truths": ("wrong_tensors", lambda: kind_of(torch.bool), ""),
        "no bytes": ("wrong_tensors", lambda: b"", ""),
        "words": ("wrong_tensors", lambda: b"no tensors at all", ""),
        "a header of 2^64": ("wrong_tensors", lambda: b"\xff" * 4000, ""),
        "an update that is cut": ("wrong_tensors", lambda: gradient_codec.whole(sound())[:-1], ""),
        "an update with more behind it": ("wrong_tensors", lambda: gradient_codec.whole(sound()) + b"x", ""),
        "tensors in the same bytes": (
            "wrong_tensors", lambda: described({f"float:{n}": ("F32", s) for n, s in shapes.items()}, bytes(size)), ""),
        "a tensor twice": (
            "wrong_tensors", lambda: gradient_codec.whole(sound()).replace(b'"float:', b'"float:x', 1), ""),
        "a shape beyond any memory": (
            "wrong_tensors", lambda: described({f"float:{first}": ("F32", (2**40, 2**40, 0))}), ""),
        "a shape beyond 64 bits": (
            "wrong_tensors", lambda: described({f"float:{first}": ("F32", (0, 2**40, 2**40))}), ""),
        "a type of no number": ("wrong_tensors", lambda: described({f"float:{first}": ("F4", (2,))}, b"x"), ""),
        "ten thousand tensors": (
            "malformed", lambda: described({f"float:{n}": ("F32", (0,)) for n in range(10_000)}), too_long),
        "hundreds of tensors": (
            "wrong_tensors", lambda: described({f"float:{n}": ("F32", (0,)) for n in range(900)}), ""),
        "megabytes of zeros": ("malformed", lambda: bytes(MEGABYTES), too_long),
        "zeros that unpack to a gigabyte": ("wrong_tensors", lambda: gzip.compress(gzip.compress(bytes(10**7))), ""),
        "factors of a rank beyond its matrix": ("wrong_tensors", lambda: factors(shapes, 500), ""),
        "factors of no float": ("not_finite", lambda: factors(shapes, 1, 140), ""),
        "factors of an exponent that is none": ("wrong_tensors", lambda: factors(shapes, 1, 141), ""),
        "no number": ("not_finite", lambda: put(math.nan), ""),
        "infinity": ("not_finite", lambda: put(-math.inf), ""),
    }  # fmt: skip
    for plan in ("updates", "gradients"):
        for name, (reason, make, said) in made.items():
            tell = lambda a, make=make: update(a, make())  # noqa: E731
            yield f"{plan}, {name}", Lie(tell, (reason,), said, plan=plan)
    heads: dict[str, tuple[str, dict[str, Any]]] = {
        "no number for a loss": ("not_finite", {"loss": math.nan}),
        "a loss of -1e30": ("out_of_range", {"loss": -1e30}),
        "examples beyond all": ("out_of_range", {"examples": 2**63 - 1}),
        "an older round": ("wrong_round", {"round": 0}),
        "another attempt": ("stale_attempt", {"attempt": 7}),
        "another client": ("wrong_client", {"client": 0}),
        "another run": ("wrong_genesis", {"genesis": b"else"}),
        "other weights": ("desync", {"probe": b"else"}),
        "a history of its own": ("behind", {"head": bytes(16)}),
        "a made-up reason": ("malformed", {"problem": ON_WIRE}),
    }
    for name, (reason, changes) in heads.items():
        tell = lambda a, changes=changes: update(a, sound(), **changes)  # noqa: E731
        yield f"updates, {name}", Lie(tell, (reason,), plan="updates")
    yield from {
        "updates, too large": Lie(lambda a: update(a, put(1e30)), ("too_large",), plan="updates"),
        "updates, its own of the round before": Lie(replayed, ("error", "wrong_round"), plan="updates"),
        "updates, that of another client": Lie(lambda a: a.others[-1], ("wrong_client",), plan="updates"),
        "updates, a node that says it makes none": Lie(
            lambda a: said_of(a, Introduction, mode="zo"), (), "clients [2] say mode = zo", to="query.status",
            plan="updates"),
        "gradients, too large for their squares": Lie(
            lambda a: update(a, {name: torch.full(shape, 3e38) for name, shape in shapes.items()}), ("out_of_range",),
            plan="gradients"),
    }.items()  # fmt: skip


# --- greetings ---


def table(count: int, name: str = "label") -> str:
    return json.dumps({f"{name} {n}": n for n in range(count)})


def of_greetings() -> Iterator[tuple[str, Lie]]:
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "an index below 0": ({"client": -1}, "partition-id = -1 of num-partitions = 3: give each of N nodes"),
        "an index that no record holds": ({"client": 2**32, "clients": 2**33}, "partition-id = 4294967296 of"),
        "an index beyond its number": ({"client": 3}, "partition-id = 3 of num-partitions = 3"),
        "more nodes than a record can name": ({"clients": 2**62}, "num-partitions = 4611686018427387904"),
        "the place of another": ({"client": 0}, "two nodes say they are client 0: give each its own partition-id"),
        "a place among others": ({"clients": 4}, "client 2 says num-partitions = 4, others 3: give all nodes the same"),
        "no examples": ({"examples": 0}, "says it holds 0 examples: give it 1 to"),
        "fewer than none": ({"examples": -(2**63)}, "says it holds -9223372036854775808 examples"),
        "examples beyond all": ({"examples": 2**63 - 1}, "says it holds 9223372036854775807 examples"),
        "another mode": ({"mode": "\x1b[2J"}, r"says mode = '\x1b[2J': it runs another zofed"),
        "no mode": ({"mode": ""}, "says mode = '': it runs another zofed"),
        "a mode of several kilobytes": ({"mode": "fo" * 9000}, "says mode = 'fofofo"),
        "another head": ({"head": b"abc"}, "a head of 3 bytes, not 16"),
        "a head of several kilobytes": ({"head": bytes(60_000)}, "a head of 60000 bytes, not 16"),
        "a problem with escapes": ({"problem": ON_WIRE * 200}, r"client 2: \x1b[2J\x1b]0;owned\x07 round 9/9"),
        "a problem and an index that is none": ({"problem": "no", "client": 2**62}, "a node: no"),
        "another version": ({"code": ON_WIRE}, r"runs zofed \x1b[2J\x1b]0;owned\x07, the server"),
        "no version": ({"code": ""}, f"client 2 runs zofed of no version, the server {__version__}"),
        "megabytes of a table": ({"counts": "x" * MEGABYTES}, "bytes, and what is asked for has 1,114,112 at most"),
        "megabytes of a problem": ({"problem": "x" * MEGABYTES}, "bytes, and what is asked for has 1,114,112 at most"),
    }
    for name, (changes, said) in refused.items():
        tell = lambda a, changes=changes: said_of(a, Introduction, **changes)  # noqa: E731
        yield name, Lie(tell, (), said, to="query.status")
    taken: dict[str, tuple[dict[str, Any], str]] = {
        "names of several kilobytes": ({"counts": json.dumps({"n" * 5000: 3, "\x1b[31m\ud800": 4, "": 1})}, ""),
        "a thousand names": ({"counts": table(3000)}, ""),
        "a table that never ends": ({"counts": "[" * 10**6}, "client 2: what it says it holds is no table of names"),
        "a table of fewer than none": ({"counts": '{"a": -1}'}, "client 2: what it says it holds is no table"),
        "a table of 400 digits": (
            {"counts": '{"a": 1' + "0" * 400 + "}"},
            "client 2: what it says it holds is no table",
        ),
        "a table longer than is read": ({"counts": table(41_500, "x" * 9)}, "or a longer one than is read"),
        "a head of no run": ({"head": b"x" * 16}, ""),
        "other code of the same version": ({"code": f"{__version__} {'c' * 9000} x"}, "client 2 runs other code than"),
        "no word of its code": ({"code": __version__}, "(of no name, here "),
    }
    for name, (changes, said) in taken.items():
        tell = lambda a, changes=changes: said_of(a, Introduction, **changes)  # noqa: E731
        yield name, Lie(tell, ("used",), said, to="query.status")
    other = "runs another zofed ("
    words: dict[str, tuple[Tell, str]] = {
        "a failure": (lambda a: failure(ESCAPES), r"could not be asked who it is (round 9/9"),
        "a failure in megabytes": (lambda a: failure("\x00" * MEGABYTES), r"could not be asked who it is (\x00"),
        "an answer": (lambda a: messages.pack(Answer(b"", 1, 0, 2, b"", b"", "", 1.0, 1, 1, (), 0)), other),
        "the server's own word": (lambda a: a.message.content, other),
        "nothing": (lambda a: RecordDict(), f"{other}expected one record 'zofed', got []"),
        "an array": (lambda a: RecordDict({messages.KEY: arrays()}), other),
        "one that is cut": (lambda a: raw(bytes_of(a.true())[:-3]), f"{other}field code of Introduction is cut"),
    }
    for name, (tell, said) in words.items():
        yield f"in its place {name}", Lie(tell, (), said, to="query.status")
    silent = {"round-timeout": 0.2}
    yield (
        "in its place no word",
        Lie(truly, (), "could not be asked who it is (no answer)", "query.status", settings=silent, delay=math.inf),
    )


# --- digests and evaluations ---


def of_ends() -> Iterator[tuple[str, Lie]]:
    digests: dict[str, tuple[Tell, str]] = {
        "another digest": (lambda a: said_of(a, Final, digest="0" * 64), "client 2 ends with 00000"),
        "a digest in capitals": (lambda a: upper(a), "do not trust its machine"),
        "a digest of several kilobytes": (
            lambda a: said_of(a, Final, digest=ON_WIRE * 999),
            r"client 2 ends with \x1b[2J",
        ),
        "a digest of megabytes": (lambda a: said_of(a, Final, digest="0" * MEGABYTES), "has 65,536 at most"),
        "the digest of another": (lambda a: said_of(a, Final, client=0), "client 2: it answers as client 0"),
        "the digest of nobody": (lambda a: said_of(a, Final, client=2**62), "it answers as client 4611686018427387904"),
        "no digest": (lambda a: said_of(a, Final, digest=""), "2 of 3 clients end with the server's weights"),
        "a digest of no history": (lambda a: said_of(a, Final, digest="", head=bytes(60_000)), "2 of 3 clients"),
        "a score for a digest": (lambda a: messages.pack(Evaluation(2, b"", 1.0, 1)), "are no Final"),
        "a failure for a digest": (lambda a: failure(ESCAPES), r"client 2: round 9/9"),
    }
    for name, (tell, said) in digests.items():
        yield name, Lie(tell, ("used",), said, "query.digest", "checked")
    scores: dict[str, tuple[dict[str, Any], str]] = {
        "a score of no number": ({"loss": math.nan}, "client 2: a loss of nan on"),
        "a score of infinity": ({"loss": math.inf}, "client 2: a loss of inf on"),
        "a score of -1e30": ({"loss": -1e30}, "cannot be: left out of the scores"),
        "a score of fewer than none": ({"examples": -1}, "on -1 examples cannot be"),
        "a score of more than all": ({"examples": 2**63 - 1}, "on 9223372036854775807 examples cannot be"),
        "a score of none": ({"examples": 0}, ""),
        "the score of another": ({"client": 1}, "client 2: it answers as client 1"),
        "a score of a long history": ({"head": bytes(60_000)}, ""),
        "metrics by the thousand": ({"metrics": table(5000)}, "client 2: its metrics are no table of 1 to 64 names"),
        "metrics of no number": ({"metrics": '{"a": NaN}'}, "client 2: its metrics are no table"),
        "metrics of 400 digits": ({"metrics": '{"a": 1' + "0" * 400 + "}"}, "client 2: its metrics are no table"),
        "metrics without end": ({"metrics": '{"a":' * 10**5}, "client 2: its metrics are no table"),
        "metrics with escapes": ({"metrics": json.dumps({ESCAPES * 9: 1e300})}, ""),
        "metrics by the names of the table": ({"metrics": '{"loss": 1e9, "accuracy": 7}'}, ""),
        "megabytes of metrics": ({"metrics": "x" * MEGABYTES}, "has 1,114,112 at most"),
    }
    for name, (changes, said) in scores.items():
        tell = lambda a, changes=changes: said_of(a, Evaluation, **changes)  # noqa: E731
        yield name, Lie(tell, ("used",), said, "evaluate", "checked")
    yield (
        "a digest for a score",
        Lie(lambda a: messages.pack(Final(2, "", b"")), ("used",), "are no Evaluation", "evaluate", "checked"),
    )
    yield (
        "a failure for a score",
        Lie(lambda a: failure(ESCAPES), ("used",), "client 2: round 9/9", "evaluate", "checked"),
    )
    yield "no score and no digest", Lie(
        lambda a: a.true() if a.kind in ("query.status", "train.zo") else failure("no"), ("used",), "client 2: no", "",
        "checked",
    )  # fmt: skip


def upper(asked: Asked) -> RecordDict:
    return said_of(asked, Final, digest=messages.unpack(Final, asked.true()).digest.upper())


# --- all at once ---


def everything(asked: Asked) -> RecordDict | Error:
    """Odd words at the greeting, then no number wherever one is due, and another digest at the end."""
    if asked.kind == "query.status":
        return said_of(asked, Introduction, counts="[" * 10**5, head=b"x" * 16, code=f"{__version__} {ON_WIRE}")
    if asked.kind == "query.digest":
        return messages.pack(Final(2, ON_WIRE, bytes(60_000)))
    if asked.kind.startswith("evaluate"):
        return messages.pack(Evaluation(2, b"", math.nan, -1, "[" * 10**5))
    return answer(asked.plan, loss=math.nan, head=b"")


COMBINED = {
    "all at once": Lie(everything, ("not_finite",), "client 2 ends with", "", "checked"),
    "greets as another, then with megabytes": Lie(
        by_turns(
            lambda a: said_of(a, Introduction, client=1), lambda a: said_of(a, Introduction, problem="x" * MEGABYTES)
        ), (), "two nodes say they are client 1", "query.status",
    ),
}  # fmt: skip


def all_of(shapes: gradient_codec.Shapes) -> dict[str, Lie]:
    """Every lie by its name, to a federation that trains a model of these shapes."""
    parts = {
        "answers": of_integers(), "tensors": of_tensors(shapes), "greetings": of_greetings(), "ends": of_ends(),
        "combined": iter(COMBINED.items()),
    }  # fmt: skip
    return {f"{part}: {name}": lie for part, told in parts.items() for name, lie in told}

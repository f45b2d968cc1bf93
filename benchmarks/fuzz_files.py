"""Readers of the files that people and runs write, each a function of a file's bytes; rows for `fuzz_targets`."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings, task_files
from zofed.core.journal import Journal
from zofed.core.records import Seeded
from zofed.data import columns, documents, partitions, readers, sandbox, subsets
from zofed.data.chat_templates import template_text
from zofed.data.columns import Wanted
from zofed.data.documents import Document
from zofed.data.label_words import label_words
from zofed.data.templates import Template
from zofed.deployment import connections, key_checks, key_files, keys
from zofed.experiments import arms, listing, sweep_file
from zofed.federated.places import Places
from zofed.models import adapter_files
from zofed.models.saved import Saved
from zofed.models.spec import ModelSpec
from zofed.runs import repair, round_log, run_result, samples, tables
from zofed.runs.round_log import RoundLog
from zofed.runs.run_folder import EVALUATIONS, METRICS, RunFolder
from zofed.runs.tables import Table

Row = tuple[str, Callable[[bytes], object], tuple[bytes, ...], tuple[type[Exception], ...], tuple[bytes, ...]]

NAMED = (UserError,)
_JSON_WORDS = (b'"a": ', b"[1, 2]", b'{"a": 1}', b'"\\ud800"', b"1e400")
_SETTINGS = b"""mode = "zo"
steps = 20
learning-rate = 0.01
dataset = "sample-sst2"
task = "prompt"
template = "{{ text }} It was"
label-words = " terrible, great"
directions = "rank2"
clients = 3
partition = "dirichlet"
"""
_SWEEP = b"""about = "which rate"
seeds = [0, 1]
with-controls = true
[base]
mode = "instruct"
steps = 4
[grid]
queries = [4, 8]
[[runs]]
name = "sgd"
optimizer = "sgd"
[[runs]]
name = "adamw"
optimizer = "adamw"
learning-rate = [0.1, 0.2]
[tune]
epsilon = { around = 0.001, factor = 3, most = 5 }
[[leave-out]]
queries = 8
optimizer = "adamw"
[scale.laptop]
seeds = [0]
[scale.paper]
seeds = [0, 1, 2]
base = { steps = 100 }
"""
_TEMPLATES = (
    b"{{ text }} It was", b"{% for a in choices %}{{ loop.index }}. {{ a }}\n{% endfor %}{{ text | trim | upper }}",
    b"{% if label == 1 %}{{ text[:10] ~ n * 2 }}{% else %}{{ text.replace('a', 'b') }}{% endif %}",
    b"{{ text | replace('a', 'aa') | default('x') }} {{ choices | join(', ') }} {{ d['k'] }} {{ n + 1 // 2 % 3 }}",
    b"{{ (choices | list | map('upper') | select | sort | unique | first) if choices is defined else text }}",
)  # fmt: skip
_TEMPLATE_WORDS = (
    *b"text choices n d * ** // ~ | .format .__class__ .split('') .count('') .partition('') [::0] * 99999".split(),
    *b"|sort |join |string |map('int') |abs |dictsort |float |min |title |default |batch(1) '%99999999d'".split(),
    *b"|map(attribute='a.b') |sort(attribute='a') |unique(attribute='0')".split(),
    *(b"{% for x in text %}", b"{% endfor %}", b"{% if text %}", b"{% endif %}", b"{% set a = 1 %}", b"9" * 500),
    *(b" is divisibleby 0", b" is in 3", b" < d", b" // 0", b" % n"),
)
ROW: dict[str, Any] = {"text": "a bad film", "choices": ["yes", "no"], "label": 1, "n": 7, "d": {"k": 1.5, "j": None}}


def all_of(scratch: Path) -> Iterator[Row]:
    """(name, reader, inputs to begin from, errors it may raise, words of the format) of each."""
    warnings.simplefilter("ignore")
    yield from _rows(scratch)
    yield from _settings(scratch)
    yield from _templates(scratch)
    yield from _models(scratch)
    yield from _keys(scratch)
    yield from _of_a_run(scratch / "run")


def _text(raw: bytes) -> str:
    """As Python hands on what was typed."""
    return raw.decode("utf-8", "surrogateescape")


def _file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """`read` once the bytes stand at `path`."""
    path.parent.mkdir(exist_ok=True, parents=True)

    def of(raw: bytes) -> object:
        path.write_bytes(raw)
        return read()

    return of


# --- data ---


def _rows(scratch: Path) -> Iterator[Row]:
    lines = [{"text": "a good film", "label": 1, "source": "web"}, {"text": "bad", "label": 0, "source": "tv"}]
    turns = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    history = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]}
    choices = {"question": "Where?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    found: dict[str, tuple[bytes, ...]] = {
        ".jsonl": tuple(_jsonl(rows) for rows in (lines, [turns], [history], [choices])),
        ".json": (json.dumps(lines).encode(), json.dumps({"17": lines[0]}).encode()),
        ".csv": (b'text,label\n"a, good\nfilm",1\nbad,0\n',),
        ".tsv": (b"sentence\tlabel\na good film\t1\nbad\t0\n", b"good\t1\n"),
        ".txt": (b"One.\n\nTwo\nlines.\n", b"__label__a good\n__label__b bad\n__label__a x\n"),
        ".label": (b"DESC:manner How ?\nNUM:count How many ?\n",),
        ".parquet": (_parquet(lines, scratch),),
    }
    for suffix, corpus in found.items():
        path = scratch / f"rows{suffix}"

        def read(path: Path = path) -> None:
            """As a run reads them: by recognition, by a template, by roles, as conversations."""
            template = Template("{{ text }}? {{ label }}")
            ways: tuple[dict[str, Any], ...] = (
                {},
                {"template": template},
                {"turns": True},
                {"roles": (("label", ("source",)),)},
            )
            for arguments in ways:
                try:
                    documents.read(str(path), **arguments)
                except UserError:
                    continue

        yield f"rows of {suffix}", _file(path, read), corpus, NAMED, _JSON_WORDS

    def roles(raw: bytes) -> None:
        columns.roles_of(_text(raw))

    yield "setting columns", roles, (b"text=review, candidates=a+b",), NAMED, ()
    folder = scratch / "subset"
    part = folder / "part"
    folder.mkdir()
    part.write_bytes(_jsonl(lines))
    subsets.publish(folder, part, {"classes": ["no", "yes"]})
    read_subset = _file(folder / "info.json", lambda: list(readers.rows_of_folder(folder, Wanted()).found))
    yield "info of a subset", read_subset, ((folder / "info.json").read_bytes(),), NAMED, _JSON_WORDS
    yield "partitions", _dealt, tuple(bytes([kind, 2, 7, 1]) + bytes(range(40)) for kind in range(3)), NAMED, ()


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[Any], scratch: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    path = scratch / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def _dealt(raw: bytes) -> None:
    """Documents of some labels and sources dealt out, every one to one client."""
    head, rest = (raw + bytes(4))[:4], raw[4:][:200]
    kind = ("iid", "dirichlet", "source")[head[0] % 3]
    clients, alpha = 1 + head[1] % 8, 10.0 ** (head[2] % 9 - 6)
    some = [Document(f"{at}", f"source {code % 5}", code % 3 if head[3] % 2 else None) for at, code in enumerate(rest)]
    settings = Settings.model_validate({"partition": kind, "dirichlet-alpha": alpha, "seed": head[3]})
    parts = partitions.deal(some, clients, settings)
    assert sorted(one.text for part in parts for one in part) == sorted(one.text for one in some)
    assert all(parts)
    partitions.to_csv({client: partitions.counts(part, kind) for client, part in enumerate(parts)})


# --- settings, tasks, sweeps, templates ---


def _settings(scratch: Path) -> Iterator[Row]:
    odd = (b"[a]", b"[[a]]", b"a.b = 1", b"1979-05-27", b"'''", b'"""')
    words = (*(key.encode() for key in config.SETTINGS), *odd)

    def settings() -> None:
        for run in ("", config.CENTRAL, config.FEDERATED):
            try:
                config.asked_for(scratch / "settings.toml", {}, run)
            except UserError:
                continue

    yield "settings", _file(scratch / "settings.toml", settings), (_SETTINGS,), NAMED, words

    def typed(raw: bytes) -> None:
        pairs = (line.partition("=") for line in _text(raw).split("\n") if line)
        config.asked_for(None, {key: value for key, _, value in pairs}, "")

    yield "typed options", typed, (b"mode=zo\nsteps=20\nlearning-rate=1e-3\nmomentum=0.9",), NAMED, words
    task = scratch / "tasks" / "own.toml"
    text = b'about = "one"\nlicence = "MIT"\n' + b"".join(_SETTINGS.splitlines(keepends=True)[3:7])
    yield "task files", _file(task, lambda: task_files.load(str(task))), (text,), NAMED, words
    scales = (b"[scale]", b"scale = 3", b"[[scale]]", b"[scale.a.b]")
    parts = (*words, *(part.encode() for part in sweep_file.PARTS), *scales)
    for name in ("own.toml", sweep_file.COPY):
        path = scratch / "sweeps" / name
        yield f"sweeps, {name}", _file(path, lambda path=path: sweep_file.read(path)), (_SWEEP,), NAMED, parts
    path = scratch / "flower" / "config.toml"
    own = b'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:9093"\n'
    yield "Flower's configuration", _file(path, lambda: connections.read(path)), (own,), NAMED, ()


def _templates(scratch: Path) -> Iterator[Row]:
    def template(raw: bytes) -> None:
        found = Template(_text(raw))
        found.render(ROW, "row 1")

    yield "templates", template, _TEMPLATES, NAMED, _TEMPLATE_WORDS
    yield "label words", lambda raw: label_words(_text(raw)).of(("no", "yes")), _LABEL_WORDS, NAMED, _JSON_WORDS
    path = scratch / "chat.jinja"
    chat = _file(path, lambda: template_text(str(path)))
    yield "chat templates", chat, (b"{% for m in messages %}{{ m.content }}{% endfor %}",), NAMED, ()
    assert sandbox.SECONDS > 1  # a rendering may take longer than other readers: `fuzz` knows the target by its name


_LABEL_WORDS = (b" bad, great", b'["no", "yes"]', b'{"no": " a", "yes": " b"}', b"{{ a }},{{ b }}", b"no= a, yes= b")


# --- models ---


def _models(scratch: Path) -> Iterator[Row]:
    lora = scratch / "adapter" / adapter_files.CONFIG
    peft = {"base_model_name_or_path": "gpt2", "peft_type": "LORA", "r": 4, "lora_alpha": 8, "revision": None}
    peft |= {"target_modules": ["c_attn"], "modules_to_save": ["score"], "rank_pattern": {}, "task_type": "CAUSAL_LM"}
    raw = json.dumps(peft).encode()
    yield "adapter_config.json", _file(lora, lambda: adapter_files.folder_of(lora.parent)), (raw,), NAMED, _JSON_WORDS
    path = scratch / "model" / "config.json"
    saved = Saved(path.parent, "model", "copy it again", "copy it again")

    def model() -> None:
        ModelSpec(str(path.parent)).class_names()
        saved.any_config({})

    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}
    gpt2 |= {"id2label": {"0": "no", "1": "yes"}, "architectures": ["GPT2ForSequenceClassification"]}
    raw = json.dumps(gpt2).encode()
    yield "config.json of a model", _file(path, model), (raw,), NAMED, _JSON_WORDS


# --- keys ---


def _keys(scratch: Path) -> Iterator[Row]:
    folder = scratch / "keys"
    keys.make(folder, ["localhost"], ["one", "two"])
    marks = (b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n", b"-----BEGIN PRIVATE KEY-----\n")

    def server(name: str) -> Callable[[bytes], object]:
        path = folder / name
        return _file(path, lambda: key_checks.check_server(folder, ["localhost"]))

    for name in (key_files.CA, key_files.SERVER, key_files.SERVER_KEY):
        raw = (folder / name).read_bytes()
        yield f"keys, {name}", _restoring(folder / name, server(name)), (raw,), NAMED, marks
    one = folder / key_files.ENROLLED / "one.pub"
    enrolled = _restoring(one, _file(one, lambda: key_files.enrolled(folder)))
    yield "keys, enrolled", enrolled, (one.read_bytes(),), NAMED, marks
    private = folder / key_files.NODES / "one.key"
    node = _restoring(private, _file(private, lambda: key_checks.check_node(private, folder / key_files.CA)))
    yield "keys, node", node, (private.read_bytes(),), NAMED, marks


def _restoring(path: Path, read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """`read`, after which the file is as it was, for the next."""
    whole = path.read_bytes()

    def of(raw: bytes) -> object:
        try:
            return read(raw)
        finally:
            path.write_bytes(whole)

    return of


# --- what a run wrote, and a person or a disk changed ---


def _of_a_run(out: Path) -> Iterator[Row]:
    folder = _run(out)

    def looked_at() -> None:
        """As `zofed list`, `plot`, `report` and `journal repair` look at a run."""
        listing.listed(out)
        arms.grouped(arms.collect([out])[0])
        result = run_result.read(out)
        _ = result.score, result.end, result.best, result.is_cut, folder.way, folder.nodes
        found = repair.survey(folder.journal)
        repair.lost(folder, found, 1)
        repair.last_to_go_on_from(folder, found)

    names = ("settings.toml", "summary.json", "inputs.json", "metrics.csv", "rounds.log", "journal.zofed")
    for name in names:
        raw = (out / name).read_bytes()
        yield f"run, {name}", _restoring(out / name, _file(out / name, looked_at)), (raw,), NAMED, _JSON_WORDS
    for name, columns_of in (("metrics.csv", METRICS), ("evaluations.csv", EVALUATIONS)):
        path = out / name

        def table(path: Path = path, columns_of: tuple[str, ...] = columns_of) -> None:
            tables.sure_rows(path, columns_of, lambda _, row: row["step"] != "7")
            tables.cut(path, "step", 1)

        yield f"table {name}", _restoring(path, _file(path, table)), (path.read_bytes(),), (), ()
    path = out / samples.SAMPLES
    line = b'{"step": 1, "prompt": "p", "answer": "a", "wanted": "w"}\n'
    yield samples.SAMPLES, _file(path, lambda: samples.keep(out, {1})), (line * 2,), (), _JSON_WORDS
    log = out / "log" / round_log.NAME
    read_log = _file(log, lambda: (RoundLog(log.parent).close(), round_log.keep(log.parent, 1)))

    def sealed(raw: bytes) -> object:
        facts = raw.split(b"\n")
        return read_log(b"".join(b"\n%08x %s" % (round_log.zlib.crc32(fact), fact) for fact in facts) + b"\n")

    facts = b'{"round": 1, "now": {"asked": 2}, "rows": []}\n{"round": 1, "scores": [{"client": 0}]}'
    yield "round log with fitting checksums", sealed, (facts,), (), _JSON_WORDS
    members = out / "log" / "members.json"
    places = b'{"num-partitions": 2, "nodes": {"0": 123, "1": 456}}'
    yield "members.json", _file(members, lambda: Places.read(members.parent)), (places,), (), _JSON_WORDS


def _run(out: Path) -> RunFolder:
    """A folder such as a run of two rounds leaves."""
    settings = config.resolve({"mode": "zo", "steps": 2, "dataset": "sample-sst2"})
    folder = RunFolder.create(out, settings, {"dataset": "ab" * 32}, nodes=2)
    with Journal.create(folder.journal, {"seed": 0}) as opened:
        opened.append_all([Seeded(round_, 0.5, (0,), 2, (1, -5), -20, 4.0) for round_ in (1, 2)])
    with Table(out / "metrics.csv", METRICS) as table:
        row = {"timestamp": "2026-05-04T09:30:00Z", "mode": "zo", "optimizer": "sgd", "loss": 2.5, "eval_loss": 2.25}
        row |= {"forward_equivalents": 8, "seconds": 0.5, "tokens": 64}
        for step in (0, 1, 2):
            table.write(row | {"step": step})
    with Table(out / "evaluations.csv", EVALUATIONS) as table:
        table.write({"step": 2, "source": "", "loss": 2.25, "accuracy": 0.5, "metrics": "{}"})
    losses = {"eval_loss_start": 3.0, "eval_loss_end": 2.25}
    folder.write_summary({"status": "completed", "accuracy": 0.5, "forward_equivalents": 8, **losses})
    log = RoundLog(out)
    log.write({"round": 1, "now": {"asked": 2}}, {"round": 2, "now": {"asked": 0}})
    log.close()
    return folder

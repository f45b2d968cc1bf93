"""Every mistake a person can make ends in one line with the value and a remedy, status 2, and nothing touched."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from zofed.base.errors import UserError
from zofed.commands import cli
from zofed.core import journal, soundness
from zofed.data import encoding
from zofed.runs.tables import read_table

Zofed = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

SMALL = ["--batch-size", "2", "--block-size", "16", "--eval-examples", "4", "--save-interval", "2", "--device", "cpu"]


def small(command: str, mode: str = "zo") -> list[str]:
    """Options that have an effect on this command in this mode and make it take a second."""
    length = ["--rounds", "2"] if command == "simulate" else ["--steps", "3"]
    return [*SMALL, *length, *([] if mode == "fo" else ["--queries", "2"])]


@pytest.fixture
def zofed(zofed_command: Zofed) -> Zofed:
    return zofed_command


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(zofed: Zofed, tmp_path: Path) -> Refused:
    """Run a command that must be refused in the house's manner and touch no file; its message."""

    def run(*arguments: object, value: str, remedy: str) -> str:
        before = bytes_below(tmp_path)
        status, _, errors = zofed(*arguments)
        assert status == 2, errors
        assert "Traceback" not in errors
        lines = errors.splitlines()
        assert len(lines) == 1, errors
        assert value in errors
        assert remedy in errors
        assert bytes_below(tmp_path) == before
        return errors

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs to spoil copies of: zeroth order, first order with and without checkpoints, federated."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.jsonl"
    documents = encoding.load_documents("sample-dclm")[:20]
    corpus.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents), encoding="utf-8")
    commands = {
        "zo": ["train"],
        "other": ["train", "--seed", "1"],
        "fo": ["train", "--mode", "fo"],
        "bare": ["train", "--mode", "fo", "--save-interval", "0"],
        "federated": ["simulate", "--clients", "2"],
    }
    for name, (command, *options) in commands.items():
        out = ["--dataset", str(corpus), "--out", str(folder / name)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys, "argv", ["zofed", command, *small(command, "fo" if "fo" in options else "zo"), *options, *out]
            )
            cli.app(standalone_mode=False)
    return {name: folder / name for name in commands}


@pytest.fixture
def copy_of(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(runs[name], tmp_path / name))


# --- settings -------------------------------------------------------------------------------------------------------

WRONG_VALUES = [
    ("learning-rate", "-1", "greater than or equal to 0"),
    ("learning-rate", "nan", "finite"),
    ("learning-rate", "inf", "finite"),
    ("learning-rate", "fast", "valid number"),
    ("learning-rate", "", "valid number"),
    ("queries", "0", "greater than or equal to 1"),
    ("queries", "16385", "less than or equal to 16384"),
    ("queries", "1.5", "valid integer"),
    ("perturbations-per-pass", "0", "greater than or equal to 1"),
    ("perturbations-per-pass", "4097", "less than or equal to 4096"),
    ("directions", "rank0", "match pattern"),
    ("directions", "rank100", "match pattern"),
    ("direction-scale", "rank1", "'equal' or 'rms'"),
    ("finite-difference", "central", "'two-point' or 'one-sided'"),
    ("forward-dtype", "float16", "'weights' or 'bfloat16'"),
    ("steps", "0", "greater than or equal to 1"),
    ("rounds", "-2", "greater than or equal to 1"),
    ("clients", "-1", "greater than or equal to 0"),
    ("batch-size", "0", "greater than or equal to 1"),
    ("block-size", "1", "greater than or equal to 2"),
    ("epsilon", "0", "greater than or equal to 0.000001"),
    ("held-out-fraction", "1", "less than 1"),
    ("momentum", "1", "less than 1"),
    ("seed", str(2**63), "less than"),
    ("threads", "0", "greater than or equal to 1"),
    ("device", "tpu", "cuda"),
    ("dtype", "float16", "'bfloat16'"),
    ("mode", "zf", "'calibrate' or 'subspace'"),
    ("optimizer", "adam", "'adamw'"),
    ("controls", "maybe", "valid boolean"),
    ("learning-rate", "1e400", "finite"),
    ("epochs", "1e308", "less than or equal to 1000000000"),
    ("clip-slopes", "1e308", "less than or equal to 1000000000"),
    ("batch-size", str(2**62), "less than or equal to 1048576"),
    ("bp-batch-size", str(2**62), "less than or equal to 1048576"),
    ("steps", "\u0663", "valid integer"),
    ("steps", str(10**30), "less than 2**63"),
    ("max-tokens", str(2**63), "less than 2**63"),
    ("model", "gpt2\n", "white space"),
    ("dataset", " sample-dclm", "white space"),
    ("out", "tiny\r", "white space"),
    ("out", " ", "white space"),
    ("scope", "a\tb", "control character"),
    ("tokenizer", "two\nlines", "line break"),
    ("bp-dataset", os.fsdecode(b"caf\xe9"), "no UTF-8"),
    ("eval-dataset", "\x1b[31m", "control character"),
]


@pytest.mark.first(40)
@pytest.mark.parametrize("command", ["train", "simulate"])
@pytest.mark.parametrize(("key", "value", "limit"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_limit_and_default(
    refused: Refused, tmp_path: Path, command: str, key: str, value: str, limit: str
) -> None:
    message = refused(command, "--out", tmp_path / "run", f"--{key}", value, value=repr(value), remedy="the default is")
    assert message.startswith(f"zofed: {key} = ") and limit in message


@pytest.mark.parametrize(
    "command", ["eval {}", "generate {} hello", "journal verify {}", "train --resume {}", "plot quick {}", "export {}"]
)
def test_a_folder_of_runs_is_told_from_a_run(refused: Refused, tmp_path: Path, command: str) -> None:
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "settings.toml").write_text("")
    given = [*command.format(tmp_path / "runs").split(), *(["--merged", "--out", "x"] if "export" in command else [])]
    refused(*given, value=str(tmp_path / "runs"), remedy=f"is a folder of runs: name one, such as {tmp_path}/runs/a")


@pytest.mark.parametrize(
    ("toml", "value", "remedy"),
    [
        ("learning-rte = 1", "'learning-rte'", "did you mean 'learning-rate'"),
        ("learning_rate = 1", "'learning_rate'", "did you mean 'learning-rate'"),
        ("wxyz = 1", "'wxyz'", "zofed settings lists all"),
        ("lr = 0.1", "'lr'", "did you mean 'learning-rate'"),
        ("queries = 'many'", "'many'", "valid integer"),
        ("queries = true", "true and false are not allowed", "the default is 32"),
        ("queries = [1, 2]", "[1, 2]", "valid integer"),
        ("dataset = 3", "dataset = 3", "valid string"),
        ("seed = 1979-05-27", "1979", "valid integer"),
        ("learning-rate = nan", "nan", "finite"),
        ("[zo]\nqueries = 2", "'zo'", "zofed settings lists all"),
        ("[queries]\na = 2", "queries = {'a': 2}", "valid integer"),
        ('"?\\n?" = 1', r"'?\n?'", "zofed settings lists all"),
        ("queries = 2\nqueries = 3", "settings.toml", "not valid TOML"),
        ("{", "settings.toml", "not valid TOML"),
        (b"\xff\xfe", "settings.toml", "not valid TOML"),
        (f"seed = {'9' * 5000}", "settings.toml", "not valid TOML"),
        (f"seed = {'[' * 5000}", "settings.toml", "not valid TOML"),
        (f"dataset = [{'1, ' * 999}]", "dataset = [1, 1, 1", "... (2997 characters): should be"),
        ('model = "tiny\\u0000"', "'tiny\\x00'", "control character"),
    ],
)
def test_a_settings_file_with_a_mistake_is_refused(
    refused: Refused, tmp_path: Path, toml: str | bytes, value: str, remedy: str
) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    refused("train", file, "--out", tmp_path / "run", value=value, remedy=remedy)


def test_every_wrong_value_of_a_settings_file_is_named_at_once(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("steps = 0\nfoo = 1\nmode = 3\n")
    message = refused("train", tmp_path / "settings.toml", value="steps = 0", remedy="'zo', 'fo'")
    assert "'foo'" in message


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_settings_file_that_cannot_be_read_is_named(refused: Refused, tmp_path: Path, name: str) -> None:
    refused("train", tmp_path / name, value=str(tmp_path / name), remedy="cannot read settings file")


# --- data, tokenizer, model -----------------------------------------------------------------------------------------

FILES: dict[str, bytes | str] = {
    "empty.txt": b"",
    "blank.txt": b"\n \n\n",
    "header.csv": "text,label\n",
    "empty.parquet": b"",
    "one.txt": "all in one paragraph " * 50,
    "short.jsonl": '{"text": "a"}\n{"text": "b"}\n',
    "latin.txt": b"caf\xe9\n",
    "array.jsonl": "[1]\n",
    "unlabelled.jsonl": '{"text": "a"}\n' * 9,
    "half.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c"}\n' * 3,
    "words.jsonl": '{"text": "a", "label": "good"}\n' * 9,
    "gap.jsonl": '{"text": "a", "label": 5}\n{"text": "b", "label": 6}\n' * 9,
    "huge.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1000000000}\n' * 9,
    "alone.jsonl": '{"text": "a", "label": 0}\n' * 9,
}


@pytest.mark.first(12)
@pytest.mark.parametrize(
    ("options", "value", "remedy"),
    [
        ("--dataset {tmp}/missing.jsonl", "missing.jsonl", "use one of"),
        ("--dataset pydocs", "'pydocs'", "did you mean 'pydoc'"),
        ("--dataset=", "''", "use one of"),
        ("--dataset {tmp}/empty.txt", "empty.txt", "use another data set"),
        ("--dataset {tmp}/blank.txt", "blank.txt", "use another data set"),
        ("--dataset {tmp}/header.csv", "header.csv", "use another data set"),
        ("--dataset {tmp}/empty.parquet", "empty.parquet", "fetch or write it again"),
        ("--dataset {tmp}/one.txt", "1 document(s)", "separate the paragraphs"),
        ("--dataset {tmp}/short.jsonl", "one block of 16", "use a smaller block size"),
        ("--dataset {tmp}/latin.txt", "latin.txt", "convert the file to UTF-8"),
        ("--dataset {tmp}/array.jsonl", "array.jsonl", "must be an object"),
        ("--dataset {tmp}", "{tmp}", "save_to_disk"),
        ("--task classification --dataset {tmp}/unlabelled.jsonl", "unlabelled.jsonl", "set task to language-model"),
        ("--task classification --dataset {tmp}/half.jsonl", "half.jsonl", "set task to language-model"),
        ("--task classification --dataset {tmp}/words.jsonl", "the labels good:", "at least 2 classes"),
        ("--task classification --dataset {tmp}/gap.jsonl", "labels 5, 6", "renumber them"),
        ("--task classification --dataset {tmp}/huge.jsonl", "labels 0, 1000000000", "renumber them"),
        ("--task classification --dataset {tmp}/alone.jsonl", "labels 0:", "at least 2 classes"),
        ("--tokenizer gpt3", "'gpt3'", "use 'shipped', 'gpt2' or a folder"),
        ("--tokenizer {tmp}", "{tmp}", "use 'shipped', 'gpt2' or a folder"),
        ("--model tinny", "'tinny'", "did you mean 'tiny'"),
        ("--model=", "''", "folder of a saved model"),
        ("--model {tmp}/missing", "missing", "folder of a saved model"),
        ("--model ~no-such-user/model", "~no-such-user", "folder of a saved model"),
        ("--model {tmp}/missing --tokenizer shipped", "missing", "folder of a saved model"),
        ("--block-size 129 --dataset sample-dclm", "block-size = 129", "set block-size to 128 or less"),
        ("--scope nothing-like-it", "'nothing-like-it'", "use full"),
        ("--scope (", "'('", "use full"),
        ("--scope=", "''", "use full"),
        ("--scope last-9", "'last-9'", "last-2 at most"),
        ("--scope head", "'head'", "use full"),
        ("--device cuda:99", "'cuda:99'", "set device to cpu"),
    ],
)
def test_data_or_a_model_that_cannot_be_used_is_refused_before_anything_is_written(
    refused: Refused, tmp_path: Path, runs: dict[str, Path], options: str, value: str, remedy: str
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = [option.format(tmp=tmp_path) for option in options.split(" ")]
    corpus = ["--dataset", runs["zo"].parent / "corpus.jsonl"]
    command = ["train", *small("train"), *corpus, *given, "--out", tmp_path / "run"]
    refused(*command, value=value.format(tmp=tmp_path), remedy=remedy)
    assert not (tmp_path / "run").exists()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def with_nan(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(content))

    return spoil


def with_own_code(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    configured(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(folder)


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def pointed(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def without_a_shard(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    kept = {name: tensors[name] for name in names if files[name].startswith("model-00001")}
    safetensors.torch.save_file(kept, folder / "model-00001-of-00002.safetensors", {"format": "pt"})


@pytest.mark.first(9)
@pytest.mark.parametrize(
    ("spoil", "value", "remedy"),
    [
        (without_weights, "holds no weights", "copy the folder again from where it came"),
        (pickled, "'pytorch_model.bin'", "save it as safetensors"),
        (truncated, "model.safetensors is damaged", "copy the folder again"),
        (with_nan, "transformer.ln_f.weight", "undamaged copy"),
        (with_own_code, "code of its own", "choose a model of a type it knows"),
        (configured(n_layer=3), "lacks 12", "correct its config.json"),
        (configured(n_embd=32), "(48,)", "bring back the config"),
        (configured(n_head=3), "do not fit its config.json", "bring back the config"),
        (configured(n_layer="two"), "its config.json cannot be used", "bring back the config"),
        (configured(model_type="nonsense"), "nonsense", "install a transformers that knows this one"),
        (configured(model_type="vit"), "no causal language model", "give a model such as GPT-2 or Llama"),
        (configured(quantization_config={"quant_method": "gptq"}), "quantised by gptq", "it was made of"),
        (adapted, "adapter_config.json cannot be read", "copy the folder again"),
        (pointed, "pointer of Git LFS", "git lfs pull"),
        (renamed, "other.safetensors, but neither", "copy the folder again"),
        (without_a_shard, "lacks 1 of the 2 files", "copy the folder again"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json", "save_pretrained"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON", "bring back the config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no model_type", "bring back the config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_or_unsafe_model_folder_is_refused(
    refused: Refused, tmp_path: Path, runs: dict[str, Path], spoil: Callable[[Path], None], value: str, remedy: str
) -> None:
    folder = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_layer=2, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    spoil(folder)
    corpus = ["--dataset", runs["zo"].parent / "corpus.jsonl", "--tokenizer", "shipped"]
    command = ["train", *small("train"), *corpus, "--model", folder, "--out", tmp_path / "run"]
    message = refused(*command, value=value, remedy=remedy)
    assert str(folder) in message
    assert not (folder / "ran").exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_layer=1, n_head=2, n_embd=16, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    command = ["train", *small("train"), "--model", folder, "--tokenizer", "shipped", "--out", tmp_path / "run"]
    refused(*command, value="512 entries", remedy="set tokenizer")


def test_paths_in_the_home_folder_may_be_written_with_a_tilde(
    zofed: Zofed, tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(runs["zo"].parent / "corpus.jsonl", tmp_path)
    shutil.copytree(runs["zo"] / "model", tmp_path / "model")
    options = ["--dataset=~/corpus.jsonl", "--model=~/model", "--out=~/run"]
    status, _, errors = zofed("train", *small("train"), *options)
    assert (status, errors) == (0, "")
    assert (tmp_path / "run" / "summary.json").is_file()


# --- output folder --------------------------------------------------------------------------------------------------


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("full", "choose another folder with --out"),
        ("file", "choose another folder with --out"),
        ("file/below", "choose another --out"),
        ("n" * 300, "choose another --out"),
        ("zo", "--resume"),
        ("federated", "another"),  # a federation goes on with its own settings; here they are not the same
    ],
)
def test_an_output_folder_that_is_taken_or_cannot_be_is_left_alone(
    refused: Refused, copy_of: Callable[[str], Path], tmp_path: Path, out: str, told: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    if out in ("zo", "federated"):
        copy_of(out)
    for command in ("train", "simulate"):
        refused(command, *small(command), "--out", tmp_path / out, value=str(tmp_path / out), remedy=told)


def test_an_output_folder_where_nothing_can_be_written_is_refused(refused: Refused) -> None:
    refused("train", *small("train"), "--out", "/proc/no/run", value="'/proc/no/run'", remedy="choose another --out")


@pytest.mark.parametrize("command", ["train", "simulate"])
def test_the_folder_of_a_run_that_was_refused_takes_the_mended_command(
    zofed: Zofed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no step can be taken: mend it")

    arguments = [command, *small(command), "--out", tmp_path / "run"]
    with monkeypatch.context() as patched:
        patched.setattr(soundness, "check_repeats", refuse)
        assert zofed(*arguments)[0] == 2
    written = tmp_path / "run" / "journal.zofed"
    assert not journal.read(written).entries and zofed(*arguments)[::2] == (0, "")
    entries = journal.read(written).entries
    assert entries
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed"}')
    assert zofed(*arguments)[0] == (2 if command == "train" else 0)  # a federation goes on by itself
    assert journal.read(written).entries == entries, "records are never written over"


def test_a_command_given_twice_keeps_the_first_result(refused: Refused, zofed: Zofed, tmp_path: Path) -> None:
    command = ["train", *small("train"), "--out", tmp_path / "new/nested/sp ace ü 新"]
    assert zofed(*command)[::2] == (0, "")
    refused(*command, value="sp ace ü 新", remedy="--resume")


def test_the_settings_of_a_finished_run_do_not_overwrite_it(refused: Refused, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("zo")
    settings = (folder / "settings.toml").read_text()
    original = next(line for line in settings.splitlines() if line.startswith("out = "))
    (folder / "settings.toml").write_text(settings.replace(original, f'out = "{folder}"'))
    refused("train", folder / "settings.toml", value=str(folder), remedy="another folder with --out")


# --- resuming, and journals -----------------------------------------------------------------------------------------

JOURNAL_COMMANDS = (("journal", "show"), ("journal", "verify"), ("journal", "replay"))
ALL_COMMANDS = (*JOURNAL_COMMANDS, ("train", "--resume"))


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
@pytest.mark.parametrize("lacking", ["folder", "everything", "settings.toml", "journal.zofed"])
def test_what_is_no_run_is_refused(
    refused: Refused, copy_of: Callable[[str], Path], tmp_path: Path, command: tuple[str, ...], lacking: str
) -> None:
    folder = tmp_path / "none"
    if lacking == "everything":
        folder.mkdir()
    elif lacking != "folder":
        folder = copy_of("zo")
        (folder / lacking).unlink()
    refused(*command, folder, value=str(folder), remedy="lacks settings.toml or journal.zofed")


def entry_sizes(folder: Path) -> list[int]:
    return [len(entry.raw) for entry in journal.read(folder / "journal.zofed").entries]


def flipped(raw: bytes, position: int) -> bytes:
    spoilt = bytearray(raw)
    spoilt[position] ^= 4
    return bytes(spoilt)


@pytest.mark.first(9)
@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
@pytest.mark.parametrize("mode", ["zo", "fo"])
@pytest.mark.parametrize(
    ("damage", "value", "remedy"),
    [
        (lambda raw, size: b"", "b''", "not a zofed journal"),
        (lambda raw, size: raw[:40], "damaged header", "restore it from a copy"),
        (lambda raw, size: flipped(raw, 0), "not a zofed journal", "journal.zofed"),
        (lambda raw, size: flipped(raw, 8), "format 7", "use its zofed"),
        (lambda raw, size: raw[:8] + b"\x01" + raw[9:], "format 1", "use its zofed"),
        (lambda raw, size: flipped(raw, 60), "damaged header", "restore it from a copy"),
        (lambda raw, size: flipped(raw, -size - 20), "after round 1", "restore it from a copy"),
        (lambda raw, size: flipped(raw, -size - 5), "after round 1", "restore it from a copy"),
        (lambda raw, size: raw[: -2 * size] + raw[-size:], "was edited", "restore it from a copy"),
    ],
    ids=["empty", "cut-header", "magic", "format", "format-1", "header", "middle", "chain", "entry-removed"],
)
def test_a_damaged_journal_is_refused_and_left_as_it_is(
    refused: Refused,
    copy_of: Callable[[str], Path],
    command: tuple[str, ...],
    mode: str,
    damage: Callable[[bytes, int], bytes],
    value: str,
    remedy: str,
) -> None:
    folder = copy_of(mode)
    size = entry_sizes(folder)[-1]
    (folder / "journal.zofed").write_bytes(damage((folder / "journal.zofed").read_bytes(), size))
    message = refused(*command, folder, value=value, remedy=remedy)
    assert str(folder) in message


@pytest.mark.parametrize("mode", ["zo", "fo", "bare"])
@pytest.mark.parametrize("cut", [1, "entry", "entry and a bit"])
def test_a_journal_cut_short_is_told_by_verify_and_made_whole_by_resume(
    zofed: Zofed, refused: Refused, copy_of: Callable[[str], Path], mode: str, cut: int | str
) -> None:
    folder = copy_of(mode)
    before = json.loads((folder / "summary.json").read_text())
    whole = (folder / "journal.zofed").read_bytes()
    size = entry_sizes(folder)[-1]
    lost = {1: 1, "entry": size, "entry and a bit": size + 9}[cut]
    (folder / "journal.zofed").write_bytes(whole[:-lost])
    remedy = "restore it from a copy" if cut == "entry" else f"--resume {folder}"
    refused("journal", "verify", folder, value=str(folder / "journal.zofed"), remedy=remedy)
    status, _, errors = zofed("train", "--resume", folder)
    assert (status, errors) == (0, "")
    assert json.loads((folder / "summary.json").read_text())["digest"] == before["digest"]
    assert (folder / "journal.zofed").read_bytes() == whole


def test_the_journal_of_another_run_is_told(refused: Refused, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("zo")
    shutil.copy(copy_of("other") / "journal.zofed", folder)
    refused("journal", "verify", folder, value="cut or exchanged", remedy="restore it from a copy")
    refused("journal", "replay", folder, value="weights are", remedy="restore it from a copy")
    refused("train", "--resume", folder, value="another seed", remedy="bring back")


def test_a_first_order_run_without_checkpoints_names_what_it_cannot_rebuild(
    refused: Refused, copy_of: Callable[[str], Path]
) -> None:
    refused(
        "journal",
        "replay",
        copy_of("bare"),
        value="round 1 is a step by backpropagation",
        remedy="keep-gradients = true",
    )


def test_damaged_checkpoints_are_told(zofed: Zofed, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("fo")
    before = json.loads((folder / "summary.json").read_text())["digest"]
    paths = sorted((folder / "checkpoints").iterdir())
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    status, _, errors = zofed("journal", "replay", folder)
    assert status == 2 and "round 1 is a step by backpropagation" in errors and "keep-gradients" in errors
    assert all(f"{path} is damaged" in errors for path in paths)
    (folder / "summary.json").unlink()
    assert zofed("train", "--resume", folder)[0] == 0  # from the start, to the same weights
    assert json.loads((folder / "summary.json").read_text())["digest"] == before


def test_a_federated_run_is_not_resumed_centrally(refused: Refused, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("federated")
    refused("train", "--resume", folder, value="a federated run", remedy=f"zofed simulate --resume {folder}")


def test_resume_takes_no_other_settings(refused: Refused, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("zo")
    refused("train", "--resume", folder, "--steps", "9", value=str(folder), remedy="give no others")
    refused("train", "--resume", folder, folder / "settings.toml", value=str(folder), remedy="give no others")


def edited(folder: Path, key: str, value: str) -> None:
    """Change one line of the run's settings and let the journal lack its last entry, so that a step remains to do."""
    lines = (folder / "settings.toml").read_text().splitlines()
    assert sum(line.startswith(f"{key} = ") for line in lines) == 1
    changed = [f"{key} = {value}" if line.startswith(f"{key} = ") else line for line in lines]
    (folder / "settings.toml").write_text("\n".join(changed) + "\n")
    raw, size = (folder / "journal.zofed").read_bytes(), entry_sizes(folder)[-1]
    (folder / "journal.zofed").write_bytes(raw[:-size])


@pytest.mark.parametrize(
    ("key", "value", "told", "remedy"),
    [
        ("seed", "5", "seed", "bring back"),
        ("scope", '"norms"', "trainable", "bring back"),
        ("dtype", '"bfloat16"', "weights", "bring back"),
        ("momentum", "0.5", "optimizer", "bring back"),
        ("queries", "0", "queries = 0", "greater than or equal to 1"),
        ("device", '"cuda:99"', "cuda:99", "set device to cpu"),
        ("dataset", '"/nowhere/data.txt"', "/nowhere/data.txt", "use one of"),
    ],
)
@pytest.mark.parametrize("mode", ["zo", "fo"])
def test_a_run_whose_settings_were_edited_is_not_resumed(
    refused: Refused, copy_of: Callable[[str], Path], mode: str, key: str, value: str, told: str, remedy: str
) -> None:
    folder = copy_of(mode)
    edited(folder, key, value)
    refused("train", "--resume", folder, value=told, remedy=remedy)


# --- federations ----------------------------------------------------------------------------------------------------


def test_more_clients_than_documents_are_refused(zofed: Zofed, runs: dict[str, Path], tmp_path: Path) -> None:
    corpus = ["--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, _, errors = zofed("simulate", *small("simulate"), *corpus, "--clients", "19", "--out", tmp_path / "run")
    assert status == 2
    assert errors.splitlines() == [
        "zofed: client 0: 19 clients are more clients than documents (18): use fewer clients or a data set of more "
        "documents"
    ]


@pytest.mark.parametrize("mode", ["zo", "fo"])
def test_a_diverged_run_says_so_and_keeps_its_steps(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    options = ["--mode", mode, "--learning-rate", "1e30", "--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, _, errors = zofed("train", *small("train", mode), *options, "--out", tmp_path / "run")
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert "learning-rate = 1e+30" in errors and "a tenth of it" in errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    assert len(journal.read(tmp_path / "run" / "journal.zofed").entries) == 1


# --- how it reads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "sweep", "report", "supernode"])
def test_help_shows_brackets_as_they_are(zofed: Zofed, command: str) -> None:
    status, told, _ = zofed(command, "--help")
    assert status == 0 and "\\[" not in told


@pytest.mark.parametrize("command", [["train"], ["simulate", "--clients", "2"]], ids=["train", "simulate"])
def test_output_to_a_pipe_has_no_colour_no_bar_and_no_library_chatter(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, command: list[str]
) -> None:
    corpus = ["--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, output, errors = zofed(*command, *small(command[0]), *corpus, "--out", tmp_path / "run")
    assert (status, errors) == (0, "")
    assert "\x1b" not in output and "\r" not in output
    assert str(tmp_path / "run") in output


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning-rate", "0.5"), ("batch-size", "3"), ("queries", "4"), ("epsilon", "0.1"), ("held-out-fraction", "0.3")],
)
def test_edited_settings_that_the_base_does_not_show_stop_a_resume(
    refused: Refused, copy_of: Callable[[str], Path], key: str, value: str
) -> None:
    folder = copy_of("zo")
    edited(folder, key, value)
    refused("train", "--resume", folder, value=key, remedy="bring back")


@pytest.mark.parametrize("mode", ["zo", "fo"])
def test_changed_data_stop_a_resume(
    refused: Refused, copy_of: Callable[[str], Path], runs: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    folder = copy_of(mode)
    lines = (runs["zo"].parent / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "changed.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    edited(folder, "dataset", json.dumps(str(tmp_path / "changed.jsonl")))
    refused("train", "--resume", folder, value="documents", remedy="bring back")


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["train", "--learning-rte", "1"], "--learning-rte", "--learning-rate"),
        (["train", "one.toml", "two.toml"], "two.toml", "--help"),
        (["trian"], "trian", "train"),
        (["journal", "shw"], "shw", "show"),
        (["journal", "show"], "FOLDER", "--help"),
        (["quickstart", "--rounds", "0"], "0", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_does_not_parse_is_answered_in_one_line(
    refused: Refused, arguments: list[str], value: str, remedy: str
) -> None:
    refused(*arguments, value=value, remedy=remedy)


def test_the_home_of_an_unknown_user_is_refused(refused: Refused) -> None:
    refused("train", *small("train"), "--out=~no-such-user/run", value="~no-such-user", remedy="choose another --out")


def test_a_path_of_two_lines_is_told_in_one(refused: Refused, tmp_path: Path) -> None:
    refused("train", "--resume", tmp_path / "two\nlines", value="two", remedy="is not the folder of a run")


def test_a_quorum_of_more_than_all_clients_is_refused(refused: Refused, tmp_path: Path) -> None:
    command = ["simulate", *small("simulate"), "--clients", "2", "--quorum", "3", "--out", tmp_path / "run"]
    refused(*command, value="quorum = 3", remedy="2")


@pytest.mark.parametrize("command", [["train"], ["simulate", "--clients", "2"]], ids=["train", "simulate"])
def test_a_held_out_part_shorter_than_a_block_is_refused_before_anything_is_written(
    refused: Refused, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"text": "{"word " * 99}"}}\n' * 4 + '{"text": "a"}\n')
    documents = encoding.load_documents(str(tmp_path / "data.jsonl"))
    seed = next(seed for seed in range(99) if encoding.split_held_out(documents, 0.1, seed)[1][0].text == "a")
    sizes = ["--dataset", tmp_path / "data.jsonl", "--seed", seed, "--out", tmp_path / "run"]
    refused(*command, *small(command[0]), *sizes, value="one block of 16", remedy="held-out-fraction")


def test_too_many_clients_leave_no_folder(refused: Refused, runs: dict[str, Path], tmp_path: Path) -> None:
    corpus = ["--dataset", runs["zo"].parent / "corpus.jsonl"]
    command = ["simulate", *small("simulate"), *corpus, "--clients", "19", "--out", tmp_path / "run"]
    refused(*command, value="19 clients", remedy="use fewer clients")


@pytest.mark.parametrize("mode", ["zo", "fo"])
def test_a_run_that_diverges_in_its_last_step_is_not_completed(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    options = ["--mode", mode, "--learning-rate", "1e30", "--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, _, errors = zofed("train", *small("train", mode), *options, "--steps", "1", "--out", tmp_path / "run")
    assert status == 2
    assert "learning-rate = 1e+30" in errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


def test_a_fault_of_the_users_own_objective_is_told_and_is_no_divergence(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_objective.py").write_text("def f(model, batch):\n    raise ValueError('no labels_mask')\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--objective", "faulty_objective:f", "--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, _, errors = zofed("train", *small("train"), *options, "--out", tmp_path / "run")
    assert status == 2 and "mend objective = 'faulty_objective:f': no labels_mask" in errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_diverged_federation_names_the_rate(zofed: Zofed, runs: dict[str, Path], tmp_path: Path) -> None:
    options = ["--learning-rate", "1e30", "--dataset", runs["zo"].parent / "corpus.jsonl"]
    status, _, errors = zofed("simulate", *small("simulate"), *options, "--clients", "2", "--out", tmp_path / "run")
    assert status == 2
    assert "learning-rate = 1e+30" in errors and "a tenth of it" in errors


def test_relative_paths_still_work_when_a_run_is_resumed_elsewhere(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(runs["zo"].parent / "corpus.jsonl", tmp_path)
    shutil.copytree(runs["zo"] / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert zofed("train", *small("train"), "--dataset", "corpus.jsonl", "--model", "model", "--out", "run")[0] == 0
    monkeypatch.chdir("/")
    assert zofed("train", "--resume", tmp_path / "run")[0] == 0
    assert zofed("journal", "replay", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("content", [b"[1]", b"\xff"])
@pytest.mark.parametrize("command", [("journal", "verify"), ("journal", "replay")], ids=" ".join)
def test_a_spoilt_summary_counts_as_none(
    zofed: Zofed, copy_of: Callable[[str], Path], command: tuple[str, ...], content: bytes
) -> None:
    folder = copy_of("zo")
    (folder / "summary.json").write_bytes(content)
    assert zofed(*command, folder)[::2] == (0, "")


@pytest.mark.first(3)
@pytest.mark.parametrize("content", [b"some,other\n1,2\n", b"\xff\n", b"", bytes(99)])
@pytest.mark.parametrize("name", ["metrics.csv", "evaluations.csv"])
def test_a_spoilt_table_is_made_anew(zofed: Zofed, copy_of: Callable[[str], Path], name: str, content: bytes) -> None:
    folder = copy_of("zo")
    before = [row | {"timestamp": "", "seconds": ""} for row in read_table(folder / name)]
    (folder / name).write_bytes(content)
    assert zofed("train", "--resume", folder)[::2] == (0, "")
    assert [row | {"timestamp": "", "seconds": ""} for row in read_table(folder / name)] == before


@pytest.mark.parametrize(
    "command",
    [["plot", "compare", "{run}", "--out", "/proc/no.png"], ["make-data", "/proc/no"], ["make-model", "/proc/no"]],
)
def test_a_place_where_nothing_can_be_written_is_told(
    refused: Refused, copy_of: Callable[[str], Path], command: list[str]
) -> None:
    folder = copy_of("zo")
    refused(*(argument.format(run=folder) for argument in command), value="/proc/no", remedy="choose another")


@pytest.mark.parametrize("option", ["--model", "--dataset", "--tokenizer", "--eval-dataset"])
def test_a_name_that_is_too_long_is_told_as_such(refused: Refused, tmp_path: Path, option: str) -> None:
    name = "x" * 5000
    told = refused("train", option, name, "--out", tmp_path / "run", value="too long", remedy="shorter name")
    assert len(told) < 600


def test_a_summary_with_words_for_numbers_is_told(refused: Refused, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("zo")
    (folder / "summary.json").write_text('{"status": "completed", "eval_loss_end": "low"}')
    refused("report", folder, value="eval_loss_end = 'low'", remedy="bring it back from a copy")


def test_replay_of_a_saved_model_has_no_library_chatter(
    zofed: Zofed, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import logging

    logging.enable_progress_bar()  # as in a process of its own, where no run has turned it off
    options = ["--dataset", runs["zo"].parent / "corpus.jsonl", "--model", runs["zo"] / "model"]
    assert zofed("train", *small("train"), *options, "--out", tmp_path / "run")[0] == 0
    logging.enable_progress_bar()
    assert zofed("journal", "replay", tmp_path / "run")[::2] == (0, "")


def test_a_torn_federated_journal_gets_a_remedy_that_works(
    zofed: Zofed, refused: Refused, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("federated")
    raw = (folder / "journal.zofed").read_bytes()
    (folder / "journal.zofed").write_bytes(raw[:-1])
    refused("journal", "verify", folder, value="torn bytes", remedy=f"zofed simulate --resume {folder} cuts them off")
    assert zofed("simulate", "--resume", folder)[::2] == (0, "")
    assert (folder / "journal.zofed").read_bytes() == raw

"""Data sets by name: download, resume, merge, describe; every mistake in one line and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import zofed
from zofed import config
from zofed.base.errors import UserError
from zofed.data import documents, download, mixing, subsets
from zofed.data.catalog import CATALOG, DatasetInfo, get_dataset_info, list_available_datasets
from zofed.training import paths
from zofed.training.task import Task

ROOT = Path(zofed.__file__).parent.parent


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of the test's own, and no network."""
    monkeypatch.setenv("ZOFED_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "root"


def hub_folder(folder: Path, rows: int, column: str = "text", files: int = 3) -> Path:
    """A folder as the hub keeps one: parquet files, with a blank row and a column nobody asked for."""
    from datasets import Dataset

    (folder / "data").mkdir(parents=True)
    texts = [f"document {number} of this folder" for number in range(rows)]
    texts[1] = " "
    for part, chosen in enumerate(np.array_split(np.array(texts), files)):
        columns = {column: chosen.tolist(), "url": ["u"] * len(chosen)}
        Dataset.from_dict(columns).to_parquet(str(folder / f"data/train-{part:05d}-of-{files:05d}.parquet"))
    return folder


def complaint(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def fetched(root: Path, source: Path, samples: int, **options: bool) -> dict[str, object]:
    return download.download(CATALOG["dclm"], root / "dclm", samples=samples, source=source, **options)


def texts(root: Path) -> list[str]:
    return [document.text for document in documents.load_documents("dclm")]


def zofed_data(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from zofed.commands.cli import main; sys.argv = ['zofed', 'data', *sys.argv[1:]]; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_download_keeps_the_first_rows_with_text_and_is_found_by_name(tmp_path: Path, root: Path) -> None:
    assert "zofed data download dclm" in complaint(lambda: documents.load_documents("dclm"))
    source = hub_folder(tmp_path / "hub", 40)
    info = fetched(root, source, 10)
    assert (info["rows"], info["blank"]) == (10, 1)
    assert texts(root) == [f"document {number} of this folder" for number in (0, *range(2, 11))]
    assert {path.name for path in (root / "dclm").iterdir()} == {"info.json", info["file"]}
    settings = paths.with_absolute_paths(config.resolve({"dataset": "dclm"}))
    assert settings.dataset == str(root / "dclm")
    assert fetched(root, source, 10) == info
    assert "--force" in complaint(lambda: fetched(root, source, 12))
    assert texts(root)[-1] == "document 10 of this folder"
    fetched(root, source, 0, force=True)
    assert len(texts(root)) == 39 and len(list((root / "dclm").iterdir())) == 2


def test_every_hub_entry_loads_rows_of_its_own_schema(tmp_path: Path, root: Path) -> None:
    values = {"context": {"contexts": ["c"], "labels": []}, "label": 1, "idx": 0, "pubid": 1, "final_decision": "no"}
    for info in CATALOG.values():
        if info.repository:
            row = {column: values.get(column, "words") for column in info.columns}
            folder = tmp_path / info.name
            folder.mkdir()
            (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 2)
            download.download(info, root / info.name, samples=0, source=folder)
            if {"text", "sentence", "long_answer"} & set(info.columns):  # of others a task says what is read
                loaded = documents.load_documents(info.name)
                has_label = bool({"label", "final_decision"} & set(info.columns))
                assert len(loaded) == 2 and (loaded[0].label is not None) == has_label
            assert subsets.info(root / info.name)["rows"] == 2
            assert subsets.info(root / info.name).get("classes", []) == list(info.classes)
    assert set(CATALOG) <= set(list_available_datasets())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, root: Path, how: int) -> None:
    source = hub_folder(tmp_path / "hub", 60_000, files=7)
    command = ["download", "dclm", "--from", source, "--max-samples", "50000"]
    assert zofed_data(*command, ZOFED_DATA=str(tmp_path / "whole")).returncode == 0
    # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from zofed.commands.cli import main; sys.argv = ['zofed', 'data', *sys.argv[1:]]; main()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    state = root / "dclm" / "rows.state.json"
    while not (state.is_file() and json.loads(state.read_text())["rows"] >= 1000):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(how)
    assert running.wait() in (-signal.SIGKILL, 130)
    assert 0 < json.loads(state.read_text())["rows"] < 50_000
    assert "unfinished" in complaint(lambda: fetched(root, source, 10))
    assert zofed_data(*command).returncode == 0
    assert subsets.info(root / "dclm")["sha256"] == subsets.info(tmp_path / "whole" / "dclm")["sha256"]


def test_mistakes_leave_what_was_there(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub_folder(tmp_path / "hub", 40)
    fetched(root, source, 10)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    wrong = hub_folder(tmp_path / "wrong", 9, column="body")
    assert "lacks the column text" in complaint(lambda: fetched(root, wrong, 5, force=True))
    assert "no folder of data files" in complaint(lambda: fetched(root, tmp_path / "none", 5, force=True))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in complaint(lambda: fetched(root, tmp_path / "bad", 5, force=True))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "free some space" in complaint(lambda: fetched(root, source, 20, force=True))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    (root / "dclm" / str(subsets.info(root / "dclm")["file"])).write_text('{"text": "other"}\n')
    assert "not what was written" in complaint(lambda: documents.load_documents("dclm"))


@pytest.mark.slow
def test_offline_and_misspelt_names_end_in_one_line(root: Path) -> None:
    for arguments, told in (
        (("download", "sst2"), "the hub cannot be reached"),
        (("download", "sts2"), "did you mean 'sst2'?"),
        (("show", "fineweb_edu"), "did you mean 'fineweb-edu'?"),
        (("download", "pydoc"), "on this machine already"),
        (("merge", "sample-dclm"), "name at least 2"),
        (("merge", "sample-dclm", "sample-dclm"), "both be the source 'sample-dclm'"),
        (("distribution", "sample-dclm"), "nothing to mix"),
    ):
        done = zofed_data(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert told in done.stderr
    assert not root.exists() or not any(root.iterdir())


@pytest.mark.slow
def test_merge_keeps_sources_and_labels_and_shuffles_by_the_seed(root: Path) -> None:
    folder, info = mixing.merge(["sample-dclm", "sample-pubmedqa"], None, 0)
    assert folder == root / "sample-dclm_sample-pubmedqa_merged" and info["rows"] == 2500
    loaded = documents.load_documents(folder.name)
    parts = {name: documents.load_documents(name) for name in ("sample-dclm", "sample-pubmedqa")}
    assert sorted(loaded, key=repr) == sorted([*parts["sample-dclm"], *parts["sample-pubmedqa"]], key=repr)
    assert "--force" in complaint(lambda: mixing.merge(["sample-dclm", "sample-pubmedqa"], None, 1))
    _, other = mixing.merge(["sample-dclm", "sample-pubmedqa"], None, 1, force=True)
    assert other["sha256"] != info["sha256"]
    assert mixing.merge(["sample-dclm", "sample-pubmedqa"], None, 0, force=True)[1] == info
    assert folder.name in list_available_datasets()
    assert mixing.distribution(loaded).even
    one_after_the_other = [*parts["sample-dclm"], *parts["sample-pubmedqa"]]
    assert not mixing.distribution(one_after_the_other).even
    assert zofed_data("distribution", folder).returncode == 0


def test_an_empty_source_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "source": "one"}\n{"text": "b", "source": " "}\n')
    assert "line 2" in complaint(lambda: documents.load_documents(str(path)))
    path.write_text('{"text": "a", "source": "one"}\n')
    assert documents.load_documents(str(path))[0].source == "one"


def test_the_chi_square_tail_and_statistic_against_known_values() -> None:
    for value, freedom, tail in ((3.841459, 1, 0.05), (18.307038, 10, 0.05), (23.209251, 10, 0.01)):
        assert mixing.chi_square_tail(value, freedom) == pytest.approx(tail, rel=1e-5)
    made = [documents.Document("x", "a" if k < 15 or k >= 35 else "b") for k in range(40)]
    found = mixing.distribution(made, 2)
    assert found.counts.tolist() == [[15, 5], [5, 15]]
    assert found.chi_square == pytest.approx(10.0) and found.freedom == 1
    assert "2 to 4" in complaint(lambda: mixing.distribution(made, 5))


def test_stats_by_hand() -> None:
    made = [documents.Document(text, "s", label) for text, label in (("aa", 0), ("bbbb", 1), ("aa", 1), ("c", None))]
    found = mixing.stats(made, lambda texts, **_: {"input_ids": [text.split("b") for text in texts]})  # type: ignore[arg-type]
    assert found.characters.tolist() == [2, 4, 2, 1] and found.tokens.tolist() == [1, 5, 1, 1]
    assert found.duplicates == 1 and found.labels == {0: 1, 1: 2, None: 1} and found.sources == {"s": 4}


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("a.label", "DESC:manner How so ?\nLOC:city Where ?\nDESC:def What ?\n", [0, 1, 0]),
        ("a.txt", "DESC:manner How so ?\nLOC:city Where ?\nDESC:def What ?\nLOC:other Up ?\n", [0, 1, 0, 1]),
        ("a.txt", "1 good \u00e9clair\n0 bad\n1 fine\n0 poor\n", [1, 0, 1, 0]),
        ("a.txt", "1 First item\n2 Second item\n3 Third item\n", [None]),
        ("a.txt", "1 is a number\nand this is text\n", [None]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_label_text_lines(tmp_path: Path, name: str, content: str, labels: list[int | None], encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    loaded = documents.load_documents(str(tmp_path / name))
    assert [document.label for document in loaded] == labels
    if len(loaded) == 4 and labels[0] == 1:
        assert loaded[0].text == "good \u00e9clair"


def test_a_class_of_one_example_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a\t0\n" * 8 + "b\t1\n")
    settings = config.resolve({"dataset": str(path), "task": "classification"})
    assert "single document with the label 1" in complaint(lambda: Task.load(settings))
    path.write_text("a\t0\n" * 8 + "b\t1\n" * 2)
    assert Task.load(settings).labels == 2


@pytest.mark.slow
def test_the_dataloader_visits_every_example_in_the_order_of_the_seed() -> None:
    def labels(seed: int) -> list[int]:
        loader = zofed.get_dataloader("sample-sst2", block_size=16, batch_size=7, seed=seed, task="classification")
        batches = list(loader)
        assert set(batches[0]) == {"input_ids", "attention_mask", "labels"} and batches[0]["input_ids"].shape == (7, 16)
        return torch.cat([batch["labels"] for batch in batches]).tolist()

    state = torch.get_rng_state()
    assert labels(0) == labels(0) != labels(1)
    assert len(labels(0)) == 2400 and sum(labels(0)) == sum(labels(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert "batch size 0" in complaint(lambda: zofed.get_dataloader("sample-sst2", batch_size=0))
    assert isinstance(zofed.get_dataset_info("sst2"), DatasetInfo) and get_dataset_info("sst2").classes[1] == "positive"

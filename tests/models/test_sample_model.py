"""The pretrained model that ships: carried as text, unpacked once, and worth a prompt."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from zofed import config
from zofed.base.errors import UserError
from zofed.commands.quickstart import TASK
from zofed.data.sample_opinions import KNOWN, LEFT_OUT, opinions
from zofed.data.sample_words import BLAME, PRAISE, TOPICS
from zofed.models import sample_model
from zofed.training import pretraining
from zofed.training.central import train


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_unpacked_once_whole_and_packs_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    folder = sample_model.folder()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert sample_model.folder() == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]  # nothing half made is left
    assert sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) == 141_056
    again = tmp_path / "again.json"
    sample_model.pack(folder, again)
    assert again.read_bytes() == sample_model.SHIPPED.read_bytes()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"config": {}, "tensors": {"a": {"shape": [3], "bfloat16": "AAA="}}}']
)
def test_a_missing_or_damaged_file_is_named_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(sample_model, "SHIPPED", tmp_path / "sample.json")
    with pytest.raises(UserError, match=r"sample\.json' is not there: bring it back"):
        sample_model.folder()
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(UserError, match=r"sample\.json' is damaged: bring it back"):
        sample_model.folder()
    assert list((cache / "models").iterdir()) == []


def test_opinions_leave_films_and_half_of_the_judgements_to_be_learnt() -> None:
    rows = opinions(2000)
    assert rows == opinions(2000) and rows != opinions(2000, seed=1)
    words = {word for row in rows for word in row["text"].split()}
    assert not words & set(PRAISE[KNOWN:] + BLAME[KNOWN:])
    assert words >= {*PRAISE[:KNOWN], *BLAME[:KNOWN], "good", "bad"}
    films = set(TOPICS[LEFT_OUT][0].split())
    assert not films & words


def test_the_recipe_makes_such_a_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "RECIPE", pretraining.RECIPE | {"steps": 2, "eval-interval": 2})
    monkeypatch.setattr(pretraining, "opinions", lambda: opinions(200))
    rows = []
    pretraining.make_sample_model(tmp_path / "pretrained" / "sample.json", rows.append)
    made, shipped = (
        json.loads(path.read_text()) for path in (tmp_path / "pretrained" / "sample.json", sample_model.SHIPPED)
    )
    assert made["config"] == shipped["config"]
    assert {name: own["shape"] for name, own in made["tensors"].items()} == {
        name: own["shape"] for name, own in shipped["tensors"].items()
    }
    assert made["tensors"] != shipped["tensors"] and rows[-1]["step"] == 2


def test_a_prompt_calls_up_what_it_knows_and_leaves_the_rest_to_be_learnt(cache: Path, tmp_path: Path) -> None:
    settings = config.resolve(TASK | {"mode": "zo", "steps": 1, "partition": "iid", "clients": 0})
    summary = train(settings, tmp_path / "run", lambda row: None)
    known = summary["baselines"]
    assert 0.66 < known["zero_shot_accuracy"] < 0.78 and 0.75 < known["zero_shot_auc"] < 0.86
    assert summary["replay_digest"] == summary["digest"]
    assert summary["base"]["model"] == "sample"

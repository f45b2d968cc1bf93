"""Task files: what they may say, what wins over them, and that a run knows no more of them than settings."""

import warnings
from pathlib import Path

import pytest

from zofed import config
from zofed.base.errors import UserError
from zofed.config import task_files
from zofed.experiments import sweep_file

OWN = 'task = "prompt"\ndataset = "rows.tsv"\ntemplate = "{{ text }} So"\nlabel-words = " bad, good"\n'


def written(folder: Path, text: str = OWN, name: str = "own.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", task_files.names())
def test_every_shipped_task_says_all_that_people_ask(name: str) -> None:
    task = task_files.load(name)
    settings = config.resolve({"task": name})
    assert all((task.about, task.source, task.licence)) and "\n" not in task.about
    assert settings.task == task.settings["task"] and settings.metric and settings.dataset == task.settings["dataset"]
    again = config.resolve(settings.model_dump(by_alias=True))
    assert again == settings  # a run's own settings need no task file


def test_the_tasks_of_the_papers_ship() -> None:
    eleven = {"sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"}
    six = {f"{name}-masked" for name in ("sst2", "sst5", "mnli", "snli", "rte", "trec")}
    flower = {f"flowertune-{name}" for name in ("nlp", "finance", "medical", "code")}
    others = {"pubmedqa", "pubmedqa-long", "trec", "ag-news", "dolly", "natural-instructions"}
    assert set(task_files.names()) == eleven | six | flower | others
    assert not set(task_files.names()) & set(task_files.TYPES)  # a type always means itself


def test_what_is_given_wins_over_the_task_file(tmp_path: Path) -> None:
    settings = config.resolve({"task": "sst2", "block-size": 32, "dataset": "sample-sst2", "label-words": " no, yes"})
    assert (settings.block_size, settings.dataset, settings.label_words) == (32, "sample-sst2", " no, yes")
    assert settings.template == "{{ sentence | trim }} It was"
    file = written(tmp_path, 'template = "{{ text }}?"\nblock-size = 32\n', "settings.toml")
    settings = config.asked_for(file, {"task": "sst2", "block-size": "48"})
    assert (settings.template, settings.block_size, settings.dataset) == ("{{ text }}?", 48, "sst2")


def test_a_task_typed_beside_a_run_s_settings_replaces_the_run_s_own(tmp_path: Path) -> None:
    """No template, columns or data of the old task stay to be read by the new one; what is typed stands."""
    before = config.resolve({"task": "copa", "shots": 4, "eval-dataset": "copa", "batch-size": 7})
    file = written(tmp_path, config.to_toml(before), "settings.toml")
    settings = config.asked_for(file, {"task": "rte", "block-size": "99"})
    assert settings == config.resolve({"task": "rte", "batch-size": 7, "block-size": 99})
    assert config.asked_for(file, {"task": "prompt"}) == before  # a type is a setting as any other


def test_paths_are_relative_to_the_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    path = written(tmp_path / "deep", OWN + 'eval-dataset = "../dev.tsv"\n')
    monkeypatch.chdir(tmp_path)
    for name in ("deep/own.toml", str(path)):
        settings = config.resolve({"task": name})
        assert (
            settings.dataset == str(tmp_path / "deep" / "rows.tsv") and settings.eval_dataset == f"{tmp_path}/dev.tsv"
        )
    path.write_text('task = "instruction"\ndataset = "dolly"\nchat-template = "chat.jinja"\n')
    settings = config.resolve({"task": str(path)})
    assert (settings.dataset, settings.chat_template) == ("dolly", str(tmp_path / "deep" / "chat.jinja"))
    inline = "{{ messages[0].content }}"
    path.write_text(f'task = "instruction"\nchat-template = "{inline}"\n')
    assert config.resolve({"task": str(path)}).chat_template == inline


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('task = "prompt"\nlabel_words = "a"', "unknown key of a task file 'label_words': did you mean 'label-words'?"),
        ('task = "prompt"\nlearning-rate = 1', "learning-rate is a setting, but none of a task: give it beside task"),
        ('about = "x"', 'it does not say its type: write task = "prompt"'),
        ('task = "sst2"', "task = 'sst2' is no type"),
        ('task = ["prompt"]', "task = ['prompt'] is no type"),
        ('task = "prompt"\nabout = 3', "about = 3 is no text"),
        ('task = "prompt"\nblock-size = 0', "block-size = 0: should be greater than or equal to 2"),
        ('task = "classification"\ntemplate = "{{ a }}"', "template = {{ a }} has no effect here"),
        ("task = prompt", "is not valid TOML"),
    ],
)
def test_a_spoilt_file_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as raised:
        config.resolve({"task": str(path)})
    assert wanted in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "task", ["sst3", "zzzz", "a/b", "", "x" * 999, "x" * 999 + ".toml", "gone.toml", "~nobody/own.toml"]
)
def test_an_unknown_task_is_told_what_there_is(task: str) -> None:
    with pytest.raises(UserError) as raised:
        config.resolve({"task": task})
    told = str(raised.value)
    assert "\n" not in told and ("natural-instructions" in told or "zofed tasks" in told) and len(told) < 1000
    assert "did you mean 'sst2'?" in told or task != "sst3"


def test_nobody_is_blamed_for_what_a_task_file_says(tmp_path: Path) -> None:
    """Keys that the person gave are judged, the file's are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = written(tmp_path, 'task = "squad"\nmode = "fo"\n', "settings.toml")
        config.asked_for(file, {"eval-dataset": "squad"}, config.CENTRAL)
    with pytest.raises(UserError, match="label-words = a,b has no effect here"):
        config.asked_for(None, {"task": "squad", "label-words": "a,b"}, config.CENTRAL)


def test_flower_s_defaults_do_not_overrule_a_task_file() -> None:
    """Flower hands over every setting, of which those at their defaults were not given."""
    everything = {key: field.default for key, field in config.SETTINGS.items()}
    assert config.given(everything) == {}
    settings = config.resolve(config.given(everything | {"task": "rte", "block-size": 99}))
    assert settings == config.resolve({"task": "rte", "block-size": 99})
    assert config.given({"freeze-encoder": 0, "nonsense": 1}) == {"freeze-encoder": 0, "nonsense": 1}


def test_a_sweep_over_tasks(tmp_path: Path) -> None:
    own = written(tmp_path)
    path = written(tmp_path, f'[base]\nblock-size = 50\n[grid]\ntask = ["sst2", "rte", "{own}"]\n', "sweep.toml")
    runs = sweep_file.read(path).first()
    assert [run.name for run in runs] == ["task=sst2,seed=0", "task=rte,seed=0", "task=own.toml,seed=0"]
    assert [run.settings.dataset for run in runs] == ["sst2", "rte", str(tmp_path / "rows.tsv")]
    assert {run.settings.block_size for run in runs} == {50} and {run.settings.task for run in runs} == {"prompt"}
    path.write_text('[grid]\ntask = ["sst2", "rtf"]\n')
    with pytest.raises(UserError, match="unknown task 'rtf': did you mean 'rte'"):
        sweep_file.read(path)


def test_a_sweep_goes_on_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert config.absolute_task("own.toml") == str(own)
    assert [config.absolute_task(name) for name in ("sst2", "prompt", 3)] == ["sst2", "prompt", 3]

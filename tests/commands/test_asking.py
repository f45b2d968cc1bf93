"""`zofed generate`: one prompt, a file, a chat; a run's model beside its base; prompts as in training."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import ignore

from zofed import config
from zofed.config import Settings
from zofed.data.encoding import load_tokenizer
from zofed.training import asking, central, generation
from zofed.training.asking import BASE, TUNED, Request

Command = Callable[..., tuple[int, str, str]]
COMMON: dict[str, Any] = {"block-size": 32, "batch-size": 4, "steps": 60, "device": "cpu", "eval-examples": 8}
LEARN: dict[str, Any] = {"mode": "fo", "optimizer": "adamw", "learning-rate": 0.005}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def settings_of(**changes: Any) -> Settings:
    return config.resolve(COMMON | {key.replace("_", "-"): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind of task a run that has learnt one thing by heart."""
    folder = tmp_path_factory.mktemp("asked")
    texts, asked, films = (folder / f"{name}.jsonl" for name in ("texts", "asked", "films"))
    asked.write_text((json.dumps({"prompt": "ask me =>", "completion": "the yes it is"}) + "\n") * 40)
    texts.write_text((json.dumps({"text": "ask me =>the yes it is"}) + "\n") * 40)
    rows = [{"title": "fine" if n % 2 else "dull", "text": "a film", "label": n % 2} for n in range(40)]
    films.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"template": "{{ title }}, {{ text }} It was", "label-words": " bad, good", "dataset": str(films)}
    kinds: dict[str, dict[str, Any]] = {
        "text": {"dataset": str(texts)},
        "instruction": {"dataset": str(asked), "task": "instruction", "max-new-tokens": 9, "generated-examples": 1},
        "prompt": {"task": "prompt", "baselines": False, **words},
        "classification": {"task": "classification", "dataset": str(films)},
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOFED_CACHE", str(folder / "cache"))
        for name, own in kinds.items():
            found[name] = folder / name
            central.train(config.resolve(COMMON | LEARN | own), found[name], ignore)
    return found


def test_a_prompt_is_answered_as_it_was_trained(runs: dict[str, Path], zofed_command: Command) -> None:
    status, told, errors = zofed_command("generate", runs["instruction"], "ask me =>", "--device", "cpu")
    assert (status, told, errors) == (0, "the yes it is\n", "")
    status, told, errors = zofed_command("generate", runs["instruction"], "ask me =>", "--max-new-tokens", 3)
    assert status == 0 and "the yes it is".startswith(told.rstrip("\n")) and "cut by max-new-tokens" in errors
    status, told, errors = zofed_command("generate", runs["text"], "ask me =>the", "--max-new-tokens", 9)
    speaker = asking.of_run(runs["text"])
    ids = speaker.tokenizer("ask me =>the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = int(speaker.models[TUNED](input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert status == 0 and told.startswith(speaker.tokenizer.decode([first]))


def test_base_and_tuned_stand_side_by_side(runs: dict[str, Path], zofed_command: Command, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    words = ("generate", runs["instruction"], "ask me =>", "--compare", "--out", out)
    status, told, errors = zofed_command(*words)
    assert status == 0 and told.split()[:2] == ["tuned", "base"] and "the yes it is" in told, errors
    written = json.loads(out.read_text())
    speaker = asking.of_run(runs["instruction"], compare=True)
    own = speaker.ask([Request(text="ask me =>")])
    assert written == {"prompt": "ask me =>", TUNED: "the yes it is", BASE: own[BASE][0].answer}
    assert own[BASE][0].answer != "the yes it is"
    base = speaker.models[BASE]
    weight = next(base.parameters())
    fresh = next(asking.of_model("tiny").models[TUNED].parameters())
    assert torch.equal(weight, fresh), "the run began with the size of that name and its seed"


def test_label_words_are_told_of_a_rows_prompt(runs: dict[str, Path], zofed_command: Command, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"title": "fine", "text": "a film"}\n\n{"title": "dull", "text": "a film", "label": 0}\n')
    status, told, errors = zofed_command("generate", runs["prompt"], "--file", file, "--out", out)
    assert status == 0 and "> fine, a film It was" in told and "' good'" in told, errors
    fine, dull = map(json.loads, out.read_text().splitlines())
    assert fine["scores"][" good"] > 0.6 > 0.4 > dull["scores"][" good"]
    assert sum(fine["scores"].values()) == pytest.approx(1)
    status, told, errors = zofed_command("generate", runs["prompt"], "a film")
    assert status == 2 and "no column 'title'" in errors and len(errors.splitlines()) == 1
    status, told, errors = zofed_command("generate", runs["classification"], "a film", "--compare")
    assert status == 0 and told.split()[:3] == ["tuned", "base", "0"], errors


def test_a_chat_reads_lines_until_it_is_told_to_end(
    runs: dict[str, Path], zofed_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"ask me =>\n\n{'word ' * 200}\nask me =>\n/quit\nask me =>\n"))
    status, told, errors = zofed_command("generate", runs["instruction"], "--chat")
    assert status == 0 and told == "the yes it is\n" * 2 and "no room for an answer" in errors
    monkeypatch.setattr("sys.stdin", io.StringIO("ask me =>"))
    assert zofed_command("generate", runs["instruction"], "--chat")[1] == "the yes it is\n"


@pytest.fixture
def chatty(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A saved model whose tokenizer has a chat template."""
    import shutil

    folder = tmp_path / "chatty"
    shutil.copytree(runs["text"] / "model", folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_model_is_asked_by_its_chat_template(
    chatty: Path, tmp_path: Path, zofed_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = generation.answers

    def seen(model: Any, prompts: Any, *rest: Any) -> Any:
        asked.extend(load_tokenizer(str(chatty)).decode(list(prompt)) for prompt in prompts)
        return answers(model, prompts, *rest)

    monkeypatch.setattr(generation, "answers", seen)
    file = tmp_path / "asked.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = ['"One"', '{"prompt": "Two"}', json.dumps({"messages": [*turns, {"role": "assistant", "content": "x"}]})]
    file.write_text("\n".join(rows))
    assert zofed_command("generate", chatty, "--file", file, "--max-new-tokens", 2)[0] == 0
    assert asked == ["[user]One\n[assistant]", "[user]Two\n[assistant]", "[system]Be brief.\n[user]Hi\n[assistant]"]
    asked.clear()
    assert zofed_command("generate", chatty, "One", "--plain", "--max-new-tokens", 2)[0] == 0
    assert asked == ["One"]
    asked.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    status, _, errors = zofed_command("generate", chatty, "--chat", "--max-new-tokens", 2)
    assert status == 0 and asked[0] == "[user]One\n[assistant]", errors
    assert asked[1].startswith("[user]One\n[assistant]") and asked[1].endswith("[user]Two\n[assistant]")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["text"], "nothing is asked"),
        (["text", "a", "--chat"], "PROMPT and --chat all say what is asked"),
        (["text", ""], "an empty prompt has no answer"),
        (["text", " \n "], "an empty prompt has no answer"),
        (["text", "word " * 200], "leaves no room for an answer"),
        (["text", "a", "--plain"], "--plain is for a saved model"),
        (["text/model", "a", "--compare"], "not the folder of a run"),
        (["text", "--chat", "--out", "x"], "leave it out of a --chat"),
        (["text", "--file", "nothing.txt"], "cannot be read"),
        (["text", "--file", "blank.txt"], "holds no prompt"),
        (["text", "--file", "bad.jsonl"], "line 2 of"),
        (["text", "--file", "list.jsonl"], "neither an object nor a text"),
        (["text", "--file", "roles.jsonl"], "a message without a role"),
        (["text", "--file", "unasked.jsonl"], "no message to answer"),
        (["text", "--file", "empty.jsonl"], "an empty prompt has no answer"),
        (["nowhere", "a"], "unknown model"),
        (["young", "a"], "has no model yet"),
        (["text", "a", "--device", "cuda:99"], "CUDA devices"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_told_in_a_line(
    runs: dict[str, Path],
    words: list[str],
    wanted: str,
    zofed_command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").symlink_to(runs["text"])
    shutil.copytree(runs["text"], tmp_path / "young", ignore=shutil.ignore_patterns("model"))
    files = {
        "blank.txt": "\n \n",
        "bad.jsonl": '"a"\n{',
        "list.jsonl": "[1]",
        "roles.jsonl": '{"messages": [{"role": "tool", "content": "a"}]}',
        "unasked.jsonl": '{"messages": [{"role": "assistant", "content": "a"}]}',
        "empty.jsonl": '{"label": 1}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    status, told, errors = zofed_command("generate", *words)
    assert status == 2 and wanted in errors and len(errors.splitlines()) == 1 and not told, errors

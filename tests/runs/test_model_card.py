"""Model cards: what the hub reads is right, and nothing that a person or a file named becomes markup."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from zofed import config
from zofed.runs import model_card
from zofed.runs.model_card import Exported
from zofed.runs.run_folder import RunFolder

EVIL = "a `` b ``` c | d\n# heading\n<script>x</script> [link](http://x) ![i](y) *b* ~~~"
NAME = EVIL.replace("/", "").replace("\n", " ")  # as a file may have it
SECTIONS = ["Use", "Training", "Scores", "The same weights again", "Licence"]


def card_of(folder: Path, began_with: str = "some-owner/base", settings: Any = (), **summary: Any) -> str:
    folder.mkdir()
    (folder / "settings.toml").write_text(config.to_toml(config.resolve(dict(settings))), encoding="utf-8")
    run = RunFolder(folder)
    run.write_summary({"journal_head": "ab" * 16, "eval_loss_start": 3.0, "eval_loss_end": 2.5} | summary)
    return model_card.text(run, Exported("merged", began_with, "cd" * 32, 7, True, "text-generation", "pass\n"))


def kinds_in(markdown: str) -> list[str]:
    """Types of all parts of a page but its head, inline ones too."""
    page = markdown.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [child.type for token in tokens for child in (token, *(token.children or ()))]


def headings(markdown: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown.split("\n---\n", 1)[1])
    return [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]


def test_the_head_says_what_the_hub_asks_for(tmp_path: Path) -> None:
    settings = {"dataset": "sst2", "bp-dataset": "/data/datasets_subset/dclm", "mode": "instruct"}
    data = ModelCard(card_of(tmp_path / "run", settings=settings)).data
    assert data.to_dict() == {
        "base_model": "some-owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["stanfordnlp/sst2", "codelion/dclm-baseline-100M"],
        "tags": ["zofed"],
    }


@pytest.mark.parametrize("base", ["/home/me/models/mine", "tiny", "no: [yaml"])
def test_what_is_not_of_the_hub_is_no_base_model(tmp_path: Path, base: str) -> None:
    card = card_of(tmp_path / "run", base, {"dataset": "sample-dclm"})
    assert ModelCard(card).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "/home" not in card


def test_names_and_values_stay_text(tmp_path: Path) -> None:
    settings = {"task": "prompt", "template": f"{{{{ text }}}} {EVIL}", "label-words": " `````yes, | no"}
    settings |= {"dataset": f"/secret/place/{NAME}.tsv"}
    summary = {"data_read": [{"dataset": f"/secret/{NAME}", "documents": 3}]}
    summary |= {"data": {"documents": EVIL}, "base": {"revision": EVIL, "weights": EVIL}, "versions": {"torch": "1"}}
    card = card_of(tmp_path / f"run {NAME}", "/secret/base|x", settings, **summary)
    plain = card_of(tmp_path / "plain", "base", {"task": "prompt", "template": "{{ text }} a", "label-words": "a, b"})
    assert headings(card)[1:] == headings(plain)[1:] == SECTIONS
    kinds = set(kinds_in(card))
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "s_open"}
    assert "/secret" not in card
    tokens = MarkdownIt("commonmark").parse(card.split("\n---\n", 1)[1])
    blocks = [token.content for token in tokens if token.type == "fence"]
    assert len(blocks) == 2 and "label-words" in blocks[1]
    (tmp_path / "settings.toml").write_text(blocks[1], encoding="utf-8")
    assert config.read_toml(tmp_path / "settings.toml")["template"] == settings["template"]


def test_a_table_keeps_its_columns(tmp_path: Path) -> None:
    row = model_card.table([["a", "b"], [model_card.code("x | `y`"), "1"]])
    tokens = MarkdownIt("commonmark").enable("table").parse(row)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert len(cells) == 4 and "x | `y`" in cells[2]


def test_scores_and_baselines_stand_side_by_side(tmp_path: Path) -> None:
    card = card_of(
        tmp_path / "run", accuracy=0.9, baselines={"uniform": 0.69, "zero_shot_accuracy": 0.5}, evaluated={
            "examples": 256, "held_out": 1000, "sources": 0, "of_sources": 0,
        },
    )  # fmt: skip
    for line in (
        "|  | loss | accuracy |",
        "| end | 2.5000 | 0.9000 |",
        "| start | 3.0000 |  |",
        "| baseline uniform | 0.6900 |  |",
        "| baseline zero shot |  | 0.5000 |",
        "256 of 1,000 examples",
    ):
        assert line in card

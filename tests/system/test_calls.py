"""The way from a command to a forward pass is the one that docs/calls.md tells."""

import itertools
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel

from zofed.base.files import PACKAGE, ROOT

Zofed = Callable[..., tuple[int, str, str]]


def test_the_page_of_calls_is_the_stack_of_a_step(
    zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stacks: list[list[tuple[str, str]]] = []
    forward = GPT2LMHeadModel.forward

    def noting(*arguments: Any, **named: Any) -> Any:
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        stacks.append(
            [(path.relative_to(PACKAGE).as_posix(), name) for path, name in frames if path.is_relative_to(PACKAGE)]
        )
        return forward(*arguments, **named)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", noting)
    out = ("--device", "cpu", "--eval-examples", "1", "--save-interval", "0", "--out", tmp_path / "run")
    assert zofed_command("train", "--steps", "1", "--queries", "2", *out)[0] == 0
    stack = next(stack for stack in reversed(stacks) if any(path == "core/perturbed.py" for path, _ in stack))
    found = [
        (path, [name for _, name in frames if not name.startswith("<")])
        for path, frames in itertools.groupby(stack, lambda frame: frame[0])
    ]
    page = (ROOT / "docs" / "calls.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w/.]+)\]\([^)]*\) (.*?) \|", page, re.MULTILINE)
    told = [(path, re.findall(r"`(\w+)`", names)) for path, names in rows]
    assert [row for row in found if row[1]] == told

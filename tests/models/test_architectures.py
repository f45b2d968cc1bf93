"""Architectures people use: perturbed copies, of adapters too, have the losses of moved weights."""

import re
from pathlib import Path

import pytest
from torch import nn

import zofed
from zofed.models.scopes import layers

pytest.importorskip("peft", reason="peft is not installed")

from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES, BOUND, HEADER, LARGEST_SLOPE_ERROR, SCOPES, Architecture

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(zofed.__file__).parent.parent / "docs" / "models.md"


def name(architecture: Architecture) -> str:
    return f"{architecture.kind}-{architecture.task}"


def table() -> list[str]:
    """Lines of the page's table, its header first."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER[0])
    return [line for line in lines[start : start + 2 + len(ARCHITECTURES)] if line.startswith("|")]


@pytest.mark.first(8)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name)
def test_perturbed_copies_have_the_losses_of_moved_weights_and_the_page_says_so(
    architecture: Architecture,
) -> None:
    row = architectures.examine(architecture)
    assert row.layers > 0
    for found in (row.full, row.lora):
        assert found.slope_error < LARGEST_SLOPE_ERROR
        if architecture.alone:
            (told,) = found.told  # once, though measured twice
            assert re.match("the loss cannot run for many perturbed copies at once .*random", told)
        else:
            assert found.told == ()
            assert found.error is not None
            assert found.error <= BOUND
    assert architectures.line(architecture, row) in table()


def test_the_page_has_these_architectures_and_no_others() -> None:
    first, second, *lines = table()
    assert (first, second) == HEADER
    named = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]
    assert named == [(one.name, one.kind, architectures.TASKS[one.task]) for one in ARCHITECTURES]
    assert len({one.kind for one in ARCHITECTURES if not one.alone}) >= 24


def inside(model: nn.Module, module: nn.Module) -> set[str]:
    ids = {id(tensor) for tensor in module.parameters()}
    return {key for key, tensor in model.named_parameters() if id(tensor) in ids}


@pytest.mark.first(8)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name)
def test_scopes_choose_what_they_are_named_after(architecture: Architecture) -> None:
    model = architecture.build()
    chosen = {scope: set(architectures.chosen(model, scope)) for scope in (*SCOPES, "full")}
    blocks = [inside(model, block) for block in layers(model)]
    assert blocks and chosen["last-1"] >= blocks[-1]
    assert not chosen["last-1"] & set[str]().union(*(block - blocks[-1] for block in blocks[:-1]))
    assert not any(re.search("embed_(tokens|positions)|wte|wpe|word_embeddings", one) for one in chosen["last-1"])
    assert not chosen["head"] & set[str]().union(*blocks)
    assert chosen["head"] <= chosen["reduced"] <= chosen["last-1"] or not chosen["reduced"]
    norms = {one for one in chosen["full"] if re.search(r"(norm|ln_?\w*)\w*\.(weight|bias)$", one, re.IGNORECASE)}
    assert chosen["norms"] == norms
    assert chosen["biases"] == {one for one in chosen["full"] if one.endswith("bias")}

"""Which model of a family fits a GPU: shapes of the sizes that their names say, the search, what is told."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zofed import config
from zofed.base.errors import UserError
from zofed.commands import cli
from zofed.preflight import families
from zofed.preflight.families import FAMILIES, RESERVE

ODD_NAMES = {"gpt2": 0.124e9, "gpt2-medium": 0.355e9, "gpt2-large": 0.774e9, "gpt2-xl": 1.558e9}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_have_the_parameters_that_their_names_say_and_grow(family: str) -> None:
    counts = []
    for name, shape in FAMILIES[family].items():
        values = {key: value for key, value in shape.items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["model_type"], **values))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        size, unit = (re.findall(r"([\d.]+)([MB])$", name, re.IGNORECASE) or [("0", "B")])[-1]
        said = ODD_NAMES.get(name) or float(size) * {"M": 1e6, "B": 1e9}[unit.upper()]
        assert counts[-1] == pytest.approx(said, rel=0.24), name  # Llama-3.2-1B has 1.24
    assert counts == sorted(counts)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"{layers} layers": families._llama(32, 64, layers, 4, 2, vocab_size=512) for layers in (1, 2, 3)}
    monkeypatch.setitem(FAMILIES, "llama", shapes)


def settings(**values: Any) -> config.Settings:
    return config.resolve({"block-size": 16} | values)


@pytest.mark.usefixtures("small")
def test_the_largest_that_fits_is_found_and_the_next_one_told() -> None:
    chosen, names = settings(), list(FAMILIES["llama"])
    peaks = [families._peak(chosen, name, FAMILIES["llama"][name], "fo") for name in names]
    assert peaks == sorted(peaks)
    for index, peak in enumerate(peaks):
        room = peak + RESERVE
        found = families.largest(chosen, "llama", room, ["fo"])["fo"]
        assert (found.name, found.peak) == (names[index], peak)
        assert (found.larger, found.larger_peak) == ((*names, "")[index + 1], (*peaks, 0)[index + 1])
        assert families.largest(chosen, "llama", room - 1, ["fo"])["fo"].name == ("", *names)[index]


@pytest.mark.usefixtures("small")
def test_forward_passes_fit_more_than_backpropagation() -> None:
    zo, fo = (
        families.largest(settings(adapter="lora", **{"perturbations-per-pass": 1}), "llama", 2**40, [mode])[mode].peak
        for mode in ("zo", "fo")
    )
    assert zo < fo


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"unknown family 'lama': did you mean 'llama'"):
        families.largest(settings(), "lama", 2**40, ["zo"])


@pytest.mark.usefixtures("small")
def test_the_command_tells_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["zofed", "models", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        told = capsys.readouterr()
        return told.out, told.err

    out, _ = run("--fits", "24", "--mode", "zo", "--adapter", "lora", "--block-size", "16")
    assert "llama on 24 GiB" in out and "adapter lora" in out and re.search(r"zo +3 layers +0.0 +- +-", out), out
    _, err = run("--fits", "24", "--model", "tiny")
    assert "--model names one: leave one of them out" in err
    for wrong in ("0.01", "nan", "inf"):
        assert f"--fits {wrong} is no memory of a GPU" in run("--fits", wrong)[1]
    assert "--family opt goes with --fits" in run("--family", "opt")[1]
    assert "--fits stands before download" in run("--fits", "24", "download", "a/b")[1]
    out, _ = run("--model", "tiny")
    assert "predicted peak of a step" in out
    _, err = run("--fits", "24", "--block-size", "4096000", "--mode", "zo")
    assert "3 layers" in err or "2 layers" in err or "1 layers" in err, err

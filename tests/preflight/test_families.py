"""Which model of a family fits a GPU: shapes of the published sizes, the search, what is told."""

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

PUBLISHED = {  # parameters, a tied one counted once
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512, "Qwen2.5-14B": 14_770_033_664, "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648, "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984, "opt-13b": 12_853_473_280, "opt-30b": 29_974_540_288, "opt-66b": 65_719_701_504,
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_have_the_published_numbers_of_parameters_and_grow(family: str) -> None:
    counts = []
    for name, shape in FAMILIES[family].items():
        values = {key: value for key, value in shape.items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["model_type"], **values))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        assert counts[-1] == PUBLISHED[name], name
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
    assert "--fits is no option of zofed models download: leave it out" in run("--fits", "24", "download", "a/b")[1]
    out, _ = run("--model", "tiny")
    assert "predicted peak of a step" in out
    _, err = run("--fits", "24", "--block-size", "4096000", "--mode", "zo")
    assert "3 layers" in err or "2 layers" in err or "1 layers" in err, err

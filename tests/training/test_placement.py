"""A model whose layers lie on two devices gives what it gives on one, in every mode: no operation mixes them."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from federations import federate, ignore, records_of
from networks import BERT, gpt2_config, llama_config, save_bases
from pretended import GPUS, pretended
from safetensors.torch import load_file
from trainings import WAYS, train_cut
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from zofed import config
from zofed.base import torchrun
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import journal, metrics
from zofed.core.devices import input_device
from zofed.core.digests import named_parameters, tensors_digest
from zofed.core.measure import Measure
from zofed.data.encoding import load_tokenizer
from zofed.federated import client
from zofed.models import placement
from zofed.models.placement import Placement
from zofed.runs.run_folder import RunFolder
from zofed.training import asking, central, device_pool, finalize, process, replicas
from zofed.training.task import Task

Quick = Callable[..., Settings]
Capsys = pytest.CaptureFixture[str]
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 2}
PROMPT: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "label_words": " bad, good"}
RUNS: dict[str, dict[str, Any]] = {
    "zo": {"optimizer": "adamw", "controls": True},
    "LoRA, subspace": LORA | WAYS["core"],
    "LoRA": LORA | {"model": "gpt2"},
    "nf4": LORA | {"quantisation": "nf4"},
    "int8": LORA | {"quantisation": "int8", "mode": "fo"},
    "label words": PROMPT,
    "long label words": PROMPT | {"label_words": " not good, good", "shots": 1},
    "classes": {"task": "classification", "model": "bert"},
    "classes of a causal model": {"task": "classification"},
    "mean of an encoder": {"task": "classification", "pooling": "mean"},
    "frozen encoder": {"task": "classification", "pooling": "mean", "freeze_encoder": True},
    "answers": {"task": "instruction", "template": "{{ label }}", "columns": "completion=text"},
    "per-query": {"query_batches": "per-query", "local_steps": 2},
    "prefix": {"adapter": "prefix", "virtual_tokens": 2},
    "prompt": {"adapter": "prompt", "virtual_tokens": 2},
    "kept states": {"scope": "last-1", "query_batches": "per-query", "steps": 6},
    "one by one": {"directions": "rademacher", "optimizer": "mudamw"},
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"forward_dtype": "bfloat16"},
    "accuracy": {"objective": "accuracy", "epsilon": 0.1},
    **WAYS,
}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with two GPUs that are free, as far as placement = auto is concerned."""

    def devices(settings: Settings) -> list[torch.device]:
        return list(GPUS) if settings.placement == "auto" else [process.device(settings)]

    for module in (replicas, finalize):
        monkeypatch.setattr(module, "layer_devices", devices)
    monkeypatch.setattr(replicas, "free_on", lambda devices: [2**30] * len(devices))
    with pretended(monkeypatch):
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of four layers, each as large as the embedding."""
    kinds: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(
            llama_config(vocab_size=512, num_hidden_layers=4, intermediate_size=96, max_position_embeddings=48)
        ),
        "gpt2": lambda: GPT2LMHeadModel(gpt2_config(vocab_size=512, n_layer=4, n_embd=24, n_positions=48)),
        "bert": lambda: BertForMaskedLM(BERT),
    }
    return save_bases(tmp_path_factory.mktemp("bases"), kinds, load_tokenizer("shipped"))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short reviews of two classes."""
    texts = ("a fine film", "not worth the time", "a long and quiet story", "it may be seen")
    rows = [{"text": f"{texts[n % 4]}, number {n}", "label": int(n % 4 in (0, 2))} for n in range(20)]
    path = tmp_path_factory.mktemp("films") / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def placed(settings: Settings) -> Settings:
    return settings.model_copy(update={"placement": "auto"})


@pytest.mark.bits
@pytest.mark.first(1)
@pytest.mark.parametrize("way", RUNS)
def test_a_run_over_two_devices_is_the_run_on_one(
    quick: Quick, bases: Path, films: Path, tmp_path: Path, way: str, request: pytest.FixtureRequest, capsys: Capsys
) -> None:
    values = {"model": "llama", "device": "auto", "steps": 2} | RUNS[way]
    if "task" in values:
        values["dataset"] = str(films)
    settings = quick(**values | {"model": str(bases / values["model"])})
    one = central.train(settings, tmp_path / "one", ignore)
    request.getfixturevalue("two_gpus")
    two = central.train(placed(settings), tmp_path / "two", ignore)
    assert records_of(tmp_path / "two") == records_of(tmp_path / "one")
    assert (two["digest"], two["eval_loss_end"]) == (one["digest"], one["eval_loss_end"])
    assert re.search(r"placement: [0-4] layers? on cuda:0, [1-4] on cuda:1\n", capsys.readouterr().out)
    assert saved(tmp_path / "two") == saved(tmp_path / "one")


def saved(run: Path) -> dict[str, dict[str, str]]:
    """Of each file of a run's model that holds tensors their digests, by name."""
    return {
        file.name: {name: tensors_digest({name: tensor}) for name, tensor in load_file(file).items()}
        for file in sorted((run / "model").glob("*.safetensors"))
    }


@pytest.mark.slow  # six runs, of which two are cut
@pytest.mark.parametrize("way", ["fo", "hybrid", "zo"])
def test_a_run_over_two_devices_goes_on_and_replays(
    quick: Quick, bases: Path, tmp_path: Path, way: str, two_gpus: None
) -> None:
    values: dict[str, Any] = {"model": str(bases / "gpt2"), "device": "auto", "steps": 3, "keep_gradients": way != "zo"}
    values |= {"optimizer": "adamw", "save_interval": 1} | WAYS.get(way, {}) | {"placement": "auto"}
    whole = central.train(quick(**values), tmp_path / "whole", ignore)
    train_cut(quick(**values), tmp_path / "cut", at=2)
    assert central.resume(tmp_path / "cut", ignore)["digest"] == whole["digest"]
    task = Task.load(quick(**values))
    again, folder = task.replica(), RunFolder(tmp_path / "whole")
    again.replay(journal.read(folder.journal).entries, folder.update)  # gradients that were kept on the processor
    assert again.digest() == whole["digest"]


@pytest.mark.slow  # federations
@pytest.mark.parametrize("way", ["fo", "hybrid", "zo"])
def test_clients_over_two_devices_answer_as_on_one(
    quick: Quick, bases: Path, tmp_path: Path, way: str, request: pytest.FixtureRequest
) -> None:
    values: dict[str, Any] = {"model": str(bases / "llama"), "device": "auto", "rounds": 2} | WAYS.get(way, {})
    settings = quick(**values)
    one = federate(settings, tmp_path / "one", 2)
    request.getfixturevalue("two_gpus")
    two = federate(placed(settings), tmp_path / "two", 2)
    client.forget()
    assert records_of(tmp_path / "two") == records_of(tmp_path / "one")
    assert two["digest"] == one["digest"]


@pytest.mark.slow  # a run, four models and two diagnoses, half of them below Python's modes
def test_a_run_over_two_devices_is_asked_and_diagnosed_as_on_one(
    quick: Quick, bases: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = quick(model=str(bases / "llama"), device="auto", steps=1, adapter="prefix", virtual_tokens=2)
    central.train(settings, tmp_path / "run", ignore)
    asked = [asking.Request("it may be"), asking.Request("a long")]
    one = asking.of_run(tmp_path / "run", compare=True).ask(asked, 4)
    diagnosed = central.diagnosis(settings, 2)
    request.getfixturevalue("two_gpus")
    assert asking.of_run(tmp_path / "run", compare=True, changes={"placement": "auto"}).ask(asked, 4) == one
    assert central.diagnosis(placed(settings), 2) == diagnosed


def model_of(bases: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(bases / name).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parts_lie_in_their_order_and_tied_ones_together(bases: Path, name: str) -> None:
    model = model_of(bases, name)
    found = placement.over(model, GPUS, [2**30] * 2)
    layers = [found.device_of(f"{'model.layers' if name == 'llama' else 'transformer.h'}.{n}.x") for n in range(4)]
    assert layers == sorted(layers, key=str) and set(layers) == set(GPUS)
    embeddings = "model.embed_tokens" if name == "llama" else "transformer.wte"
    assert found.device_of(f"{embeddings}.weight") == GPUS[0]
    assert found.device_of("lm_head.weight") == GPUS[name == "llama"]  # gpt2's is tied to its embeddings
    assert "lm_head" in found.parts  # so that what it is called with is brought there


def test_the_smaller_device_holds_less(bases: Path) -> None:
    model = model_of(bases, "llama")
    size = sum(tensor.nbytes for tensor in model.parameters())
    parts = placement.over(model, GPUS, [size, size // 2]).parts
    held = [name for name, device in parts.items() if device == GPUS[1] and "layers" in name]
    assert held == ["model.layers.3"]


def test_rounded_matrices_count_as_what_they_will_take(bases: Path) -> None:
    model = model_of(bases, "llama")
    free = [sum(tensor.nbytes for tensor in model.parameters()) // 2] * 2
    rounded = {name: 0.5 for name, tensor in model.named_parameters() if ".layers." in name and tensor.dim() > 1}
    placement.over(model, GPUS, free, rounded)
    with pytest.raises(
        UserError, match=r"the model takes 0\.\d+ GB, but of the .* free on 2 devices .* or quantisation"
    ):
        placement.over(model, GPUS, free)


def test_without_accelerate_the_package_is_named(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"accelerate is not installed.*pip install accelerate"):
        placement.over(model_of(bases, "gpt2"), GPUS, [2**30] * 2)


class Mixing(LlamaForCausalLM):
    """Its own code brings the last layer's weights to what the first one reads."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids) + self.model.layers[-1].input_layernorm.weight
        return super().forward(inputs_embeds=embedded, **rest)


def test_a_model_that_mixes_devices_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixing(llama_config(num_hidden_layers=4)).eval()
    with pretended(monkeypatch), pytest.raises(UserError, match="Mixing does not run with its layers on different"):
        placement.bring(model, placement.over(model, GPUS, [2**30] * 2))


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"devices": "cpu,cpu"}])
def test_placement_takes_the_place_of_named_devices(quick: Quick, other: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"placement = 'auto' takes all GPUs .*: leave {next(iter(other))} out"):
        config.resolve({"placement": "auto"} | other)


def test_torchrun_and_placement_are_refused_together(quick: Quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "place", lambda: torchrun.Place(0, 0, 2))
    with pytest.raises(UserError, match="takes all GPUs of this machine for one process, and torchrun starts several"):
        device_pool.check_ranks(placed(quick(device="auto")))


def test_with_one_device_all_lies_there_and_the_run_says_so(quick: Quick, tmp_path: Path, capsys: Capsys) -> None:
    settings = placed(quick(device="auto", steps=1))
    central.train(settings, tmp_path / "run", ignore)
    where = process.device(settings)
    assert f"on {where}, which holds all of the model\n" in capsys.readouterr().out


def test_losses_below_hooks_of_accelerate_are_those_without(bases: Path) -> None:
    """A script's own model, dispatched by the library itself, whose hooks stand in the place of each forward."""
    found = []
    for hooked in (False, True):
        model = model_of(bases, "llama")
        if hooked:
            parts = {name or "model": torch.device("cpu") for name in ("model", "lm_head")}
            accelerate.dispatch_model(model, parts, torch.device("cpu"), force_hooks=True)
        ids = torch.arange(12).view(2, 6)
        batch = {"input_ids": ids, "labels": ids}
        parameters = named_parameters(model)
        measure = Measure(model, parameters, "rank1")
        found.append(measure.slopes(lambda m=model, b=batch: metrics.loss_of(m, b), [1, 2], 1e-3, 4))
    assert found[0] == found[1]


class HeadFirst(LlamaForCausalLM):
    """A model whose first parameter is not what reads its inputs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._modules = dict(reversed(self._modules.items()))


def test_inputs_go_where_the_embeddings_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HeadFirst(llama_config(num_hidden_layers=4)).eval()
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    wanted = metrics.loss_of(model, batch).item()
    with pretended(monkeypatch):
        placement.bring(model, Placement({"": GPUS[0], "lm_head": GPUS[1]}))
        assert next(model.parameters()).device == GPUS[1] != input_device(model)
        assert metrics.loss_of(model, batch).item() == wanted


def test_pretended_devices_refuse_to_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        one, other = (torch.ones(2, device=device) for device in GPUS)
        assert (one.device, (one + 1).device, one.to(other).device) == (GPUS[0], GPUS[0], GPUS[1])
        for mix in (lambda: one + other, lambda: one @ torch.ones(2), lambda: torch.cat([one, other])):
            with pytest.raises(RuntimeError, match="on one device"):
                mix()
        with pytest.raises(TypeError, match="cuda:0"):
            one.numpy()

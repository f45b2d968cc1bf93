"""Hidden states that are kept give the bits of those that are computed, and no frozen layer computes them twice."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from benchmarks import tiny_models
from zofed.core import metrics, trunk
from zofed.core.digests import named_parameters
from zofed.core.trunk import Trunk
from zofed.models import scopes

pytestmark = pytest.mark.usefixtures("one_thread")
Batch = dict[str, Tensor]
MODELS = itertools.count()  # what each keeps has a name of its own


def kept_by(model: nn.Module, names: list[str], folder: Path, limit: int = 10**8, layers: Any = None) -> Trunk:
    """A trunk for a model of which the named parameters train."""
    everything = named_parameters(model)
    for name, parameter in everything.items():
        parameter.requires_grad_(name in names)
    trained = {name: everything[name] for name in names}
    found = Trunk(trained, layers or scopes.layers(model), folder, f"model {next(MODELS)}", limit)
    trunk.keep(model, found)
    return found


def some(batch: Batch, rows: list[int]) -> Batch:
    return {name: tensor[rows] for name, tensor in batch.items()}


def calls_of(module: nn.Module) -> list[int]:
    """Grows by one whenever a module runs."""
    found: list[int] = []
    module.register_forward_hook(lambda *_: found.append(1))
    return found


CAUSAL = ("gpt2", "llama", "opt", "bloom", "gemma2", "qwen3", "phi", "gpt_neox", "falcon", "mamba")
CLASSIFIERS = ("bert", "roberta", "distilbert", "modernbert", "gpt2")


@pytest.mark.first(5)
@pytest.mark.parametrize(
    ("task", "kind"), [("causal", kind) for kind in CAUSAL] + [("classifier", kind) for kind in CLASSIFIERS]
)
def test_kept_states_give_the_bits_that_computed_ones_give(task: str, kind: str, tmp_path: Path) -> None:
    model = tiny_models.build(task, kind)
    batch = tiny_models.examples(task, 5)
    found = kept_by(model, scopes.trainable_names(model, "last-1"), tmp_path)
    calls = calls_of(next(part for part in scopes.layers(model)[0].modules() if not list(part.children())))
    with torch.no_grad():
        plain = {rows: metrics.output_of(model, some(batch, list(rows))) for rows in ((0, 1, 2, 3, 4), (3, 1, 0))}
        first = metrics.filled(model, batch)
        metrics.filled(model, some(batch, [3, 1, 0]))  # each size of a batch is tried once
        metrics.filled(model, batch)  # where that size showed that bits depend on it, this one's are kept anew
        computed = len(calls)
        for rows, one in plain.items():
            again = metrics.filled(model, some(batch, list(rows)))
            if found._alone or len(rows) == 5:
                assert len(calls) == computed, "a frozen layer ran"
            assert torch.equal(again[trunk.KEY], first[trunk.KEY][list(rows)]) or not found._alone
            other = metrics.output_of(model, again)
            assert torch.equal(one.loss, other.loss) and torch.equal(one.logits, other.logits)
        assert trunk.KEY not in batch and torch.equal(
            metrics.output_of(model, batch).logits, plain[0, 1, 2, 3, 4].logits
        )


def test_nothing_is_kept_where_an_embedding_or_the_first_layer_trains(tmp_path: Path) -> None:
    batch = tiny_models.examples("causal")
    for scope in (r"wte", "norms", "full", r"h\.0\.mlp"):
        model = tiny_models.build("causal", "gpt2")
        kept_by(model, scopes.trainable_names(model, scope), tmp_path)
        assert metrics.filled(model, batch) is batch, scope


def test_a_head_alone_leaves_all_layers_below(tmp_path: Path) -> None:
    model = tiny_models.build("classifier", "bert")
    found = kept_by(model, scopes.trainable_names(model, "head"), tmp_path)
    assert trunk.KEY in metrics.filled(model, tiny_models.examples("classifier"))
    assert found.cut is not None and len(found.cut.layers) == tiny_models.LAYERS


def test_a_model_in_train_mode_computes_everything(tmp_path: Path) -> None:
    model = tiny_models.build("causal", "gpt2").train()
    kept_by(model, scopes.trainable_names(model, "last-1"), tmp_path)
    batch = tiny_models.examples("causal")
    assert metrics.filled(model, batch) is batch
    model.eval()
    assert trunk.KEY in metrics.filled(model, batch)


def test_other_settings_of_a_pass_have_states_of_their_own(tmp_path: Path) -> None:
    model = tiny_models.build("causal", "gpt2")
    kept_by(model, scopes.trainable_names(model, "last-1"), tmp_path)
    batch = tiny_models.examples("causal")
    plain, coarse = (metrics.filled(model, batch, dtype)[trunk.KEY] for dtype in ("weights", "bfloat16"))
    assert not torch.equal(plain, coarse)
    assert torch.equal(metrics.filled(model, batch)[trunk.KEY], plain)


def test_the_bound_holds_and_what_fits_no_more_is_computed(tmp_path: Path) -> None:
    model = tiny_models.build("causal", "llama")
    size = tiny_models.TOKENS * tiny_models.WIDTH * 4
    found = kept_by(
        model, scopes.trainable_names(model, "last-1"), tmp_path, limit=3 * (size + 100)
    )  # a record has a head, too
    batch = tiny_models.examples("causal", 5)
    with pytest.warns(UserWarning, match=r"kept of 3 examples .* those of all 700 take 0\.0014 GB") as told:
        first = metrics.filled(model, batch, of=700)[trunk.KEY]
        assert torch.equal(metrics.filled(model, batch, of=700)[trunk.KEY], first)
    assert len(told) == 1 and found._states._end <= 3 * (size + 100)
    with torch.no_grad():
        whole = metrics.output_of(model, batch).loss
        assert torch.equal(metrics.output_of(model, metrics.filled(model, batch)).loss, whole)


class Layer(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change, self.linear = change, nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, memory: list[Tensor]) -> Tensor:
        memory.append(hidden_states)
        return self.linear(self.change(hidden_states, memory))


class Stack(nn.Module):
    """Layers that see what the first was given, as some models' do, or whatever `change` makes of it."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([Layer(change) for _ in range(3)])

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        hidden, memory = self.embed(input_ids), list[Tensor]()
        for layer in self.layers:
            hidden = layer(hidden, memory=memory)
        return CausalLMOutput(loss=hidden.square().mean(), logits=hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hidden, memory: hidden + memory[len(memory) // 2], "gives other outputs: the layers above need more"),
        (lambda hidden, memory: hidden + torch.arange(len(hidden))[:, None, None], "place in the batch"),
    ],
)
def test_a_model_whose_states_cannot_be_kept_says_so_once_and_goes_on(change: Any, reason: str, tmp_path: Path) -> None:
    model = Stack(change).eval()
    kept_by(model, ["layers.2.linear.weight"], tmp_path, layers=list(model.layers))
    ids = torch.arange(8).view(4, 2)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.warns(UserWarning, match=reason):
        assert metrics.filled(model, batch) is batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.filled(model, batch) is batch


def test_where_the_number_of_rows_has_a_part_whole_batches_are_kept(tmp_path: Path) -> None:
    model = Stack(lambda hidden, _: hidden * len(hidden)).eval()
    found = kept_by(model, ["layers.2.linear.weight"], tmp_path, layers=list(model.layers))
    ids = torch.arange(8).view(4, 2)
    batch = {"input_ids": ids, "labels": ids}
    calls = calls_of(model.layers[1].linear)
    metrics.filled(model, batch)
    assert not found._alone
    del calls[:]
    for rows, runs in (([2, 0, 1, 3], False), ([2, 0], True), ([0, 2], False)):
        part = some(batch, rows)
        with torch.no_grad():
            plain = metrics.output_of(model, part).logits
            del calls[:]
            other = metrics.output_of(model, metrics.filled(model, part)).logits
        assert torch.equal(plain, other) and bool(calls) is runs

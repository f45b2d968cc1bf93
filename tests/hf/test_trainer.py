"""Hugging Face's Trainer with steps by forward passes: what it trains, keeps, continues and refuses."""

import dataclasses
import itertools
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import gpt2_config
from torch import nn
from transformers import GPT2LMHeadModel, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import zofed
from zofed.base.errors import UserError
from zofed.core.journal import read
from zofed.hf import ZerothOrderConfig, ZerothOrderMixin, ZerothOrderTrainer, rebuild, run_files

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": (ids := [(3 * row + at * at) % 29 for at in range(12)]), "labels": ids} for row in range(24)]
SMALL = ZerothOrderConfig(queries=4)


def model(**more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = gpt2_config()
    for name, value in more.items():
        setattr(config, name, value)
    return GPT2LMHeadModel(config)


def adapted(seed: int) -> nn.Module:
    """A model with an adapter that is drawn anew for each seed."""
    base = model()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    few = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "save_steps": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(folder), **few | quiet | more)


def trainer(folder: Path, net: nn.Module | None = None, config: ZerothOrderConfig = SMALL, **more: Any) -> Any:
    """One that is ready to train on the rows; `also` goes to the trainer, all else to its arguments."""
    also = more.pop("also", {})
    return ZerothOrderTrainer(
        model=net or model(),
        args=arguments(folder, **more),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        zeroth_order=config,
        **also,
    )


def digest(of: Any) -> str:
    return of.zeroth_order.digest()


def steps(path: Path) -> list[Any]:
    return [entry.record for entry in read(path).entries]


class Seen(TrainerCallback):
    """Which of the Trainer's events came, in their order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.events.append("begin")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.events.append("moved")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.events.append("evaluated")


def test_it_learns_tells_callbacks_and_its_journal_alone_rebuilds_the_weights(tmp_path: Path) -> None:
    seen = Seen()
    run = trainer(
        tmp_path, max_steps=20, eval_strategy="steps", eval_steps=10, lr_scheduler_type="cosine", warmup_steps=3,
        learning_rate=0.04, save_steps=10,
        also={"callbacks": [seen]},
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert losses[-1] < before - 0.04
    assert seen.events[:3] == ["evaluated", "begin", "moved"] and seen.events.count("moved") == 20
    records = steps(tmp_path / "run.zofed")
    logged = [row for row in run.state.log_history if "learning_rate" in row]
    assert [record.rate for record in records] == [row["learning_rate"] for row in logged]
    assert records[0].rate == 0.0 < records[1].rate < records[2].rate > records[-1].rate  # warmed up, then a cosine
    assert all(row["grad_norm"] > 0 for row in logged)
    assert zofed.replay(model(), tmp_path / "run.zofed") == digest(run)
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "config",
    [
        ZerothOrderConfig(queries=4, optimizer="adamw", finite_difference="two-point"),
        ZerothOrderConfig(queries=4, momentum=0.9, direction_scale="rms", trainable="norms", direction_seed=9),
        ZerothOrderConfig(queries=2, directions="gaussian", normalize_slopes=False, finite_difference="two-point"),
    ],
    ids=["adamw", "norms", "as MeZO's"],
)
def test_each_way_of_stepping_replays_and_continues_to_the_same_weights(
    tmp_path: Path, config: ZerothOrderConfig
) -> None:
    more: dict[str, Any] = {"config": config, "weight_decay": 0.01, "learning_rate": 1e-3, "max_steps": 4}
    whole = trainer(tmp_path / "whole", **more)
    whole.train()
    assert zofed.replay(model(), tmp_path / "whole" / "run.zofed") == digest(whole)
    journal = (tmp_path / "whole" / "run.zofed").read_bytes()
    again = trainer(tmp_path / "whole", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert digest(again) == digest(whole)
    assert (
        (tmp_path / "whole" / "run.zofed").read_bytes() == journal == (tmp_path / "whole" / "run-1.zofed").read_bytes()
    )


class Killed(TrainerCallback):
    """Ends a run in its fifth step, after the checkpoint of the fourth."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


SEEDS = itertools.count()


@pytest.mark.first(1)
@pytest.mark.parametrize("net", [lambda: adapted(next(SEEDS)), model], ids=["an adapter drawn anew", "all weights"])
def test_a_run_that_was_cut_continues_to_the_digest_of_an_undisturbed_one(
    tmp_path: Path, net: Callable[[], nn.Module]
) -> None:
    start = net()
    whole = trainer(tmp_path / "whole", start)
    whole.train()
    cut = net()
    run_files.load_base(cut, tmp_path / "whole", whole.zeroth_order.replica.genesis)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", cut, also={"callbacks": [Killed()]}).train()
    assert len(steps(tmp_path / "cut" / "run.zofed")) == 5
    again = trainer(tmp_path / "cut", net())
    again.train(resume_from_checkpoint=True)
    assert digest(again) == digest(whole)
    assert len(steps(tmp_path / "cut" / "run.zofed")) == 6
    assert len(steps(tmp_path / "cut" / "run-1.zofed")) == 5  # what was there before, whole
    assert rebuild(net(), tmp_path / "cut") == digest(whole)


@pytest.mark.slow
def test_an_adapter_trains_and_nothing_else(tmp_path: Path) -> None:
    net = adapted(1)
    frozen = {name: tensor.clone() for name, tensor in net.named_parameters() if "lora_" not in name}
    run = trainer(tmp_path, net)
    run.train()
    names = [name for name, _, _ in run.zeroth_order.replica.genesis["trainable"]]
    assert names and all("lora_" in name for name in names)
    assert all(torch.equal(dict(net.named_parameters())[name], tensor) for name, tensor in frozen.items())
    saved = (tmp_path / "checkpoint-6" / "adapter_model.safetensors").stat().st_size
    assert saved < 20_000 and run_files.base_file(tmp_path, run.zeroth_order.replica.genesis).stat().st_size < 20_000


@pytest.mark.slow
def test_batches_that_accumulate_are_one_step_of_their_loss(tmp_path: Path) -> None:
    slopes = {}
    for name, batch, parts in (("whole", 4, 1), ("parts", 2, 2)):
        run = trainer(
            tmp_path / name, max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=parts
        )
        run.train()
        first, second = steps(tmp_path / name / "run.zofed")
        slopes[name] = [value * 2.0**record.exponent for record in (first, second) for value in record.coefficients]
        assert run.state.log_history[0]["loss"] == pytest.approx(3.77, abs=0.05)  # a mean, however many parts
    largest = max(map(abs, slopes["whole"]))
    assert max(abs(a - b) for a, b in zip(*slopes.values(), strict=True)) < 0.05 * largest


def doubled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Twice the usual loss."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 2 * F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class Squared(ZerothOrderTrainer):
    def compute_loss(self, *positional: Any, **named: Any) -> Any:
        return super().compute_loss(*positional, **named) ** 2


def test_the_loss_of_the_trainer_is_what_is_measured(tmp_path: Path) -> None:
    def first_loss(of: Any) -> float:
        of.train()
        return of.state.log_history[0]["loss"]

    plain = first_loss(trainer(tmp_path / "plain", max_steps=1))
    assert first_loss(trainer(tmp_path / "double", max_steps=1, also={"compute_loss_func": doubled})) == pytest.approx(
        2 * plain
    )
    assert first_loss(trainer(tmp_path / "smooth", max_steps=1, label_smoothing_factor=0.5)) != pytest.approx(
        plain, rel=1e-6
    )
    squared = Squared(
        model=model(), args=arguments(tmp_path / "squared", max_steps=1), train_dataset=ROWS, zeroth_order=SMALL
    )
    assert first_loss(squared) == pytest.approx(plain**2)


@pytest.mark.slow
def test_dropout_is_off_while_slopes_are_measured(tmp_path: Path) -> None:
    dropped = model(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    run = trainer(tmp_path / "a", dropped)
    run.train()
    plain = trainer(tmp_path / "b")
    plain.train()
    assert digest(run) == digest(plain)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, learning_rate=0.05, max_steps=8,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # the highest loss, as asked
    assert digest(run) == run_files.Place.read(tmp_path / "checkpoint-2").digest
    assert rebuild(model(), tmp_path) == run_files.Place.read(tmp_path / "checkpoint-8").digest


@pytest.mark.slow
def test_training_once_more_sets_the_earlier_journal_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    first, moved = digest(run), (tmp_path / "run.zofed").read_bytes()
    run.train()  # from where it stands, as the Trainer does
    assert "held 2 steps of an earlier run: it is now run-1.zofed" in caplog.text
    assert (tmp_path / "run-1.zofed").read_bytes() == moved
    assert read(tmp_path / "run.zofed").genesis["weights"] == first
    assert rebuild(model(), tmp_path) == digest(run)


@pytest.mark.slow
def test_a_checkpoint_of_a_journal_set_aside_is_still_continued(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    (tmp_path / "checkpoint-2").rename(tmp_path / "mine")
    run.train()
    again = trainer(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "mine"))
    assert [record.round for record in steps(tmp_path / "run.zofed")] == [1, 2, 3, 4]
    assert rebuild(model(), tmp_path) == digest(again)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm = 0.5 .* norm of true gradients"),
        ({"fp16": True}, "fp16 = True .* use bf16"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed = .* shards gradients"),
        ({"fsdp": True}, "fsdp = True"),
        ({"torch_compile": True}, "torch_compile = True"),
        ({"optim": "adafactor"}, r"optim = 'adafactor' .* ZerothOrderConfig\(optimizer='sgd'\)"),
        ({"adam_beta2": 0.95}, "adam_beta2 = 0.95"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0"),
        ({"also": {"optimizers": (object(), None)}}, "an optimizer of your own.*ZerothOrderConfig"),
    ],
)
def test_what_needs_gradients_is_refused_by_name(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    also, asked = more.pop("also", {}), arguments(tmp_path / "out")
    for name, value in more.items():  # set afterwards: some cannot even be constructed on a machine without a GPU
        setattr(asked, name, value)
    with pytest.raises(UserError, match=words):
        ZerothOrderTrainer(model=model(), args=asked, train_dataset=ROWS, zeroth_order=SMALL, **also)
    assert not list((tmp_path / "out").glob("*"))


def test_several_gpus_and_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match=r"2 GPUs are visible.*CUDA_VISIBLE_DEVICES=0"):
        trainer(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    with pytest.raises(UserError, match=r"4 processes would each measure.*torchrun -m zofed train"):
        trainer(tmp_path)


def test_what_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, learning_rate=5e-5, gradient_checkpointing=True)
    assert "gradient checkpointing has no effect" in caplog.text and "learning_rate = 5e-05" in caplog.text
    caplog.clear()
    trainer(tmp_path, max_grad_norm=0.0, optim="adamw_torch", config=ZerothOrderConfig(optimizer="adamw"))
    assert not caplog.text


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    run = trainer(tmp_path, also={"compute_loss_func": lambda outputs, *_, **__: outputs.logits.mean() * float("nan")})
    with pytest.raises(UserError, match=r"step 1 measured a loss that is not finite .*: lower learning_rate = 0.02"):
        run.train()
    assert steps(tmp_path / "run.zofed") == []


def test_what_cannot_be_continued_is_named(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    checkpoint, place = tmp_path / "checkpoint-4", tmp_path / "checkpoint-4" / "zofed.json"
    with pytest.raises(UserError, match="the model at hand has none: give the model"):
        rebuild(nn.Linear(2, 2), tmp_path)
    with pytest.warns(UserWarning, match=r"other settings, queries = 5 \(before: 4\)"):
        trainer(tmp_path, config=ZerothOrderConfig(queries=5)).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match="began with another seed: choose another file"):
        trainer(tmp_path, config=dataclasses.replace(SMALL, direction_seed=3)).train(
            resume_from_checkpoint=str(checkpoint)
        )
    written = place.read_text()
    place.write_text(written.replace('"head": "', '"head": "00'))
    with pytest.raises(UserError, match=r"no journal in .* holds step 4 of this checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    place.unlink()
    with pytest.raises(
        UserError, match=r"zofed.json is not there or spoilt, so this is no checkpoint of a zeroth-order run"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    next(tmp_path.glob("base-*")).write_bytes(b"damage")
    place.write_text(written)
    with pytest.raises(UserError, match="is not there or damaged: restore it from a copy"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_options_of_a_script_are_made_of_the_config() -> None:
    words = "--queries=8 --finite_difference=two-point --no_normalize_slopes --trainable=last-2 --output_dir=out"
    parser = HfArgumentParser((ZerothOrderConfig, TrainingArguments))
    config, args = parser.parse_args_into_dataclasses(shlex.split(words))
    assert config == ZerothOrderConfig(
        queries=8, finite_difference="two-point", normalize_slopes=False, trainable="last-2"
    )
    assert args.output_dir == "out"
    with pytest.raises(UserError, match="optimizer = 'lion': use sgd, adamw, mudamw"):
        ZerothOrderConfig(optimizer="lion")  # type: ignore[arg-type]


@pytest.mark.slow
def test_passes_in_bfloat16_by_autocast_train_float32_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=ZerothOrderConfig(queries=4, epsilon=0.03), bf16=True)
    run.train()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert zofed.replay(model(), tmp_path / "run.zofed") == digest(run)


@pytest.mark.slow
def test_the_mixin_gives_trl_its_steps(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset

    from zofed.models import sample_model

    class ZerothOrderSFTTrainer(ZerothOrderMixin, trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    rows = Dataset.from_list([{"prompt": f"Review {row}:", "completion": " a good film"} for row in range(16)])
    config = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.02, save_steps=2, max_length=32,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip

    def run() -> Any:
        return ZerothOrderSFTTrainer(
            model=str(sample_model.folder()), args=config, train_dataset=rows, zeroth_order=SMALL,
            peft_config=peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loss cannot run for many perturbed copies")
        whole = run()
        whole.train()
        again = run()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert digest(again) == digest(whole) and losses[-1] < losses[0]

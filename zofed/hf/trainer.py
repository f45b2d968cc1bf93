"""A `transformers.Trainer` whose step measures, records and applies.

Hugging Face's loop asks for batches, evaluations and checkpoints as ever. Of a step, `training_step` measures slopes on
the batches of the step, and the optimizer's `step` writes the record to the journal and moves the weights by it.
"""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from zofed.base.errors import UserError
from zofed.core.digests import named_parameters
from zofed.core.estimators import forward_passes
from zofed.core.journal import read
from zofed.core.records import Seeded
from zofed.hf import run_files, settings
from zofed.hf.settings import ZerothOrderConfig
from zofed.training.zeroth_order import ZerothOrder

_Base = Trainer if TYPE_CHECKING else object
Inputs = dict[str, Any]


class RecordedSteps(torch.optim.Optimizer):
    """What schedules, checkpoints and callbacks take for the optimizer: it has the rate, its step applies a record."""

    def __init__(self, parameters: Iterable[Tensor], rate: float, apply: Callable[[], None]) -> None:
        super().__init__(parameters, {"lr": rate})
        self._apply = apply

    def step(self, closure: Any = None) -> Any:
        """Apply the record that was measured; gradients there are none."""
        self._apply()


class ZerothOrderMixin(_Base):
    """Steps by forward passes for a subclass of `transformers.Trainer`, put before it:

        class ZerothOrderSFTTrainer(ZerothOrderMixin, trl.SFTTrainer): ...

    zeroth_order: how the steps are measured; all other arguments are those of the Trainer. While it trains,
    `self.zeroth_order` is the `ZerothOrder` that does it. Raises UserError, before anything is written, for arguments
    that gradients alone give a meaning.
    """

    def __init__(self, *positional: Any, zeroth_order: ZerothOrderConfig | None = None, **named: Any) -> None:
        self.zeroth_order_config = zeroth_order or ZerothOrderConfig()
        given = named.get("args", positional[1] if len(positional) > 1 else None)
        if isinstance(given, TrainingArguments):  # before transformers meets what would not work
            settings.check_arguments(given, self.zeroth_order_config)
        super().__init__(*positional, **named)
        settings.check_processes(self.args)
        if self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None:
            raise UserError(
                "an optimizer of your own, and a schedule bound to it, cannot take these steps: leave them out and say "
                "ZerothOrderConfig(optimizer=...) and lr_scheduler_type"
            )
        self.zeroth_order: ZerothOrder | None = None
        self._batches: list[Inputs] = []  # of the present step
        self._record: Seeded | None = None  # measured and not yet applied
        self._norm = 0.0

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Hugging Face's loop, with the run's journal open around it."""
        self._batches, self._record = [], None
        folder = Path(self._get_output_dir(trial))
        if resume_from_checkpoint is None:
            self.zeroth_order = self._measuring(run_files.begin(folder))
            run_files.keep_base(folder, self.zeroth_order)
        else:
            self.zeroth_order = self._resumed(folder, Path(resume_from_checkpoint))
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            assert self.zeroth_order.journal is not None
            self.zeroth_order.journal.close()

    def _measuring(self, journal: Path) -> ZerothOrder:
        """The model at the journal's end; a new journal where there is none."""
        config, model = self.zeroth_order_config, self.accelerator.unwrap_model(self.model)
        trainable = config.trainable or [name for name, each in named_parameters(model).items() if each.requires_grad]
        return ZerothOrder(
            model,
            seed=self.args.seed if config.direction_seed is None else config.direction_seed,
            trainable=trainable,
            directions=config.directions,
            queries=config.queries,
            epsilon=config.epsilon,
            finite_difference=config.finite_difference,
            normalize_slopes=config.normalize_slopes,
            direction_scale=config.direction_scale,
            optimizer=config.rule(self.args.weight_decay),
            perturbations_per_pass=config.perturbations_per_pass,
            journal=journal,
            description={"class": type(model).__name__},
        )

    def _resumed(self, folder: Path, checkpoint: Path) -> ZerothOrder:
        """The model at a checkpoint's step, by replaying the journal up to there."""
        place = run_files.Place.read(checkpoint)
        if other := settings.differences(self.zeroth_order_config, place.config):
            warnings.warn(
                f"{checkpoint} goes on with other settings, {', '.join(other)}: not to the weights of an undisturbed "
                "run",
                stacklevel=2,
            )
        journal = run_files.cut_back(folder, place)
        run_files.load_base(self.accelerator.unwrap_model(self.model), folder, read(journal).genesis)
        zo = self._measuring(journal)
        if zo.digest() != place.digest:
            assert zo.journal is not None
            zo.journal.close()
            raise UserError(
                f"{journal} leads to weights of SHA-256 {zo.digest()[:16]}... at step {place.step}, and {checkpoint} "
                f"was written at {place.digest[:16]}...: report this as a bug"
            )
        return zo

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What holds the rate; its step applies the record."""
        whole = self.accelerator.unwrap_model(self.model)
        trained = self.zeroth_order.replica.parameters if self.zeroth_order else named_parameters(whole)
        self.optimizer = RecordedSteps(trained.values(), self.args.learning_rate, self._apply)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Measure the step, once all its batches are there (gradient_accumulation_steps); nothing moves.

        The model is in eval mode: a slope is a difference of two losses, which dropout would make noise. Returns the
        mean loss, 0 for a batch that waits for the rest of its step.
        """
        assert self.zeroth_order is not None
        if model.training:
            model.eval()
        self._batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = self._batches, []
        rate = float(self.optimizer.param_groups[0]["lr"])
        try:
            self._record = self.zeroth_order.measure(lambda: self._loss(model, batches, num_items_in_batch), rate)
        except ValueError as error:
            raise UserError(
                f"step {self.state.global_step + 1} measured a loss that is not finite ({error}): lower learning_rate "
                f"= {self.args.learning_rate:g}, or look at the batch; the steps before it stand in the journal"
            ) from error
        assert self.zeroth_order.estimate is not None
        return torch.tensor(self.zeroth_order.estimate.loss, device=self.args.device)

    def _loss(self, model: nn.Module, batches: list[Inputs], items: Tensor | int | None) -> Any:
        """The loss of a step's batches, weighted as `Trainer.training_step` weights them."""
        whole = getattr(self, "loss_is_scaled_for_ga", None)
        if whole is None:  # the loss of a batch is its share of the step's already, where it counts the step's items
            whole = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        total: Any = 0.0
        for inputs in batches:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=items)
            total = total + (loss if whole else loss / len(batches))
        return total

    def _apply(self) -> None:
        """Write the measured record to the journal and move the weights by it."""
        record, self._record = self._record, None
        if record is not None and self.zeroth_order is not None:
            self._norm = self.zeroth_order.apply(record)

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """As the Trainer does; `grad_norm` is the norm of the gradient's estimate."""
        super().log({**logs, "grad_norm": self._norm} if "grad_norm" in logs else logs, *more, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; of a checkpoint, also which place in the journal it is."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir and self.is_in_train and self.zeroth_order is not None:
            run_files.Place.of(self.zeroth_order, self.zeroth_order_config).write(Path(output_dir))

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Those of the forward passes, of which the Trainer counts one and a backward twice as dear."""
        passes = forward_passes(self.zeroth_order_config.finite_difference, self.zeroth_order_config.queries)
        return super().floating_point_ops(inputs) // 3 * passes


class ZerothOrderTrainer(ZerothOrderMixin, Trainer):
    """A `transformers.Trainer` that trains by forward passes alone and keeps every step in a journal.

        trainer = ZerothOrderTrainer(model, args, train_dataset=data, zeroth_order=ZerothOrderConfig(queries=32))
        trainer.train()

    Its arguments are the Trainer's and `zeroth_order`, a `ZerothOrderConfig`. The journal is OUTPUT_DIR/run.zofed.
    """

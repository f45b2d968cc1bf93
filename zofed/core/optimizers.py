"""From a gradient estimate to moved weights, in the same bits on every machine.

Every operation is one elementwise IEEE operation in float32 and its own kernel: no fused multiply-add (it rounds once
on some machines and twice on others), no `alpha=`, no division by a Python number (CUDA multiplies by the reciprocal
instead), no `pow`. Matrices are orthogonalised with exact products. State is rebuilt by replaying the journal.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from zofed.core.kinds import OptimizerName
from zofed.core.orthogonal import orthogonalised

BETAS = (0.9, 0.999)  # Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019
ORTHOGONAL_SIZE = 0.2  # gives an orthogonalised update the root mean square of an Adam step (Liu et al., 2025)

Corrections = tuple[float, float]  # 1 - beta^t of both moments


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """float32 `value` rounded to bfloat16, up with a probability equal to its remainder, decided by 16-bit `bits`.

    Adding uniform 16-bit integers to the float's bit pattern and dropping the low half does exactly that. A small
    update thus still moves the weight on average, and the same bits give the same result everywhere.
    """
    pattern = (value.view(torch.int32) + bits) & ~0xFFFF
    return pattern.view(torch.float32).to(torch.bfloat16)


def _root(values: Tensor) -> Tensor:
    """The square root of float32 `values`, correctly rounded.

    By way of float64: on the CPU torch leaves float32 to MKL, which errs in the last bit of 1 to 17 % of all entries,
    by the processor. A root lies at least 2^-51 of itself from where two float32 meet (m^2 of 25 bits, m odd, is no
    float32), so an error of one float64 unit does not show.
    """
    return values.to(torch.float64).sqrt_().to(torch.float32)


class Rule(ABC):
    """How one optimizer turns a gradient estimate into an update. It has no state: an `Optimizer` holds that."""

    @abstractmethod
    def moment_names(self, of: "Optimizer") -> tuple[str, ...]:
        """What is remembered of each tensor."""

    @abstractmethod
    def update(
        self, of: "Optimizer", name: str, gradient: Tensor, moments: dict[str, Tensor], corrections: Corrections
    ) -> Tensor:
        """What the weights lose, times the rate: float32 of the gradient's shape. The moments are overwritten."""

    def needs_whole(self, of: "Optimizer", name: str) -> bool:
        """Whether a step of this tensor cannot be taken a few rows at a time."""
        return False


class SGD(Rule):
    """The gradient estimate, or its heavy-ball momentum."""

    def moment_names(self, of: "Optimizer") -> tuple[str, ...]:
        """One moment, or none."""
        return ("momentum",) if of.momentum else ()

    def update(
        self, of: "Optimizer", name: str, gradient: Tensor, moments: dict[str, Tensor], corrections: Corrections
    ) -> Tensor:
        """v = momentum * v + g."""
        return moments["momentum"].mul_(of.momentum).add_(gradient) if of.momentum else gradient


class AdamW(Rule):
    """Adam with its decay decoupled (Loshchilov and Hutter, 2019)."""

    epsilon = 1e-8

    def moment_names(self, of: "Optimizer") -> tuple[str, ...]:
        """The running means of the gradient and of its square."""
        return "mean", "square"

    def update(
        self, of: "Optimizer", name: str, gradient: Tensor, moments: dict[str, Tensor], corrections: Corrections
    ) -> Tensor:
        """The corrected mean over the root of the corrected square and epsilon."""
        mean = moments["mean"].mul_(BETAS[0]).add_(gradient * (1.0 - BETAS[0]))
        square = moments["square"].mul_(BETAS[1]).add_((gradient * gradient).mul_(1.0 - BETAS[1]))
        below = _root(square * (1.0 / corrections[1])).add_(self.epsilon)
        return (mean * (1.0 / corrections[0])).div_(below)


class MuDaMW(AdamW):
    """AdamW's step, for the matrices listed in `orthogonal` orthogonalised (Jordan et al., "Muon", 2024) and scaled by
    0.2 sqrt(max(rows, columns)).

    `cautious` drops the entries whose step points up the present gradient and scales the others up (Liang et al.,
    "Cautious optimizers", 2024).
    """

    epsilon = 1e-6

    def needs_whole(self, of: "Optimizer", name: str) -> bool:
        """The signs of all entries are counted, a matrix is orthogonalised as one."""
        return of.cautious or name in of.orthogonal

    def update(
        self, of: "Optimizer", name: str, gradient: Tensor, moments: dict[str, Tensor], corrections: Corrections
    ) -> Tensor:
        """AdamW's, cautious and orthogonalised as asked."""
        update = super().update(of, name, gradient, moments, corrections)
        if of.cautious:
            agrees = update * gradient > 0
            update = (update * agrees).mul_(update.numel() / (int(agrees.sum()) + 1))
        if name in of.orthogonal:
            update = orthogonalised(update).mul_(ORTHOGONAL_SIZE * sqrt(max(update.shape)))
        return update


RULES: dict[OptimizerName, Rule] = {"sgd": SGD(), "adamw": AdamW(), "mudamw": MuDaMW()}


@dataclass
class Optimizer:
    """A rule of `RULES` with its state, applied to a part of a tensor at a time.

    All decouple the weight decay: weight *= 1 - rate * weight_decay. The estimate of the gradient may come from
    backpropagation or from a record: the arithmetic is the same. momentum: of sgd. cautious, orthogonal (names of
    matrices): of mudamw.
    """

    name: OptimizerName
    momentum: float = 0.0
    weight_decay: float = 0.0
    cautious: bool = False
    orthogonal: frozenset[str] = frozenset()
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    powers: list[float] = field(default_factory=lambda: [1.0, 1.0])  # beta^t, by repeated multiplication

    @property
    def _rule(self) -> Rule:
        return RULES[self.name]

    def begin_step(self) -> Corrections:
        """Call once before the tensors of a step; what it gives goes into `step`."""
        self.powers = [power * beta for power, beta in zip(self.powers, BETAS, strict=True)]
        return 1.0 - self.powers[0], 1.0 - self.powers[1]

    def needs_whole(self, name: str) -> bool:
        """Whether a step of this tensor cannot be taken a few rows at a time."""
        return self._rule.needs_whole(self, name)

    @property
    def moment_names(self) -> tuple[str, ...]:
        """What the rule remembers of each tensor."""
        return self._rule.moment_names(self)

    def moments(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The state of a tensor, float32 of the weight's shape, zero at first."""
        if self.moment_names and name not in self.state:
            self.state[name] = {moment: torch.zeros_like(weight, dtype=torch.float32) for moment in self.moment_names}
        return self.state.get(name, {})

    def step(
        self,
        name: str,
        weight: Tensor,
        gradient: Tensor,
        moments: dict[str, Tensor],
        rate: float,
        corrections: Corrections,
        size: float = 1.0,
    ) -> None:
        """Move `weight` by one step, in place; all tensors are float32 of one shape.

        moments: those of these entries; they are overwritten, and so is the gradient. size: what multiplies the step,
        not the decay.
        """
        update = self._rule.update(self, name, gradient, moments, corrections)
        if self.weight_decay:
            weight.mul_(1.0 - rate * self.weight_decay)
        weight.sub_(torch.mul(update, rate * size, out=gradient))

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state for a checkpoint: `<moment>/<tensor name>` and `powers` (float64)."""
        flat = {f"{moment}/{name}": value for name, moments in self.state.items() for moment, value in moments.items()}
        return flat | {"powers": torch.tensor(self.powers, dtype=torch.float64)}

    def fits(self, flat: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether `flat` has the keys, types and shapes of a state of tensors of these shapes.

        All tensors move together, so they have moments all or none.
        """
        found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in flat.items()}
        before = {"powers": (torch.float64, (2,))}  # its first step
        moments = {f"{m}/{name}": (torch.float32, shape) for m in self.moment_names for name, shape in shapes.items()}
        return found in (before, before | moments)

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        flat = dict(flat)
        self.powers = flat.pop("powers").tolist()
        self.state = {}
        for key, value in flat.items():
            moment, name = key.split("/", 1)
            self.state.setdefault(name, {})[moment] = value.clone()

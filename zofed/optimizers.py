"""From a gradient estimate to moved weights, in the same bits on every machine.

Every operation is one elementwise IEEE operation in float32 and its own kernel: no fused multiply-add (it rounds once
on some machines and twice on others), no `alpha=`, no division by a Python number (CUDA multiplies by the reciprocal
instead), no `pow`. State is rebuilt by replaying the journal.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Name = Literal["sgd", "adamw"]
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """float32 `value` rounded to bfloat16, up with a probability equal to its remainder, decided by 16-bit `bits`.

    Adding uniform 16-bit integers to the float's bit pattern and dropping the low half does exactly that. A small
    update thus still moves the weight on average, and the same bits give the same result everywhere.
    """
    pattern = (value.view(torch.int32) + bits) & ~0xFFFF
    return pattern.view(torch.float32).to(torch.bfloat16)


@dataclass
class Optimizer:
    """SGD (with momentum) or AdamW, applied one tensor at a time so that one gradient is alive at once.

    Both decouple the weight decay: weight *= 1 - rate * weight_decay. The estimate of the gradient may come from
    backpropagation or from a record: the arithmetic is the same.
    """

    name: Name
    momentum: float = 0.0
    weight_decay: float = 0.0
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    corrections: list[float] = field(default_factory=lambda: [1.0, 1.0])  # beta^t, by repeated multiplication

    def begin_step(self) -> None:
        """Call once before the tensors of a step."""
        self.corrections = [power * beta for power, beta in zip(self.corrections, BETAS, strict=True)]

    def move(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The weight after one step, as a new float32 tensor; weight and gradient are float32 of one shape."""
        if self.name == "sgd":
            update = self._momentum(name, gradient) if self.momentum else gradient
        else:
            update = self._adam(name, gradient)
        decayed = weight * (1.0 - rate * self.weight_decay) if self.weight_decay else weight
        return decayed - update * rate

    def _momentum(self, name: str, gradient: Tensor) -> Tensor:
        state = self.state.setdefault(name, {"momentum": torch.zeros_like(gradient)})
        state["momentum"] = state["momentum"] * self.momentum + gradient
        return state["momentum"]

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        zeros = torch.zeros_like(gradient)
        state = self.state.setdefault(name, {"mean": zeros, "square": zeros})
        state["mean"] = state["mean"] * BETAS[0] + gradient * (1.0 - BETAS[0])
        state["square"] = state["square"] * BETAS[1] + (gradient * gradient) * (1.0 - BETAS[1])
        mean, square = (
            state[moment] * (1.0 / (1.0 - power))
            for moment, power in zip(("mean", "square"), self.corrections, strict=True)
        )
        return mean / (torch.sqrt(square) + EPSILON)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state for a checkpoint: '<moment>/<tensor name>' and 'corrections' (float64)."""
        flat = {f"{moment}/{name}": value for name, moments in self.state.items() for moment, value in moments.items()}
        return flat | {"corrections": torch.tensor(self.corrections, dtype=torch.float64)}

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        flat = dict(flat)
        self.corrections = flat.pop("corrections").tolist()
        self.state = {}
        for key, value in flat.items():
            moment, name = key.split("/", 1)
            self.state.setdefault(name, {})[moment] = value

"""The optimizer, the sizes of directions, the rate and the rounding that suit a mode, where nobody says otherwise.

What they are worth beside tuned ones stands in benchmarks/RESULTS.md.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

from zofed.core.kinds import OptimizerName

FRESH = ("tiny", "20M", "200M", "500M", "1B")  # models that begin untrained


def optimizer(settings: Any) -> OptimizerName:
    """Backprop's steps by AdamW, slopes' by SGD; what clients' own steps changed is averaged, no more."""
    averages = settings.mode == "fo" and settings.local_steps > 1
    return "adamw" if settings.mode in ("fo", "subspace") and not averages else "sgd"


def direction_scale(settings: Any) -> Literal["equal", "rms"]:
    """In proportion to the weights, wherever one rate is to fit all tensors of any model."""
    in_proportion = settings.mode == "subspace" or (settings.mode == "zo" and settings.optimizer == "adamw")
    return "rms" if in_proportion else "equal"


def learning_rate(settings: Any) -> float:
    """A rate that moves what trains without shaking it, over tens to hundreds of steps at a constant one.

    A short run of a fresh model bears three times as much, and so does one that ends by `schedule = cosine`; `zofed
    tune` finds the rate of a model and its data.
    """
    fresh, pretrained, adapter = _RATES[_kind_of_step(settings)]
    if settings.adapter != "none":
        return adapter
    return fresh if settings.model in FRESH else pretrained


def quantization_bits(settings: Any) -> int:
    """A subspace's hundreds of coefficients lose about a percent of their mean square to 4 bits; slopes are few."""
    return 4 if settings.mode == "subspace" else 18


# Of a fresh model, of a pretrained one, of an adapter. A subspace's and AdamW's along slopes are parts of the weights'
# sizes; SGD's along slopes are in units of the slopes' spread.
_RATES = {
    "backprop by sgd": (0.1, 0.1, 0.1),
    "backprop by adamw": (3e-3, 3e-4, 3e-3),
    "backprop by mudamw": (1e-2, 1e-3, 1e-2),
    "subspace": (3e-2, 1e-2, 0.1),
    "slopes by sgd": (1e-2, 3e-3, 3e-2),
    "slopes by adamw": (0.1, 1e-2, 0.3),
    "slopes as they are": (1e-3, 3e-4, 1e-2),
}


def _kind_of_step(settings: Any) -> str:
    if settings.mode == "subspace":
        return "subspace"
    if settings.mode == "fo":
        averages = settings.local_steps > 1 and settings.optimizer == "sgd"
        return f"backprop by {settings.local_optimizer if averages else settings.optimizer}"
    if settings.optimizer == "sgd":
        return "slopes by sgd" if settings.normalize_slopes else "slopes as they are"
    if settings.optimizer == "adamw" and settings.direction_scale == "rms":
        return "slopes by adamw"
    return f"backprop by {settings.optimizer}"  # steps of the same size, whatever the estimate is of


# Settings that are chosen where nobody gives them, in the order in which one decides the next.
CHOSEN: Mapping[str, Callable[[Any], Any]] = {
    "optimizer": optimizer,
    "direction-scale": direction_scale,
    "learning-rate": learning_rate,
    "quantization-bits": quantization_bits,
}


def is_chosen(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a run's settings, by key, have under this one what nobody needs to give."""
    if key not in CHOSEN:
        return False
    settings = SimpleNamespace(**{name.replace("-", "_"): value for name, value in values.items()})
    try:
        return values.get(key) == CHOSEN[key](settings)
    except (AttributeError, KeyError):  # of a version with other settings
        return False

"""From a backprop gradient to a guide, and what of it directions keep."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import gradient_codec
from zofed.core.measure import Update

BLOCK = 2**18  # entries that are worked on together
ARMS = ("guide-only", "line")  # instruct kinds that tell what the noise adds to the guide


@dataclass(frozen=True, slots=True)
class Shape:
    """How a guide shapes directions and how slopes along them are weighed: the settings of the same names."""

    kind: str
    weighting: str
    blend: bool
    cosine_target: float
    noise_scale: float
    step: float
    epsilon: float
    perturbations_per_pass: int

    @classmethod
    def of(cls, settings: Settings) -> "Shape":
        return cls(
            settings.instruct_kind,
            settings.instruct_weighting,
            settings.instruct_blend,
            settings.instruct_cosine_target,
            settings.instruct_noise_scale,
            settings.instruct_step,
            settings.epsilon,
            settings.perturbations_per_pass,
        )


@dataclass(frozen=True, slots=True)
class Guidance:
    """A guide and what is kept of it.

    square, kept_square: |g|^2 and |g_S|^2. noise: standard deviation sigma of the noise in each coordinate that has
    some; noisy: how many have. masked: the noise spares the kept coordinates. digest: of the guide, empty where it is
    not known yet.
    """

    guide: Update
    threshold: float
    square: float
    kept_square: float
    size: int
    kept_count: int
    noise: float
    noisy: int
    masked: bool
    digest: bytes = b""

    @property
    def direction_square(self) -> float:
        """|v|^2, exact for entries of +-1 that spare the kept coordinates, else its mean."""
        return self.kept_square + self.noise**2 * self.noisy

    @property
    def facts(self) -> dict[str, float]:
        """Cosines with the guide of its kept part and of a whole direction, and the share of coordinates kept."""
        whole = math.sqrt(self.square)
        return {
            "cosine_kept": math.sqrt(self.kept_square) / whole,
            "cosine_direction": self.kept_square / (whole * math.sqrt(self.direction_square)),
            "share_kept": self.kept_count / self.size,
        }


def on_grid(gradient: Mapping[str, Tensor]) -> Update:
    """The gradient as a guide: of each tensor 15-bit integers times a power of two, as float32.

    A float32 gradient is overwritten, so that no second one is held. Raises ValueError when an entry is not finite,
    UserError when all are zero.
    """
    guide: Update = {}
    for name, tensor in gradient.items():
        value = tensor.detach().to(torch.float32)
        try:
            exponent = gradient_codec.to_grid(value)
        except ValueError as error:
            raise ValueError(f"the gradient of {name}: {error}") from None
        guide[name] = value.mul_(2.0**exponent)
    if not any(bool(tensor.any()) for tensor in guide.values()):
        raise UserError(
            "the backprop gradient is zero everywhere and shapes no direction: set mode to zo, or scope wider"
        )
    return guide


def _pieces(guide: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """All entries, a block at a time: what is computed from them in float64 would be several guides large."""
    for tensor in guide.values():
        yield from tensor.flatten().split(BLOCK)


def threshold_of(guide: Mapping[str, Tensor], energy: float) -> float:
    """The largest t for which the coordinates of at least t in size hold a share `energy` of the guide's square sum.

    Those are the fewest coordinates that do, with all that tie. Bits of a float32, read as an integer, grow with its
    size: a histogram over their upper half finds the bin in which t lies, and only that bin is sorted.
    """
    sums = torch.zeros(2**15, dtype=torch.float64)
    for piece in _pieces(guide):
        size = piece.abs().cpu()
        sums += torch.bincount(size.view(torch.int32) >> 16, size.double().square_(), minlength=2**15)
    above = sums.flip(0).cumsum(0).flip(0)  # energy of each bin and all larger ones
    wanted = energy * float(above[0])
    last = int((above >= wanted).sum()) - 1
    sizes = (piece.abs().cpu() for piece in _pieces(guide))
    ordered = torch.cat([size[size.view(torch.int32) >> 16 == last] for size in sizes]).sort(descending=True).values
    reached = (float(above[last]) - float(sums[last])) + ordered.double().square().cumsum(0)
    return float(ordered[min(int((reached < wanted).sum()), len(ordered) - 1)])


def guidance(guide: Update, shape: Shape, digest: bytes = b"") -> Guidance:
    """What a shape keeps of a guide. The kind `cosine` keeps all of it and bends it by noise to the target cosine.

    digest: the guide's, where it is known.
    """
    size = sum(tensor.numel() for tensor in guide.values())
    bends = shape.kind == "cosine"
    threshold = 0.0 if bends else threshold_of(guide, shape.cosine_target**2)
    square = kept_square = 0.0
    kept_count = 0
    for piece in _pieces(guide):
        keeps = piece.abs() >= threshold
        squares = piece.double().square_()
        square += float(squares.sum())
        kept_square += float((squares * keeps).sum())
        kept_count += int(keeps.sum())
    scale = math.tan(math.acos(shape.cosine_target)) if bends else shape.noise_scale
    masked = shape.kind == "hybrid"
    noisy = 0 if shape.kind in ARMS else size - kept_count if masked else size
    noise = scale * math.sqrt(square / size)
    return Guidance(guide, threshold, square, kept_square, size, kept_count, noise, noisy, masked, digest)

"""Zeroth-order training of a module that is not from Hugging Face: a small convolutional net that tells shapes apart.

python examples/any_module.py

It trains by forward passes alone, writes a journal of some kilobytes, and rebuilds the trained weights from it on a
second copy of the untrained net.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zofed

STEPS, BATCH = 300, 64


def net() -> nn.Module:
    """The same untrained net at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(8 * 36),
        nn.Linear(8 * 36, 3),
    )


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy 12 x 12 pictures (count, 1, 12, 12) of a bar across, a bar down or a cross, and which it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    pictures = 0.7 * torch.randn(count, 1, 12, 12, generator=generator)
    for picture, label in zip(pictures, labels, strict=True):
        row, column = torch.randint(2, 10, (2,), generator=generator)
        if label != 1:
            picture[0, row, 2:10] += 1.5
        if label != 0:
            picture[0, 2:10, column] += 1.5
    return pictures, labels


def accuracy(model: nn.Module) -> float:
    pictures, labels = images(2000, seed=10**6)
    with torch.no_grad():
        return float((model(pictures).argmax(-1) == labels).float().mean())


def main() -> None:
    model = net()
    journal = Path(tempfile.mkdtemp()) / "run.zofed"
    print(f"before: accuracy {accuracy(model):.3f} on pictures it never sees, a guess gives 0.333")

    zo = zofed.ZerothOrder(model, seed=1, queries=32, journal=journal)
    for step in range(STEPS):
        pictures, labels = images(BATCH, seed=step)
        record = zo.measure(lambda x=pictures, y=labels: F.cross_entropy(model(x), y), rate=0.05)
        zo.apply(record)

    print(f"after {STEPS} steps of forward passes: accuracy {accuracy(model):.3f}")
    print(f"the journal holds all of it in {journal.stat().st_size:,} bytes")
    same = zofed.replay(net(), journal) == zo.digest()
    print(f"replayed on an untrained copy: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}")


if __name__ == "__main__":
    main()

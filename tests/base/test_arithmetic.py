"""Slopes do not depend on where in memory tensors lie: MKL computes in its reproducible mode."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed.base import arithmetic
from zofed.config import Settings
from zofed.training import central

# An old instruction set, for which MKL has kernels that look at addresses on every processor.
OLD = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}

MISALIGNED = """
import hashlib, json, sys, warnings
import zofed
import torch
from torch import nn

torch.set_num_threads(1)


def at(tensor, offset):
    "The same numbers, so many floats behind an address that 4096 divides."
    room = torch.empty(tensor.numel() + 2048)
    start = -(room.data_ptr() // 4) % 1024 + offset
    there = room[start : start + tensor.numel()].view(tensor.shape)
    assert there.data_ptr() % 64 == 4 * offset % 64
    return there.copy_(tensor)


def bits(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def depends(product, *operands):
    def result(offset):
        return bits(product(*(at(x, offset * (place + 1)) for place, x in enumerate(operands))))

    return len(set(map(result, (0, 1, 2, 3, 5)))) > 1


generator = torch.Generator().manual_seed(0)
products, tried = 0, 0
shapes = [(1, 128, 64), (24, 5, 1), (7, 16, 1), (48, 64, 2), (4, 33, 64), (33, 17, 5), (64, 64, 64), (3, 100, 10)]
for rows, inner, columns in shapes:
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    with torch.no_grad():
        for product, operands in (
            (torch.mm, (a, b)), (torch.mv, (a, b[:, 0])), (torch.mv, (b.t().contiguous(), a[0])),
            (nn.functional.linear, (a, b.t().contiguous())), (torch.addmm, (torch.zeros(rows, columns), a, b)),
            (lambda x, y: torch.bmm(x.expand(3, -1, -1), y.expand(3, -1, -1)), (a[None], b[None])),
        ):
            products += depends(product, *operands)
            tried += 1

x = torch.randn(1, 128, generator=generator)  # one example: its products are of a matrix and a vector


def slopes(kind, offset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
    for parameter in model.parameters():
        parameter.data = at(parameter.data, offset)
    zo = zofed.ZerothOrder(model, seed=1, queries=6, directions=kind)
    zo.measure(lambda: model(x).sum(), rate=0.1)
    return zo.estimate.slopes


warnings.simplefilter("ignore")
kinds = [kind for kind in ("rank1", "gaussian") if len({slopes(kind, offset) for offset in (0, 1, 3)}) > 1]
print(json.dumps({"products": products, "tried": tried, "kinds": kinds}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own; MKL_CBWR is what `environment` says, else not set, as in a new terminal."""
    inherited = {key: value for key, value in os.environ.items() if key != arithmetic.VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )


@pytest.mark.bits
def test_products_and_slopes_do_not_depend_on_where_tensors_lie() -> None:
    found = json.loads(run(MISALIGNED, **OLD).stdout)
    assert found["tried"] == 48
    assert (found["products"], found["kinds"]) == (0, [])


@pytest.mark.slow
def test_without_the_reproducible_mode_the_same_products_do() -> None:
    found = json.loads(run(MISALIGNED, **OLD, MKL_CBWR="").stdout)
    if not found["products"]:
        pytest.skip(f"no product of this BLAS looks at addresses: {arithmetic.described()}")
    assert "gaussian" in found["kinds"]  # rank1 runs batched, as products of matrices


LATE = """
import warnings
import torch
{first}
import zofed
from torch import nn

model = nn.Linear(4, 1)
x = torch.ones(2, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    zo = zofed.ZerothOrder(model, seed=1, queries=2)
    for _ in range(2):
        zo.measure(lambda: model(x).sum(), rate=0.1)
print([str(one.message) for one in told if "MKL" in str(one.message)])
"""


@pytest.mark.slow
@pytest.mark.skipif(arithmetic.mkl_mode() is None, reason="torch has no MKL here, or one that does not tell its mode")
def test_the_library_warns_once_where_torch_computed_before_zofed_was_imported() -> None:
    assert run(LATE.format(first="")).stdout.strip() == "[]"
    late = run(LATE.format(first="torch.ones(2, 2) @ torch.ones(2, 2)")).stdout
    assert late.count("reproducible mode is off") == 1 and "import zofed first, or set MKL_CBWR=AUTO" in late
    empty = run(LATE.format(first=""), MKL_CBWR="").stdout
    assert empty.count("MKL_CBWR is empty") == 1 and "unset it before Python starts" in empty


@pytest.mark.parametrize(
    ("flags", "branch"),
    [("fpu avx avx2 fma", "AVX2"), ("fpu avx2 avx512f avx512vl", "AUTO"), ("fpu sse4_2", "AUTO"), ("", "AUTO")],
)
def test_the_mode_is_the_best_that_the_processor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, branch: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbogomips : 1\n")
    monkeypatch.setattr(arithmetic, "CPUINFO", cpuinfo)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    arithmetic.make_reproducible()
    assert os.environ["MKL_CBWR"] == branch
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    arithmetic.make_reproducible()
    assert os.environ["MKL_CBWR"] == "COMPATIBLE"
    monkeypatch.delenv("MKL_CBWR")
    monkeypatch.setattr(arithmetic, "CPUINFO", tmp_path / "none")
    arithmetic.make_reproducible()
    assert os.environ["MKL_CBWR"] == "AUTO"


def test_a_run_records_its_arithmetic_and_says_where_it_goes_on_with_another(
    quick: Callable[..., Settings], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def cut(row: Any) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        central.train(quick(), tmp_path / "run", cut)
    inputs = tmp_path / "run" / "inputs.json"
    recorded = json.loads(inputs.read_text())
    assert recorded["arithmetic"] == arithmetic.described()
    recorded["arithmetic"]["instructions"] = "NEON"
    inputs.write_text(json.dumps(recorded))
    recwarn.clear()
    summary = central.resume(tmp_path / "run", lambda row: None)
    assert summary["status"] == "completed" and summary["arithmetic"] == arithmetic.described()
    told = [str(one.message) for one in recwarn if "goes on with other arithmetic" in str(one.message)]
    assert len(told) == 1 and "instructions NEON then" in told[0]

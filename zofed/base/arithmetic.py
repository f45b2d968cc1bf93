"""What the last bits of a forward pass depend on besides the settings: this machine's processor and its BLAS.

MKL, the BLAS of torch's builds for x86, picks kernels by where in memory a tensor happens to lie, unless its
conditional numerical reproducibility is on (MKL_CBWR; "oneMKL Developer Guide", Obtaining Numerically Reproducible
Results). Two processes that do the same work would then get slopes that differ in the last bit. MKL reads the variable
at its first call, so it is set when zofed is imported, for which this module must not import torch at its top.
"""

import ctypes
import os
import re
import warnings
from functools import cache
from pathlib import Path

VARIABLE = "MKL_CBWR"
OFF = "OFF"
CPUINFO = Path("/proc/cpuinfo")

# Branches by the numbers that mkl_cbwr_get returns (mkl_types.h); 1 means that the mode is off.
_BRANCHES = {
    1: OFF, 2: "AUTO", 3: "COMPATIBLE", 4: "SSE2", 6: "SSSE3", 7: "SSE4_1", 8: "SSE4_2", 9: "AVX", 10: "AVX2",
    12: "AVX512", 14: "AVX512_E1",
}  # fmt: skip
_ALL, _STRICT = -1, 0x10000


def make_reproducible() -> None:
    """Turn MKL's reproducible mode on, in this process and those it starts, unless the environment chose a mode.

    An empty MKL_CBWR leaves it off; MKL takes any word it does not know for AUTO.
    """
    os.environ.setdefault(VARIABLE, _branch())


def _branch() -> str:
    """The branch for this processor: AVX2 where that is the best it has, else AUTO.

    MKL's guide says that AUTO gives every processor its best branch. AVX2 by name is what was measured to give equal
    bits on an AMD processor without AVX-512.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="ascii", errors="replace"), re.M)
    except OSError:
        return "AUTO"
    has = set(flags.group(1).split()) if flags else set()
    return "AVX2" if "avx2" in has and "avx512f" not in has else "AUTO"


@cache
def _mkl() -> ctypes.CDLL | None:
    """The library that holds the MKL that torch calls, where it tells its mode."""
    import torch

    if not torch.backends.mkl.is_available():
        return None
    for path in (*Path(torch.__file__).parent.glob("lib/*torch_cpu*"), "libmkl_rt.so.2", "mkl_rt.2.dll"):
        try:
            library = ctypes.CDLL(str(path))
            _ = library.mkl_serv_cbwr_get
            return library
        except (OSError, AttributeError):
            continue
    return None


def mkl_mode() -> str | None:
    """MKL's branch in force, OFF where results depend on memory addresses; None: torch has no MKL, or it does not say.

    Asking fixes the mode, as MKL's first product would.
    """
    library = _mkl()
    if library is None:
        return None
    number = int(library.mkl_serv_cbwr_get(_ALL))
    branch = _BRANCHES.get(number & ~_STRICT, str(number))
    return f"{branch},STRICT" if number & _STRICT else branch


@cache
def described() -> dict[str, str]:
    """What slopes of one run depend on beside its settings, by name: processor's instructions, BLAS, its mode."""
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": blas.group(1) if blas else "unknown",
        "mkl-cbwr": mkl_mode() or "none",
    }


@cache
def warn_if_not_reproducible() -> None:
    """Say, once in a process, that equal runs may differ in the last bit here."""
    if mkl_mode() != OFF:
        return
    if os.environ.get(VARIABLE):
        cause, remedy = "torch computed before zofed was imported", f"import zofed first, or set {VARIABLE}=AUTO"
    else:
        cause, remedy = f"{VARIABLE} is empty", "unset it"
    warnings.warn(
        f"MKL's reproducible mode is off, since {cause}: the last bit of slopes may depend on where tensors lie in "
        f"memory, so that equal runs may part, while replays stay exact; {remedy} before Python starts",
        stacklevel=3,
    )


def changed_since(before: object) -> str:
    """What differs from what `described` gave when a run began, in words; empty where nothing does.

    before: as read from a file, where it may be missing.
    """
    if not isinstance(before, dict):
        return ""
    now = described()
    return ", ".join(
        f"{name} {before[name]} then, {now[name]} now" for name in now if name in before and before[name] != now[name]
    )

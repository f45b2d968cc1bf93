"""How much memory this process has held at most, and how much its training took above what it held before."""

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zofed.base import environment

_SELF = Path("/proc/self")
_RESET_PEAK = "5"  # what /proc/PID/clear_refs takes for it (man 5 proc)
_before = 0  # the largest peak that was forgotten to measure another one


def peak_bytes() -> int:
    """Largest memory this process has held: on the GPUs if it used some, of each its own, else resident in RAM."""
    return max(_before, _peak())


@dataclass(frozen=True, slots=True)
class Training:
    """What was held when training began; measured from there on."""

    held: int

    @classmethod
    def begin(cls) -> "Training | None":
        """Forget the peak so far, which loading a model may have made; None where the system knows no such thing."""
        global _before
        import torch

        so_far = _peak()
        if _on_gpus():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        else:
            environment.give_back_freed_memory()  # or training would take what is free without a trace
            try:
                (_SELF / "clear_refs").write_text(_RESET_PEAK)
            except OSError:  # not Linux, or a container that forbids it
                return None
        _before = max(_before, so_far)
        return cls(_peak())

    def bytes_above(self) -> int:
        """Most memory since then, above what was held."""
        return max(0, _peak() - self.held)


def _on_gpus() -> bool:
    import torch

    return torch.cuda.is_available() and any(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


def _peak() -> int:
    """Largest memory since the last time that it was forgotten."""
    import torch

    if _on_gpus():
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    with suppress(OSError, StopIteration, ValueError):
        status = (_SELF / "status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What belongs to the process and not to a model: its threads, its memory, its devices."""

from collections.abc import Sequence

import torch
import transformers

from zofed.base import log
from zofed.base.environment import keep_freed_memory
from zofed.base.errors import UserError
from zofed.config import Settings


def prepare_process(threads: int) -> None:
    """Set what belongs to the process and not to a model: CPU threads, memory, the library's chatter."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    (transformers.logging.set_verbosity_debug if log.is_debug() else transformers.logging.set_verbosity_error)()
    transformers.logging.disable_progress_bar()


def device(settings: Settings) -> torch.device:
    """The device of a run, the first of several. Raises UserError for a CUDA device this machine does not have."""
    return devices(settings)[0]


def devices(settings: Settings) -> list[torch.device]:
    """The devices that share a run's queries, mostly one. Raises UserError for one this machine does not have."""
    if settings.device == "auto" and not settings.devices:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    key = "devices" if settings.devices else "device"
    names = getattr(settings, key)
    chosen = [torch.device(name.strip()) for name in names.split(",")]
    if any(one.type == "cuda" and (one.index or 0) >= torch.cuda.device_count() for one in chosen):
        raise UserError(
            f"{key} = {names!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            f"set {key} to cpu{' or auto' if key == 'device' else ',cpu or to those it has'}"
        )
    return chosen


def layer_devices(settings: Settings) -> list[torch.device]:
    """The devices over which a model's layers are spread: of placement = auto all GPUs of this machine, else one."""
    count = torch.cuda.device_count() if settings.placement == "auto" and settings.device == "auto" else 0
    return [torch.device("cuda", number) for number in range(count)] if count > 1 else [device(settings)]


def free_on(devices: Sequence[torch.device]) -> list[int]:
    """Bytes that are free on each of several GPUs; 0 of other devices, of which only one is ever used."""
    return [torch.cuda.mem_get_info(one)[0] if one.type == "cuda" else 0 for one in devices]

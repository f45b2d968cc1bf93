"""The Trainer of Hugging Face, stepping by forward passes: its callbacks, collators and arguments go on working."""

from zofed.hf.run_files import rebuild
from zofed.hf.settings import ZerothOrderConfig
from zofed.hf.trainer import ZerothOrderMixin, ZerothOrderTrainer

__all__ = ["ZerothOrderConfig", "ZerothOrderMixin", "ZerothOrderTrainer", "rebuild"]

"""Builds the wheel: the package, and within it what lies beside it in a checkout; files.shipped finds either."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Files by name where git passes over others in the folder: data that somebody downloaded into it.
SHIPPED = (
    "tokenizer/*.json",
    "pretrained/*.json",
    "datasets_subset/*/train.jsonl",
    "datasets_subset/*/validation.jsonl",
    "tasks/*.toml",
    "experiments/**/*.toml",
)


class BuildWithShipped(build_py):
    """Builds the package anew and copies what ships into it; an editable install finds that in the checkout."""

    def run(self) -> None:
        """Raises FileNotFoundError where something that ships is not there, as in an incomplete checkout."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "zofed"
        shutil.rmtree(package, ignore_errors=True)  # or what an earlier build left there would ship again
        super().run()
        for pattern in SHIPPED:
            files = sorted(Path().glob(pattern))
            if not files:
                raise FileNotFoundError(f"nothing here is {pattern}, which ships with zofed: build in a whole checkout")
            for file in files:
                target = package / "shipped" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithShipped})

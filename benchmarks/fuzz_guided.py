"""The readers of `fuzz`, with inputs that atheris grows towards lines of zofed not run before (the extra `fuzz`).

`python -m benchmarks.fuzz_guided READER FOLDER [flags of libFuzzer]` is one of them: its process ends at a fault.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_INPUTS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_LINES = re.compile(r"cov: (\d+)")  # edges of zofed's byte code that some input ran
_FAULT = re.compile(r"^RuntimeError: (.*)$", re.MULTILINE)


def report(seconds: int, names: Sequence[str]) -> bool:
    """Print a line for each reader, and its first fault with the input; returns whether there was none."""
    if importlib.util.find_spec("atheris") is None:
        print("--guided needs atheris: pip install -e '.[fuzz]'", file=sys.stderr)
        return False
    print("| reader | inputs | edges at first | edges at last | fault |\n| --- | --- | --- | --- | --- |")
    is_well = True
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=4096", "-rss_limit_mb=4096"]
            command = [sys.executable, "-m", "benchmarks.fuzz_guided", name, folder, *flags]
            done = subprocess.run(
                [*command, f"-artifact_prefix={folder}/"], capture_output=True, text=True, errors="replace"
            )
            told = done.stdout + done.stderr
            edges, inputs = list(map(int, _LINES.findall(told))), _INPUTS.findall(told)
            if not edges or not inputs:
                print(told[-2000:], file=sys.stderr)
                return False
            fault = (_FAULT.findall(told) or ["none" if done.returncode == 0 else told[-500:]])[-1]
            print(f"| {name} | {int(inputs[-1]):,} | {edges[0]} | {edges[-1]} | {fault} |", flush=True)
            for path in Path(folder).glob("crash-*"):
                print(f"    {path.read_bytes()[:300]!r}", flush=True)
            is_well = is_well and done.returncode == 0
    return is_well


def main() -> None:
    """Give one reader inputs until the time is up, or one is a fault."""
    import atheris

    name, folder, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=["zofed"]):
        from benchmarks import fuzz, fuzz_targets
    corpus, scratch = Path(folder) / "corpus", Path(folder) / "scratch"
    corpus.mkdir()
    scratch.mkdir()
    target = fuzz_targets.all_of(scratch)[name]
    for number, raw in enumerate(target.corpus):
        (corpus / str(number)).write_bytes(raw)
    fuzz.warm(target)

    def try_one(raw: bytes) -> None:
        if fault := fuzz.fault_of(target, raw)[0]:
            raise RuntimeError(fault)

    atheris.Setup([sys.argv[0], *flags, str(corpus)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

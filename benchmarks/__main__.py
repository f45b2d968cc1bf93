"""Measurements of zofed. Each prints a table; results worth keeping stand in benchmarks/RESULTS.md."""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import (
    adapters,
    architectures,
    blas,
    common,
    crash,
    digits,
    first_order,
    fuzz,
    gpu,
    memory,
    model_types,
    prompt,
    quantised,
    query,
    replay,
    three_modes,
    trunk,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    timed = (query.__doc__, query.report_scopes.__doc__, replay.__doc__, first_order.__doc__, blas.__doc__)
    for name, text in zip(("query", "scopes", "replay", "first-order", "blas"), timed, strict=True):
        one = kinds.add_parser(name, help=text)
        one.add_argument("--size", choices=common.SIZES, default="124M")
        one.add_argument("--threads", type=int, default=2)
        one.add_argument("--pairs", type=int, default=5)
        one.add_argument("--shape", nargs=2, type=int, metavar=("EXAMPLES", "TOKENS"), help="one shape only")
    one = kinds.add_parser("memory", help=memory.__doc__)
    one.add_argument("--size", choices=common.SIZES, default="124M")
    one.add_argument("--shape", nargs=2, type=int, default=(8, 128), metavar=("EXAMPLES", "TOKENS"))
    one.add_argument("--copies", type=int, default=4)
    one = kinds.add_parser("memory-of", help="one row of `memory`, in this process")
    one.add_argument("row", nargs=5, metavar=("WAY", "SIZE", "EXAMPLES", "TOKENS", "COPIES"))
    one = kinds.add_parser("blas-of", help="one row of `blas`, in this process")
    one.add_argument("row", nargs=4, metavar=("SIZE", "EXAMPLES", "TOKENS", "THREADS"))
    one = kinds.add_parser("gpu", help=gpu.__doc__)
    one.add_argument("--device", default="cuda")
    one.add_argument("--size", choices=common.SIZES, default="124M")
    one.add_argument("--model", default="tiny", help="folder of a causal language model, for whole runs")
    for name, module in (("prompt", prompt), ("adapters", adapters)):
        one = kinds.add_parser(name, help=module.__doc__)
        one.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
        one.add_argument("--threads", type=int, default=2)
        one.add_argument("--pairs", type=int, default=5)
    one = kinds.add_parser("model-types", help=model_types.__doc__)
    one.add_argument(
        "--out", type=Path, required=True, help="folder of rows.jsonl, which it goes on from, and table.md"
    )
    one.add_argument("--only", nargs="*", default=[], metavar="TYPE")
    one = kinds.add_parser("architectures", help=architectures.__doc__)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--pairs", type=int, default=5)
    one.add_argument("--only", nargs="*", default=[], metavar="TYPE")
    one = kinds.add_parser("digits", help=digits.__doc__)
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--only", nargs="*", default=list(digits.WAYS), choices=digits.WAYS, metavar="WAY")
    one = kinds.add_parser("three-modes", help=three_modes.__doc__)
    one.add_argument(
        "--out", type=Path, required=True, help="folder of the runs, which it goes on from, and the figure"
    )
    one = kinds.add_parser("trunk", help=trunk.__doc__)
    one.add_argument("--model", required=True, help="a causal language model's folder")
    one.add_argument("--data", type=Path, required=True, help="a file of reviews of two classes")
    one.add_argument("--only", nargs="*", default=list(trunk.STEPS), choices=trunk.STEPS)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--pairs", type=int, default=5)
    one = kinds.add_parser("quantised", help=quantised.__doc__)
    one.add_argument("--model", required=True, help="a causal language model's folder")
    one.add_argument("--data", type=Path, required=True, help="a file of reviews of two classes")
    one.add_argument("--only", nargs="*", default=list(quantised.PARTS), choices=quantised.PARTS)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--bases", nargs="*", default=list(quantised.BASES), choices=quantised.BASES)
    one = kinds.add_parser("quantised-of", help="one row of the memory of `quantised`, in this process")
    one.add_argument("row", nargs=3, metavar=("MODEL", "BASE", "TRAINS"))
    one = kinds.add_parser("fuzz", help=fuzz.__doc__)
    one.add_argument("--inputs", type=int, default=20_000, help="of each reader")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--only", nargs="*", default=[], metavar="PART", help="parts of readers' names")
    one.add_argument("--guided", type=int, default=0, metavar="SECONDS", help="a reader: by atheris, not at random")
    one = kinds.add_parser("crash", help=crash.__doc__)
    one.add_argument(
        "--images", type=int, default=134, help="of each kind of run and model of a disk: 15 times as many"
    )
    one.add_argument("--only", nargs="*", default=list(crash.KINDS), choices=crash.KINDS, metavar="RUN")
    given = parser.parse_args()
    if given.what in ("fuzz", "crash"):
        torch.set_num_threads(1)
        print(common.machine(), flush=True)
        is_well = (
            fuzz.report(given.inputs, given.seed, given.only, given.guided)
            if given.what == "fuzz"
            else crash.report(given.images, given.only)
        )
        sys.exit(0 if is_well else 1)
    if given.what == "model-types":
        model_types.report(given.out, given.only)
        return
    if given.what == "digits":
        torch.set_num_threads(1)
        print(common.machine(), flush=True)
        digits.report(given.seeds, given.only)
        return
    if given.what == "three-modes":
        print(common.machine(), flush=True)
        three_modes.report(given.out.absolute())
        return
    if given.what == "trunk":
        torch.set_num_threads(given.threads)
        print(common.machine(), flush=True)
        print("| step | full | with kept states | kept / full | full / kept |\n| --- | --- | --- | --- | --- |")
        trunk.report(given.model, given.data.absolute(), given.threads, given.pairs, given.only)
        return
    if given.what == "quantised":
        torch.set_num_threads(1)
        print(common.machine(), flush=True)
        quantised.report(given.model, given.data.absolute(), given.only, given.bases, given.repeats, given.seeds)
        return
    if given.what == "quantised-of":
        print(json.dumps(quantised.measure(*given.row)))
        return
    if given.what == "memory-of":
        way, size, examples, tokens, copies = given.row
        print(memory.measure(way, size, (int(examples), int(tokens)), int(copies)))
        return
    if given.what == "blas-of":
        size, examples, tokens, threads = given.row
        blas.measure(size, (int(examples), int(tokens)), int(threads))
        return
    if given.what == "gpu":
        if given.device.startswith("cuda") and not torch.cuda.is_available():
            sys.exit(
                "torch sees no CUDA device here: run this on a machine with a GPU, or exercise it with --device cpu"
            )
        print(torch.cuda.get_device_name() if given.device.startswith("cuda") else common.machine())
        sys.exit(0 if gpu.report(given.device, given.size, given.model) else 1)
    if given.what != "memory":
        torch.set_num_threads(given.threads)
    print(common.machine(), flush=True)
    if given.what == "query":
        print(
            "| model | batch | queries | copies | step / 2 forwards | step / chunked | MeZO / 2 forwards | MeZO/step |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for shape in [tuple(given.shape)] if given.shape else query.SHAPES:
            query.report(given.size, shape, given.threads, given.pairs)  # type: ignore[arg-type]
    elif given.what == "scopes":
        print("| model | batch | scope and kind | query / 2 forwards |\n| --- | --- | --- | --- |", flush=True)
        query.report_scopes(given.size, tuple(given.shape or (2, 128)), given.threads, given.pairs)  # type: ignore[arg-type]
    elif given.what == "first-order":
        print("| model | batch | optimizer | plain step | ours / plain |\n| --- | --- | --- | --- | --- |", flush=True)
        first_order.report(given.size, tuple(given.shape or (4, 64)), given.threads, given.pairs)  # type: ignore[arg-type]
    elif given.what == "blas":
        print("| model | batch | mode | plain forward | step |\n| --- | --- | --- | --- | --- |", flush=True)
        blas.report(given.size, given.threads, given.pairs)
    elif given.what == "prompt":
        print("| what | candidates | over | ratio |\n| --- | --- | --- | --- |", flush=True)
        prompt.report(given.model, given.threads, given.pairs)
    elif given.what == "adapters":
        adapters.report(given.model, given.threads, given.pairs)
    elif given.what == "architectures":
        architectures.report(given.pairs, given.only)
    elif given.what == "replay":
        print("| model | records x directions | directions a second | over torch.randn |\n| --- | --- | --- | --- |")
        replay.report(given.size, given.threads, given.pairs)
    else:
        print("| model | batch | way | MiB | over inference |\n| --- | --- | --- | --- | --- |", flush=True)
        memory.report(given.size, tuple(given.shape), given.copies)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

"""What a sweep's file says: which runs there are, which of them tune, which arms are compared.

    about = "one line: the question"
    seeds = [0, 1, 2, 3]             # each arm runs with every seed
    [base]                           # settings of every run
    [grid]                           # key = [values]: crossed with each other and with the runs below
    [[runs]]                         # a name and settings; a list of values is crossed, too
    [tune]                           # key = [values]: tried with the first seed; the others run at the best of them
                                     # key = { around = value, factor = 3, most = 7 }: as many as it takes to find it
    [[leave-out]]                    # key = value or [values]: combinations that are not run
    [merge]                          # name = [data sets]: data that are merged before the runs begin
    with-controls = true             # controls of every run, and beside each run of instruct its arms without noise
    [slurm]                          # options of sbatch, for --engine slurm
    [scale.laptop]                   # any of the above, put in its place at this scale

Everything here is a plain function of the file: nothing is read but it, nothing is written.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.base.files import shipped
from zofed.config import SETTINGS
from zofed.experiments import slurm_options, sweep_walk
from zofed.experiments.sweep import Arm, Sweep, Values, pairs, safe

SHIPPED = shipped("experiments")
COPY = "sweep.toml"  # the name under which a sweep writes itself down in its folder
PARTS = ("about", "seeds", "base", "grid", "runs", "tune", "leave-out", "merge", "slurm", "with-controls")
OWN = {"out": "--out names the sweep's folder", "seed": "write seeds = [0, 1, 2] at the top of the file"}
DATA_KEYS = ("dataset", "bp-dataset", "eval-dataset")
WITHOUT_NOISE = ("guide-only", "line")  # kinds of instruct that tell what its noise adds
MOST_RUNS = 5_000  # that one of the runs, the grid and what is tuned give together with each seed
LONGEST_NAME = 150  # characters of a run's name, which is a folder's


def names() -> list[str]:
    """The experiments that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def find(name: str) -> Path:
    """The file of that path, or of the shipped experiment of that name. Raises UserError for neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (shipped := SHIPPED / f"{name}.toml").is_file():
        return shipped
    if path.suffix == ".toml" or "/" in name:
        raise UserError(
            f"{name} is no file: give a sweep's TOML file, or the name of an experiment: {', '.join(names())}"
        )
    raise UserError(config.unknown(name, names(), "experiment"))


def read(
    path: Path,
    scale: str = "",
    options: Mapping[str, str] | None = None,
    data: Sequence[str] = (),
    *,
    with_controls: bool = False,
    slurm: Mapping[str, Any] | None = None,
) -> Sweep:
    """The sweep in a file at one of its scales (empty: the first).

    options: settings of every run that override the base. data: `NAME=PATH`, a path read in place of a data set that
    the file names. with_controls: as the part of that name. slurm: options of sbatch that override the file's. Raises
    UserError, one line that names the file and what is wrong in it.
    """
    parts = config.read_toml(path) | ({"with-controls": True} if with_controls else {})
    if path.name == COPY:
        parts = _with_present_names(parts)
    try:
        parts = _at_scale(parts, scale)
        if slurm:
            parts["slurm"] = parts.get("slurm", {}) | dict(slurm)
        return of(_with_data(parts, data), options or {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _with_present_names(parts: Values) -> Values:
    """The parts as a sweep wrote them down, with settings by their present names, whichever version wrote them."""
    found: Values = {}
    for key, value in parts.items():
        if key in ("runs", "leave-out") and isinstance(value, list):
            value = [_present(one) for one in value]
        found[key] = _present(value) if key in ("base", "grid", "tune") else value
    return found


def _present(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    named = config.with_present_names(values)
    return {key: _present(value) if key == "tune" else value for key, value in named.items()}


def with_merged(sweep: Sweep, data: Sequence[str]) -> Sweep:
    """The sweep with its merged data as `NAME=PATH`; there is nothing left to merge."""
    return of(_with_data({key: value for key, value in sweep.parts.items() if key != "merge"}, data))


def _at_scale(parts: Values, scale: str) -> Values:
    """The parts with those of one scale in their place: tables key by key, runs of the same name too."""
    parts = dict(parts)
    scales = parts.pop("scale", {})
    _check_scales(scales, parts.get("runs", []))
    if scale and not scales:
        raise UserError(f"it has no scales: leave --scale {scale} out")
    if scale and scale not in scales:
        raise UserError(config.unknown(scale, list(scales), "scale"))
    if scales:
        for key, value in scales[scale or next(iter(scales))].items():
            before = parts.get(key)
            if key == "runs" and before:
                own = {run.get("name"): run for run in value}
                value = [run | own.pop(run.get("name"), {}) for run in before] + list(own.values())
            parts[key] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    for key in parts:
        if key not in PARTS:
            present = config.RENAMED.get(key, key)
            told = f"{present} is a setting: it goes into [base]" if present in SETTINGS else ""
            raise UserError(told or config.unknown(key, [*PARTS, "scale"], "part of a sweep"))
    return parts


def _check_scales(scales: Any, runs: Any) -> None:
    """Raise UserError unless each scale is a table, whose runs can take the place of the file's own."""
    if not isinstance(scales, dict):
        raise UserError(f"scale = {scales!r} is no table: write [scale.NAME], and its parts below it")
    for name, own in scales.items():
        if not isinstance(own, dict):
            raise UserError(f"scale.{name} = {own!r} is no table: write [scale.{name}], and its parts below it")
    for some in (runs, *(own.get("runs", []) for own in scales.values())):
        _check_tables("runs", some)
        if odd := [run["name"] for run in some if not isinstance(run.get("name", ""), str)]:
            raise UserError(f"[[runs]] has the name {odd[0]!r}, which is no text: write it in quotes")


def of(parts: Values, options: Mapping[str, str] | None = None) -> Sweep:
    """The sweep that these parts of a file are, at its scale. Raises UserError for what is wrong in them."""
    options = options or {}
    _check_kinds(parts)
    seeds = parts.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"seeds = {seeds!r}: give a list of whole numbers from 0, as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {seeds!r} names one twice")
    base, grid, tune = parts.get("base", {}), parts.get("grid", {}), parts.get("tune", {})
    _check_keys(base, "[base]")
    _check_lists(grid, "[grid]")
    _check_tune(tune, "[tune]")
    left_out = parts.get("leave-out", [])
    for values in left_out:
        _check_keys(values, "[[leave-out]]")
    arms = [arm for run in parts.get("runs", [{}]) for arm in _arms(run, grid, tune)]
    arms = list(_kept(arms, base, left_out))
    if not arms:
        raise UserError("it has no runs: [[leave-out]] leaves out all of them, or runs = [] names none")
    varying = {key for arm in arms for key in (*arm.values, *itertools.chain(*arm.tuned))}
    for key in options:
        if key in varying:
            raise UserError(f"--{key} is what this sweep varies: leave it out, or change the file")
        if key in OWN:
            raise UserError(f"--{key}: {OWN[key]}")
    base = base | dict(options)
    if parts.get("with-controls"):
        base = base | {"controls": True}
        arms = _with_arms_without_noise(arms, base)
    parts = parts | {"base": base}
    sweep = Sweep(str(parts.get("about", "")), tuple(seeds), base, tuple(arms), parts.get("merge", {}), parts)
    _check_names(sweep)
    return sweep


def _check_kinds(parts: Values) -> None:
    """Raise UserError for a part that is no table, or no list of tables, where it should be one."""
    for key in ("base", "grid", "tune", "merge", "slurm"):
        if not isinstance(parts.get(key, {}), dict):
            raise UserError(f"{key} = {parts[key]!r} is no table: write [{key}], and key = value below it")
    for key in ("runs", "leave-out"):
        _check_tables(key, parts.get(key, []))
    if type(parts.get("with-controls", False)) is not bool:
        raise UserError(f"with-controls = {parts['with-controls']!r}: write true or false")
    if parts.get("grid") == {}:
        raise UserError("[grid] is empty: give it key = [values], or leave it out")
    slurm_options.check(parts.get("slurm", {}))
    for name, some in parts.get("merge", {}).items():
        if not isinstance(some, list) or len(some) < 2 or not all(isinstance(one, str) for one in some):
            raise UserError(f"[merge]: {name} = {some!r}: give a list of two data sets or more")


def _check_tables(key: str, found: Any) -> None:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{key} is no list of tables: write [[{key}]], and key = value below it")


def _arms(run: Values, grid: Values, tune: Values) -> Iterable[Arm]:
    """The arms of one of the runs: its lists and the grid crossed, each with the values its tuning tries."""
    run = dict(run)
    name, own_tune = str(run.pop("name", "")), run.pop("tune", {})
    where = f"[[runs]] {name}".strip()
    _check_keys(run, where)
    _check_tune(own_tune, f"{where} tune")
    crossed = {key: value for key, value in run.items() if isinstance(value, list)}
    _check_lists(crossed, where)
    fixed = {key: value for key, value in run.items() if key not in crossed}
    sizes = [
        len(value) for some in (grid, crossed, tune | own_tune) for value in some.values() if isinstance(value, list)
    ]
    if (count := math.prod(sizes)) > MOST_RUNS:
        raise UserError(
            f"{where or 'the grid'} gives {count:,} runs with each seed, more than {MOST_RUNS:,}: vary less"
        )
    tuned, walk = sweep_walk.line(tune | own_tune) or (tuple(_cross(tune | own_tune)), None)
    for values in _cross(grid | crossed):
        shown = values if name else fixed | values
        yield Arm(",".join(part for part in (safe(name), *pairs(shown)) if part), values | fixed, tuned, walk)


def _kept(arms: Iterable[Arm], base: Values, left_out: Sequence[Values]) -> Iterable[Arm]:
    """The arms, each without the values that are left out; an arm that has none left goes."""

    def is_out(values: Values) -> bool:
        return any(
            all(values.get(key) in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in rule.items())
            for rule in left_out
        )

    for arm in arms:
        tuned = tuple(values for values in arm.tuned if not is_out(base | arm.values | values))
        if arm.walk and 0 < len(tuned) < len(arm.tuned):
            raise UserError(f"[[leave-out]] leaves out values along which {arm.name or 'the runs'} tune: give a list")
        if tuned:
            yield replace(arm, tuned=tuned)


def _with_arms_without_noise(arms: Sequence[Arm], base: Values) -> list[Arm]:
    """The arms, and of each one of instruct the same with its guide in the place of its noisy directions, each once."""
    found = list(arms)
    for arm in arms:
        tuned = [{key: value for key, value in values.items() if key != "instruct-kind"} for values in arm.tuned]
        tuned = tuple(values for at, values in enumerate(tuned) if values not in tuned[:at])
        for kind in WITHOUT_NOISE if (base | arm.values).get("mode") == "instruct" else ():
            own = {"instruct-kind": kind}
            name = ",".join(part for part in (arm.name, *pairs(own)) if part)
            control = replace(arm, name=name, values=arm.values | own, tuned=tuned)
            if not any((one.values, one.tuned) == (control.values, control.tuned) for one in found):
                found.append(control)
    return found


def _with_data(parts: Values, data: Sequence[str]) -> Values:
    """The parts with paths in the place of data sets' names. Raises UserError for a name that they do not have."""
    wanted: dict[str, str] = {}
    for pair in data:
        name, mark, path = pair.partition("=")
        if not mark or not path:
            raise UserError(f"--data {pair}: write NAME=PATH")
        wanted[name] = path
    used: set[str] = set()

    def swap(value: Any, names_data: bool) -> Any:
        if isinstance(value, dict):
            return {key: swap(own, names_data or key in (*DATA_KEYS, "merge")) for key, own in value.items()}
        if isinstance(value, list):
            return [swap(own, names_data) for own in value]
        if names_data and isinstance(value, str) and value in wanted:
            used.add(value)
            return wanted[value]
        return value

    swapped = swap(parts, False)
    if unused := sorted(set(wanted) - used):
        raise UserError(f"--data {unused[0]}={wanted[unused[0]]}: the file names no data set {unused[0]!r}")
    return swapped


def _check_names(sweep: Sweep) -> None:
    """Resolve every run that there may be, and see that no two share a folder."""
    seen: set[str] = set()
    for arm in sweep.arms:
        for values in arm.tuned:
            try:
                run = sweep.run(arm, values, sweep.seeds[0])
            except UserError as error:
                told = ",".join(part for part in (arm.name, *pairs(values)) if part)
                raise UserError(f"run {told or 'of [base]'}: {error}") from error
            if run.name in seen:
                raise UserError(f"two runs are called {run.name!r}: give [[runs]] other names, or each value once")
            if len(run.name) > LONGEST_NAME:
                raise UserError(
                    f"run {run.name!r} has a name of {len(run.name)} characters, more than {LONGEST_NAME}: vary less"
                )
            seen.add(run.name)


def _check_keys(values: Values, where: str) -> None:
    for key in values:
        if key in OWN:
            raise UserError(f"{where}: {key} is not for runs to say: {OWN[key]}")
        if key not in SETTINGS:
            raise UserError(f"{where}: {config.unknown_setting(key)}")


def _check_lists(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where} is no table: write key = [values]")
    _check_keys(values, where)
    for key, value in values.items():
        if not isinstance(value, list):
            raise UserError(f"{where}: {key} = {value!r} is no list: write [{value!r}]")
        if not value:
            raise UserError(f"{where}: {key} = [] is empty: give it values, or leave it out")


def _check_tune(values: Values, where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where} is no table: write key = [values]")
    walked = {key: value for key, value in values.items() if isinstance(value, dict)}
    _check_lists({key: value for key, value in values.items() if key not in walked}, where)
    _check_keys(walked, where)
    for key, value in walked.items():
        sweep_walk.check(key, value, where)
    if walked and len(values) > 1:
        raise UserError(f"{where}: {next(iter(walked))} is searched for, which goes with no other: tune it alone")


def _cross(lists: Mapping[str, Sequence[Any]]) -> list[Values]:
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]

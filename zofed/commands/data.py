"""Find, fetch, merge and describe data sets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zofed.base import shell
from zofed.base.errors import Interrupted, UserError
from zofed.base.files import write_whole
from zofed.commands.console import AsJson, Reporter, brief, console, print_json, print_table
from zofed.commands.groups import CommandGroup
from zofed.data import catalog, subsets

data_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help=__doc__)
SOURCES_SHOWN = 16  # of a data set whose rows may each have a page as their source

Name = Annotated[str, typer.Argument(help="a name of zofed data list, or the path of a local file or folder")]
Force = Annotated[bool, typer.Option("--force", help="replace what lies there, once the new subset is whole")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(data_app, name="data")
    app.command("make-data")(make_data)
    app.command("make-model")(make_model)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with (done, total; 0 if unknown): a bar on a terminal, nothing in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


@data_app.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """Every data set by name, how much of it there is and how much of it lies here."""
    found: list[dict[str, Any]] = []
    for name in catalog.list_available_datasets():
        info, folder = catalog.CATALOG.get(name), subsets.find(name)
        here = subsets.info(folder).get("rows", 0) if folder else ("" if info and info.repository else "all")
        rows = info.rows if info and info.rows else None
        found.append({"name": name, "rows": rows, "here": here, "what": info.about if info else "merged"})
    if as_json:
        print_json(found)
        return
    table = Table("name", "rows", "here", "what", box=None, pad_edge=False)
    for row in found:
        shown = [f"{row[key]:,}" if isinstance(row[key], int) else row[key] or "" for key in ("rows", "here")]
        table.add_row(row["name"], *shown, row["what"])
    console.print(table)
    console.print(f"data root: {catalog.data_root()} (ZOFED_DATA names another)")


@data_app.command()
def show(name: Annotated[str, typer.Argument(help="a name of zofed data list")]) -> None:
    """Where a data set comes from, its columns, and what lies here of it."""
    folder = subsets.find(name)
    if name in catalog.CATALOG or not folder:
        info = catalog.get_dataset_info(name)
        console.print(f"{info.name}: {info.about}")
        told = {
            "repository": info.repository or "none: on this machine already",
            "configuration": info.config,
            "revision": info.revision,
            "split": info.split,
            "columns": ", ".join(info.columns),
            "classes": ", ".join(f"{label} {name}" for label, name in enumerate(info.classes)),
            "rows": f"about {info.rows:,}" if info.rows else "",
            "licence": info.licence,
            "recommended": f"zofed data download {name} --max-samples {info.recommended}" if info.repository else "",
        }
        for key, value in told.items():
            if value:
                console.print(f"  {key:14}{value}")
    if folder:
        console.print(f"here: {folder}")
        for key, value in subsets.info(folder).items():
            console.print(f"  {key:14}{value}")


@data_app.command()
def download(
    name: Annotated[str, typer.Argument(help="a name of zofed data list")],
    max_samples: Annotated[
        int | None, typer.Option(min=0, help="rows to take from the start; 0: all; default: see show")
    ] = None,
    revision: Annotated[str, typer.Option(help="commit, branch or tag of the hub's repository")] = "",
    config: Annotated[str, typer.Option(help="another configuration of the hub's repository")] = "",
    source: Annotated[
        Path | None, typer.Option("--from", help="local folder of parquet or jsonl in the hub's schema, not the hub")
    ] = None,
    force: Force = False,
) -> None:
    """Fetch the first rows of a data set into the data root; given again after a stop it goes on."""
    from zofed.data import download

    info = catalog.get_dataset_info(name)
    samples = info.recommended if max_samples is None else max_samples
    folder = catalog.data_root() / name
    if source and revision:
        raise UserError(f"--revision {revision} names a commit of the hub, --from {source} a local folder: give one")
    try:
        with bar(name) as progress:
            got = download.download(
                info, folder, samples=samples, revision=revision, config=config, source=source, force=force,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on from the last rows kept") from None
    console.print(f"{got['rows']:,} rows in {folder} (revision {got['revision']}, SHA-256 {got['sha256']})")
    if got["blank"]:
        console.print(f"{got['blank']:,} rows without text were left out")
    if samples > got["rows"]:
        console.print(f"there were no more: {samples:,} were asked for")
    console.print(f"next: {shell.command('zofed', 'train', '--dataset', name)}", markup=False)


@data_app.command()
def merge(
    names: Annotated[list[str], typer.Argument(help="data sets to merge: names or paths")],
    out: Annotated[
        Path | None, typer.Option(help="folder to write; default NAME_NAME_merged below the data root")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="names the order of the merged documents")] = 0,
    force: Force = False,
) -> None:
    """Merge data sets into one: a text, its source and its label a row, in shuffled order."""
    from zofed.data import mixing

    folder, info = mixing.merge(names, out.expanduser().absolute() if out else None, seed, force)
    for part in info["inputs"]:
        console.print(f"{part['documents']:8,} documents of {part['name']}")
    console.print(f"{info['rows']:8,} in {folder} (SHA-256 {info['sha256']})")
    known = folder.parent == catalog.data_root()
    console.print(
        f"next: {shell.command('zofed', 'data', 'distribution', folder.name if known else folder)}", markup=False
    )


@data_app.command()
def stats(
    name: Name,
    tokenizer: Annotated[str, typer.Option(help="shipped, gpt2 or a folder: what counts the tokens")] = "shipped",
    as_json: AsJson = False,
) -> None:
    """Documents, characters, tokens, percentiles of the lengths, duplicates, sources and labels."""
    from zofed.data import documents, mixing
    from zofed.data.tokenizers import load_tokenizer

    loaded, chosen = documents.load_documents(name), load_tokenizer(tokenizer)
    with bar("tokens") as progress:
        found = mixing.stats(loaded, chosen, progress)
    import numpy as np

    lengths_in = {"characters": found.characters, "tokens": found.tokens}
    if as_json:
        at = [*mixing.PERCENTILES, 100]
        print_json({
            "documents": len(loaded),
            **{unit: int(lengths.sum()) for unit, lengths in lengths_in.items()},
            "exact_duplicates": found.duplicates,
            "percentiles": {
                unit: dict(zip(map(str, at), np.percentile(lengths, at).tolist(), strict=True))
                for unit, lengths in lengths_in.items()
            },
            "sources": dict(found.sources.most_common()),
            "labels": {"none" if label is None else str(label): count for label, count in found.labels.items()},
        })  # fmt: skip
        return
    console.print(f"documents         {len(loaded):,}")
    console.print(f"characters        {found.characters.sum():,}")
    console.print(f"tokens            {found.tokens.sum():,} ({tokenizer})")
    console.print(f"exact duplicates  {found.duplicates:,} ({found.duplicates / len(loaded):.2%})")
    table = Table("length in", *(f"{p} %" for p in mixing.PERCENTILES), "max", box=None, pad_edge=False)
    for unit, lengths in lengths_in.items():
        table.add_row(
            unit, *(f"{value:,.0f}" for value in np.percentile(lengths, mixing.PERCENTILES)), f"{lengths.max():,}"
        )
    console.print(table)
    for source, count in found.sources.most_common(SOURCES_SHOWN):
        console.print(f"source {brief(source)}: {count:,}", markup=False)
    if (more := len(found.sources) - SOURCES_SHOWN) > 0:
        console.print(f"and {more:,} more sources of fewer documents")
    for label, count in sorted(found.labels.items(), key=lambda item: -1 if item[0] is None else item[0]):
        console.print(f"{'no label' if label is None else f'label {label}'}: {count:,} ({count / len(loaded):.1%})")


@data_app.command()
def distribution(
    name: Name,
    chunks: Annotated[int, typer.Option(min=0, help="consecutive parts to compare; 0: 10, or what the data allow")] = 0,
    as_json: AsJson = False,
) -> None:
    """Test whether the sources are evenly mixed over the length of a data set; status 1 where they are not."""
    from zofed.data import documents, mixing

    found = mixing.distribution(documents.load_documents(name), chunks)
    if as_json:
        print_json({
            "counts": {source: row.tolist() for source, row in zip(found.sources, found.counts, strict=True)},
            "chi_square": float(found.chi_square), "freedom": int(found.freedom), "p_value": float(found.p_value),
            "even": bool(found.even),
        })  # fmt: skip
        if not found.even:
            raise typer.Exit(1)
        return
    table = Table("source", "all", *(str(number) for number in range(1, found.counts.shape[1] + 1)), box=None)
    # The largest, in the order of their names.
    shown = sorted(sorted(range(len(found.sources)), key=lambda at: -found.counts[at].sum())[:SOURCES_SHOWN])
    for source, row in ((found.sources[at], found.counts[at]) for at in shown):
        table.add_row(Text(brief(source)), f"{row.sum():,}", *(f"{count:,}" for count in row))
    console.print(table)
    more = f", and of {len(found.sources) - len(shown):,} more sources" if len(found.sources) > len(shown) else ""
    console.print(f"documents of each source in {found.counts.shape[1]} consecutive chunks{more}")
    console.print(f"chi-square {found.chi_square:.2f} at {found.freedom} degrees of freedom, p = {found.p_value:.4g}")
    if found.even:
        console.print(f"evenly mixed: p is {mixing.SIGNIFICANCE} or more")
    else:
        console.print(f"not evenly mixed: p is below {mixing.SIGNIFICANCE}; zofed data merge shuffles")
        raise typer.Exit(1)


@data_app.command("partition")
def show_partition(
    name: Name,
    clients: Annotated[int, typer.Option(min=1, help="clients to deal to")],
    partition: Annotated[str, typer.Option(help="iid, dirichlet or source")] = "iid",
    dirichlet_alpha: Annotated[float, typer.Option(help="evenness of dirichlet; small: one label each")] = 0.5,
    seed: Annotated[int, typer.Option(help="the seed of the run")] = 0,
    held_out_fraction: Annotated[
        float, typer.Option(help="share of the documents that no client gets, as in the run")
    ] = 0.1,
    out: Annotated[Path, typer.Option(help="folder for partition.csv and partition.png; replaced")] = Path(),
) -> None:
    """Show how a federated run deals its training documents out to clients: a table, and a picture of it."""
    from zofed import config
    from zofed.data import documents, partitions
    from zofed.runs import pictures

    settings = config.resolve(
        {
            "partition": partition,
            "dirichlet-alpha": dirichlet_alpha,
            "seed": seed,
            "held-out-fraction": held_out_fraction,
        }
    )
    found, _ = documents.split_held_out(documents.load_documents(name), settings.held_out_fraction, settings.seed)
    shares = dict(enumerate(partitions.deal(found, clients, settings)))
    counts = {client: partitions.counts(share, partition) for client, share in shares.items()}
    characters = {client: sum(len(document.text) for document in share) for client, share in shares.items()}
    columns, rows = partitions.table(partitions.largest(counts, pictures.GROUPS_SHOWN), characters)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(brief(column)), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row))
    print_table(table)
    console.print(f"documents of each group; {len(found):,} in all, without the held-out ones")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "partition.csv", partitions.to_csv(counts, characters))
        picture = pictures.partition(counts, out / "partition.png")
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written ({error.strerror}): choose another --out") from error
    console.print(f"{out / 'partition.csv'}, {picture}")


def make_data(out: Annotated[Path, typer.Argument(help="folder that gets tokenizer/ and datasets_subset/")]) -> None:
    """Generate the tokenizer and the data that ship with zofed, the same bytes every time."""
    from zofed.data.sample_data import make_shipped_files

    for path in make_shipped_files(out):
        console.print(str(path))


def make_model(out: Annotated[Path, typer.Argument(help="folder that gets pretrained/sample.json")]) -> None:
    """Pretrain the small model that ships with zofed (model = sample) on generated opinions, in minutes on one core."""
    from zofed.training import pretraining

    file = out / "pretrained" / "sample.json"
    file.parent.mkdir(parents=True, exist_ok=True)  # else minutes would pass before a folder is refused
    with Reporter(pretraining.RECIPE["steps"], "step") as reporter:
        pretraining.make_sample_model(file, reporter)
    console.print(str(file), markup=False)

"""Train and score every cell of the results table that has no result yet, and write the table.

    python benchmarks/table/run.py ml-1m --seeds 3

A cell is one row and one seed. Each finished one is a line of `cells.jsonl` in the folder of
results. Stopped at any time and run again, the command goes on. The output folder of a `ccf-llm
train` of the cell's settings, put into the work folder as `cells/NAME`, is taken for its training.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import mean

from measure import Bench
from render import table_markdown, write_table
from rows import CELLS_FILE, DATASETS, Cell, plan, read_cells, row_of

from ccf_llm_hf.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        options = _parser().parse_args(argv)
        bench, cells, left = planned(options)
        if options.dry_run:
            print("\n".join(outlook(bench, cells, left)))
            return 0
        for flag, folder in (("--out", bench.results), ("--work", bench.work)):
            _make_folder(flag, folder)
        for number, cell in enumerate(left, 1):
            print(f"cell {number}/{len(left)}: {cell.name}", file=sys.stderr, flush=True)
            bench.run(cell)
            write_table(bench.results)
        print(table_markdown(write_table(bench.results)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def planned(options: argparse.Namespace) -> tuple[Bench, list[Cell], list[Cell]]:
    """Where the cells are computed, those asked for, and those to compute, in order: the ones asked
    for without a result, and what they are made of where that is not in the work folder.

    Raises:
        InputError: an unknown track or cell, or results of another data set or of other settings.
    """
    dataset = options.dataset
    bench = Bench(
        dataset,
        plan(dataset, options.tracks or DATASETS[dataset], options.seeds, options.quick),
        Path(options.work or f"runs/table/{dataset}"),
        Path(options.out or f"results/{dataset}"),
        options.offline,
    )
    cells = chosen(bench.cells, options.only)
    done = {result["cell"]: result for result in read_cells(bench.results)}
    for cell in cells:
        result = done.get(cell.name)
        if result and result["dataset"] != dataset:
            raise InputError(
                f"{bench.results} holds results of {result['dataset']}, not {dataset}: name "
                "another folder (--out)"
            )
        if result and result.get("settings") != cell.stage:
            raise InputError(
                f"{bench.results / CELLS_FILE}: {cell.name} was trained with other settings; "
                f"delete its line and {bench.folder(cell)} to compute it again, or give --out and "
                "--work"
            )
    names = {cell.name for cell in cells if cell.name not in done}
    for cell in reversed(bench.cells):  # what a cell is made of is planned before it
        if cell.name in names:
            names |= {other.name for other in bench.builds_on(cell) if not bench.is_here(other)}
    return bench, cells, [cell for cell in bench.cells if cell.name in names]


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose name is one of `only`, or contains one that is no cell's name; all if that
    is empty.

    Raises:
        InputError: one of them is in no cell's name.
    """
    names = {cell.name: cell for cell in cells}
    for text in only:
        if not any(text in name for name in names):
            near = get_close_matches(text, names, 1)
            hint = f" (near it: {near[0]!r})" if near else ""
            raise InputError(f"--only {text!r} is in no cell's name{hint}: --dry-run lists them")
    wanted = {text for text in only if text in names}
    wanted |= {name for text in only if text not in names for name in names if text in name}
    return [cell for name, cell in names.items() if not only or name in wanted]


def outlook(bench: Bench, cells: Sequence[Cell], left: Sequence[Cell]) -> list[str]:
    """What a run would do, a line a cell: done, to do, or again (it has a result, but others are
    made of what it left, which is not here), and its minutes or its row's on average."""
    results = read_cells(bench.results)
    lines, minutes, unknown = [], 0.0, 0
    for cell in bench.cells:
        if cell not in cells and cell not in left:
            continue
        row = [r for r in results if row_of(cell).items() <= r.items()]
        own = [r for r in row if r["cell"] == cell.name]
        took = mean(r["minutes"] for r in own or row) if row else None
        state = "done " if cell not in left else "again" if own else "to do"
        lines.append(f"{state} {'    ?' if took is None else f'{took:5.1f}'} min  {cell.name}")
        if cell in left:
            minutes, unknown = minutes + (took or 0.0), unknown + (took is None)
    total = f"{len(left)} cells to do"
    if minutes:
        total += f": {minutes / 60:.1f} hours by the minutes of finished seeds"
    return [*lines, total + f"; no estimate for {unknown} of them" * (unknown > 0)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 (default: 1)")
    parser.add_argument(
        "--tracks", nargs="+", metavar="TRACK", help="some of the data set's (default: all)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cells of these names, or whose names contain one of these texts",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the main rows, trained on a sample of the labels"
    )
    parser.add_argument("--out", help="folder of the results (default: results/DATASET)")
    parser.add_argument(
        "--work", help="folder of data, checkpoints and scores (default: runs/table/DATASET)"
    )
    parser.add_argument("--offline", action="store_true", help="do not use the network")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells and their minutes, compute nothing"
    )
    return parser


def _make_folder(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be made ({error.strerror}): name another folder"
        ) from error


if __name__ == "__main__":
    sys.exit(main())

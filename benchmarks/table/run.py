"""Train and score every cell of the results table that has no result yet.

python benchmarks/table/run.py ml-1m --budget quick --seeds 1
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from analyses import Subject, analyze
from cells import TRACKS, Cell, plan
from reproduction import Reproduction
from side_by_side import side_by_side
from table import markdown, outlook_text, read_cells, write_table
from workspace import say

from ccf_llm_hf.cli_arguments import (
    CommandParser,
    add_config_arguments,
    config_from_arguments,
)
from ccf_llm_hf.configs import REPRODUCIBLE, ReproduceConfig
from ccf_llm_hf.errors import FolderInUse, InputError

# Of the test split, that the analyses of the quick budget score again and again.
QUICK_ANALYZED_ROWS = 1_500


def reproduce(config: ReproduceConfig) -> list[dict[str, Any]]:
    """Compute the cells of a data set that have no result yet, write the table, and if asked to
    the analyses.

    Args:
        config: see `ReproduceConfig`.

    Returns:
        The rows of `table.json`.

    Raises:
        InputError: an unknown budget, track or cell, a folder that cannot be written to, or what
            preparing and training raise.
    """
    here, cells, left = begun(config)
    for flag, folder in folders(here).items():
        check_writable(flag, folder)
    done = [cell for cell in cells if cell not in left]
    say(f"{len(cells)} cells, {len(done)} of them done in {here.results}")
    for cell in left:
        if cell not in cells or here.result_file(cell).is_file():
            say(f"{here.label(cell)} too: others are made of it, and it is not in the work folder")
    try:
        compute(here, left)
    except FolderInUse:
        raise
    except InputError as error:
        if (made := here.workspace.holding(str(error))) is None:
            raise
        # What the reader of a damaged file advises is a command of another folder's making.
        raise InputError(
            f"{error}. But reproduce made this folder itself: delete {made}, and it is made again"
        ) from error
    rows = write_table(here.results)
    if config.analyses:
        most = QUICK_ANALYZED_ROWS if config.budget == "quick" else None
        analyze(subjects(here), here.workspace.data("protocol"), here.results, most)
    return rows


def compute(here: Reproduction, left: Sequence[Cell]) -> None:
    """Compute cells, one after another or several at a time; the table grows with each."""
    if here.config.workers > 1:
        here.make_inputs(left)
        jobs = {cell.name: here.needs(cell) for cell in left}
        work = partial(run_named, here.config)
        side_by_side(jobs, work, partial(finished, here), here.config.workers)
    else:
        for number, cell in enumerate(left, 1):
            say(f"cell {number}/{len(left)}: {here.label(cell)}")
            finished(here, cell.name, here.run(cell))


def begun(config: ReproduceConfig) -> tuple[Reproduction, list[Cell], list[Cell]]:
    """The run that a configuration asks for, its chosen cells, and those to compute, in order: the
    chosen ones without a result, and what they are made of where that is not in the work folder.

    Raises:
        InputError: an unknown budget, track or cell, folders that cannot be used or are of another
            data set, or a result file that holds none or one of other settings: better said now
            than hours later.
    """
    if config.workers < 1:
        raise InputError(f"--workers must be at least 1, not {config.workers}")
    here = Reproduction.of(config)
    cells = chosen(here, config.only)
    for flag, folder in folders(here).items():
        if any(place.is_file() for place in (folder, *folder.parents)):
            raise InputError(f"{flag} {folder} is a file, or in one: name a folder")
    check_results(here)
    for track in config.tracks:
        here.workspace.check(track)
    for cell in cells:
        if other := here.made_otherwise(cell):
            raise InputError(
                f"{here.result_file(cell)} was made with another {', '.join(other)}: delete it and "
                f"{here.folder(cell)} to have the cell computed again, or give --out and --work"
            )
    names = {cell.name for cell in cells if not here.result_file(cell).is_file()}
    for cell in reversed(here.cells):  # what a cell is made of is planned before it
        if cell.name in names:
            names |= {other.name for other in here.builds_on(cell) if not here.is_here(other)}
    return here, cells, [cell for cell in here.cells if cell.name in names]


def check_results(here: Reproduction) -> None:
    """Refuse a folder of results that holds a file which is no result, or is of another data set.

    Raises:
        InputError: one is.
    """
    for row in read_cells(here.results).values():
        for cell in row:
            if cell["dataset"] != here.config.dataset:
                raise InputError(
                    f"{here.results} holds results of {cell['dataset']}, not "
                    f"{here.config.dataset}: name another folder (--out)"
                )


def outlook(config: ReproduceConfig) -> list[dict[str, Any]]:
    """What `reproduce` would do: computes and writes nothing.

    Returns:
        A dict a cell, in order: its name, whether it is done, whether it is computed `again` since
        others are made of what it left, which is not in the work folder, and the minutes that it
        took, or else that the finished seeds of its row took on average, None where there are none.

    Raises:
        InputError: what `begun` raises.
    """
    here, cells, left = begun(config)
    rows = read_cells(here.results)

    def minutes(cell: Cell) -> float | None:
        took = {
            result["seed"]: result["minutes"]
            for result in rows.get(tuple(here.row(cell).values()), [])
        }
        own = took.get(cell.seed if cell.seeded else None)
        return mean(took.values()) if own is None and took else own

    return [
        {
            "cell": here.label(cell),
            "done": cell not in left,
            "again": cell in left and here.result_file(cell).is_file(),
            "minutes": minutes(cell),
        }
        for cell in here.cells
        if cell in cells or cell in left
    ]


def run_named(config: ReproduceConfig, name: str) -> dict[str, Any]:
    """Compute the cell of this name in a process of its own, which from now on prints into
    `log.txt` in the cell's folder; returns its result."""
    here = Reproduction.of(config)
    cell = next(cell for cell in here.cells if cell.name == name)
    log = here.folder(cell) / "log.txt"
    say(f"{here.label(cell)}: begun, prints into {log}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    return here.run(cell)


def finished(here: Reproduction, name: str, result: dict[str, Any]) -> None:
    """Say what a cell gave, and write the table with it."""
    test = result["test"]
    say(f"{name}: test AUC {test['auc']:.4f} UAUC {test['uauc']:.4f}, {result['minutes']:.1f} min")
    write_table(here.results)


def subjects(here: Reproduction) -> list[Subject]:
    """Which cells are analyzed: the protocol track's main rows, or trained ones that `--only`
    names, of seed 0, as far as they are finished and their checkpoints here. MF goes along.
    """
    named = chosen(here, here.config.only) if here.config.only else []
    return [
        here.subject(cell)
        for cell in here.cells
        if cell.track == "protocol"
        and cell.seed == 0
        and (cell in named if named and cell.stage is not None else cell.analyzed)
        and here.is_here(cell)
    ]


def chosen(here: Reproduction, only: Sequence[str]) -> list[Cell]:
    """The cells whose name is one of `only`, or contains one that is no cell's name; all if that
    is empty.

    Raises:
        InputError: one of them is in no cell's name.
    """
    names = {here.label(cell): cell for cell in here.cells}
    for text in only:
        if not any(text in name for name in names):
            raise InputError(
                f"--only {text!r} is in no name of a cell with --budget {here.config.budget} "
                f"--seeds {here.config.seeds}{_hint(here, text)}: --dry-run lists them, here and "
                "with --budget full"
            )
    wanted = {text for text in only if text in names}
    wanted |= {name for text in only if text not in names for name in names if text in name}
    return [cell for name, cell in names.items() if not only or name in wanted]


def _hint(here: Reproduction, text: str) -> str:
    """Where a name that no chosen cell has may come from: another track, or a slip."""
    asked = here.config
    for track in (track for track in TRACKS if track not in asked.tracks):
        cells = plan([track], asked.budget, asked.seeds, asked.dataset)
        if any(text in here.label(cell) for cell in cells):
            return f" --tracks {' '.join(asked.tracks)} (but with --tracks {track})"
    near = get_close_matches(text, [here.label(cell) for cell in here.cells], 1)
    return f" (near it: {near[0]!r})" if near else ""


def folders(here: Reproduction) -> dict[str, Path]:
    """The folders that a run writes into, by the flags that name them."""
    return {"--out": here.results, "--work": here.workspace.folder}


def check_writable(flag: str, folder: Path) -> None:
    """Make a folder where it is missing and write into it: better refused now than hours later.

    Raises:
        InputError: that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written to see whether one can")
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be written to ({error.strerror}): name another folder"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", choices=REPRODUCIBLE, help="which data set")
    add_config_arguments(parser, ReproduceConfig, skip=("dataset",))
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells and their minutes, compute nothing"
    )
    try:
        arguments = parser.parse_args(argv)
        config = config_from_arguments(ReproduceConfig, arguments)
        if arguments.dry_run:
            print(outlook_text(outlook(config)))
        else:
            print(markdown(reproduce(config)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

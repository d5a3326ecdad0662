"""Data and CF tables that cells share: made once, in the work folder."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ccf_llm_hf.cf.config import CFConfig, LightGCNConfig, MFConfig, SASRecConfig
from ccf_llm_hf.cf.fit import fit_cf
from ccf_llm_hf.data.config import PrepareConfig
from ccf_llm_hf.data.prepare import prepare
from ccf_llm_hf.data.prepared import PROTOCOL_FILE, load_protocol
from ccf_llm_hf.errors import InputError

# Of a signed history the table needs what the prompt shows and what is folded in besides.
STORED_HISTORY = 256
# By track and name: which CF model, fitted how. The open track's strengths are the best of those
# tried for users folded in, on validation (results/ml-1m/experiments.md); the grid of `fit-cf`
# looks at users of the table. Most ratings lie before its first snapshot: few snapshots will do.
TABLES: dict[str, dict[str, tuple[str, CFConfig]]] = {
    "protocol": {
        "mf": ("mf", MFConfig(cross_fit="snapshots")),
        "mf_nobias": ("mf", MFConfig(use_biases=False)),
        "mf_folds": ("mf", MFConfig()),
        "lightgcn": ("lightgcn", LightGCNConfig(cross_fit="snapshots")),
        "sasrec": ("sasrec", SASRecConfig()),
    },
    "open": {
        "mf": (
            "mf",
            MFConfig(
                rows="earlier",
                targets="graded",
                cross_fit="snapshots",
                snapshots=8,
                l2_factors=5.0,
                l2_user_bias=5.0,
                l2_item_bias=0.3,
            ),
        ),
    },
}


@dataclass
class Workspace:
    """The work folder of one data set: prepared data a track, CF tables, cells' runs.

    Attributes:
        folder: where everything goes; none of it belongs into git.
        dataset: source of `ccf-llm prepare`.
        offline: use no network.
    """

    folder: Path
    dataset: str
    offline: bool = False

    def check(self, track: str) -> None:
        """Refuse a work folder of another data set; one that cannot be read is found when it is.

        Raises:
            InputError: the track's prepared folder is of another data set.
        """
        folder = self.folder / f"data-{track}"
        try:
            found = load_protocol(folder).get("name")
        except InputError:
            return
        if found != self.dataset:
            raise InputError(
                f"{folder} holds {found}, not {self.dataset}: name another work folder (--work)"
            )

    def holding(self, message: str) -> Path | None:
        """The folder of data, a table or a cell's run that a message names a file of; None where it
        names none."""
        start = re.escape(f"{self.folder}/")
        found = re.search(rf"{start}((?:cells/)?[\w.-]*[\w-])(?![\w-])", message)
        return self.folder / found[1] if found else None

    def data(self, track: str) -> Path:
        """The prepared folder of a track."""
        folder = self.folder / f"data-{track}"
        if not (folder / PROTOCOL_FILE).is_file():
            signed = {"histories": "signed", "max_history": STORED_HISTORY}
            options = {} if track == "protocol" else signed
            source = {"source": self.dataset, "offline": self.offline}
            prepare(PrepareConfig(out=str(folder), **source, **options))  # type: ignore[arg-type]
        return folder

    def cf(self, track: str, name: str) -> Path:
        """The folder of a fitted CF table.

        Raises:
            InputError: the track has no such table.
        """
        if name not in TABLES[track]:
            raise InputError(f"the {track} track has no CF table {name!r}")
        folder = self.folder / f"cf-{track}-{name}"
        if not (folder / "cf_embeddings.safetensors").is_file():
            say(f"{folder}: fitted once, for cells that are made of it or compared with it")
            kind, config = TABLES[track][name]
            fit_cf(kind, self.data(track), folder, config)
        return folder


def say(line: str) -> None:
    """Progress goes to stderr: stdout is for the table."""
    print(line, file=sys.stderr, flush=True)

"""Data and CF tables that cells share: made once, in the work folder."""

from dataclasses import dataclass
from pathlib import Path

from ccf_llm_hf.cf.embeddings import CFEmbeddings
from ccf_llm_hf.cf.mf import fit_cf
from ccf_llm_hf.configs import MFConfig, PrepareConfig
from ccf_llm_hf.data.prepare import prepare
from ccf_llm_hf.errors import InputError

# Of a signed history the table needs what the prompt shows and what is folded in besides.
STORED_HISTORY = 256
# Of the open track. Most ratings lie before the first snapshot already: more snapshots would only
# cut the packs. The strengths are the best of those tried for users folded in on validation
# (results/ml-1m/experiments.md); the grid of `fit-cf` looks at the table's own users instead.
OPEN_MF = MFConfig(rows="earlier", snapshots=8, l2_factors=9.0, l2_user_bias=8.0, l2_item_bias=0.5)


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

    def data(self, track: str) -> Path:
        """The prepared folder of a track."""
        folder = self.folder / f"data-{track}"
        if not (folder / "protocol.json").is_file():
            signed = {"history_labels": "signed", "max_history": STORED_HISTORY}
            options = {} if track == "protocol" else signed
            source = {"source": self.dataset, "offline": self.offline}
            prepare(PrepareConfig(out=str(folder), **source, **options))  # type: ignore[arg-type]
        return folder

    def cf(self, track: str, name: str) -> Path:
        """The folder of a fitted CF table.

        Raises:
            InputError: the track has no such table.
        """
        folder = self.folder / f"cf-{track}-{name}"
        if not (folder / "cf_embeddings.safetensors").is_file():
            self._fit(track, name, folder)
        return folder

    def _fit(self, track: str, name: str, folder: Path) -> CFEmbeddings:
        data = self.data(track)
        if track == "open" and name == "mf":
            return fit_cf("mf", data, folder, OPEN_MF)
        if track == "protocol" and name == "mf":
            return fit_cf("mf", data, folder, MFConfig())
        if track == "protocol" and name == "mf_nobias":
            return fit_cf("mf", data, folder, MFConfig(use_biases=False, snapshots=1))
        raise InputError(f"the {track} track has no CF table {name!r}")

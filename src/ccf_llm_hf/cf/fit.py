"""The CF models by name: fit one and write it, score with what was written."""

from pathlib import Path

import pandas as pd

from ccf_llm_hf.cf.config import CF_CONFIGS, CFConfig, LightGCNConfig, MFConfig
from ccf_llm_hf.cf.lightgcn import fit_lightgcn
from ccf_llm_hf.cf.mf import fit_mf
from ccf_llm_hf.cf.sasrec import fit_sasrec, score_sasrec
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import lock_output


def fit_cf(
    kind: str, data_dir: str | Path, out: str | Path, config: CFConfig | None = None
) -> CFVectors:
    """Fit a CF model, save it in `out` and print what was chosen (`ccf-llm fit-cf`).

    Args:
        kind: `mf`, `lightgcn` or `sasrec`.
        data_dir: folder written by `ccf-llm prepare`.
        out: folder to write; of SASRec it also gets the encoder, see `score_sasrec`.
        config: of this model; default its own.

    Raises:
        InputError: unknown kind, a configuration of another one, or as `fit_mf`.
    """
    if kind not in CF_CONFIGS:
        raise InputError(
            f"CF model {kind!r} is unknown: choose {', '.join(CF_CONFIGS)}, or import its vectors"
        )
    config = config or CF_CONFIGS[kind]()
    if not isinstance(config, CF_CONFIGS[kind]):
        raise InputError(
            f"{type(config).__name__} does not configure {kind}: give {CF_CONFIGS[kind].__name__}"
        )
    with lock_output(out):
        if isinstance(config, MFConfig):
            vectors = fit_mf(data_dir, config)
            vectors.save(out)
        elif isinstance(config, LightGCNConfig):
            vectors = fit_lightgcn(data_dir, config)
            vectors.save(out)
        else:
            fit = fit_sasrec(data_dir, config)
            fit.save(out)
            vectors = fit.vectors
    facts = {key: value for key, value in vectors.metadata.items() if key != "user_precision"}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    return vectors


def score_cf(folder: str | Path, data_dir: str | Path, split: str = "test") -> pd.DataFrame:
    """Scores of a split by a CF model alone, as a comparison shows them.

    Args:
        folder: of `CFVectors`. Its last snapshot scores; SASRec reads each row's own history.
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id, label, score (logit) and prob (sigmoid), float64, in the split's
        order.

    Raises:
        InputError: either folder is not what it should be, or damaged.
    """
    vectors = CFVectors.load(folder)
    if vectors.model_name == "sasrec":
        return score_sasrec(folder, data_dir, split)
    return vectors.score(read_rows(data_dir, split))

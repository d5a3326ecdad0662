"""Fit one of the CF models by name, write it and say what was chosen."""

from pathlib import Path

from ccf_llm_hf.cf.lightgcn import fit_lightgcn
from ccf_llm_hf.cf.mf import fit_mf
from ccf_llm_hf.cf.sasrec import fit_sasrec
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.configs import CF_CONFIGS, CFConfig, LightGCNConfig, MFConfig
from ccf_llm_hf.errors import InputError


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
    if isinstance(config, MFConfig):
        embeddings = fit_mf(data_dir, config)
        embeddings.save(out)
    elif isinstance(config, LightGCNConfig):
        embeddings = fit_lightgcn(data_dir, config)
        embeddings.save(out)
    else:
        fit = fit_sasrec(data_dir, config)
        fit.save(out)
        embeddings = fit.embeddings
    facts = {key: value for key, value in embeddings.metadata.items() if key != "user_precision"}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    return embeddings

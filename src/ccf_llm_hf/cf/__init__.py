"""Collaborative-filtering models: their vectors, our own fits, imports."""

from ccf_llm_hf.cf.config import LightGCNConfig, MFConfig, SASRecConfig
from ccf_llm_hf.cf.fit import fit_cf, score_cf
from ccf_llm_hf.cf.lightgcn import fit_lightgcn
from ccf_llm_hf.cf.mf import fit_mf
from ccf_llm_hf.cf.sasrec import SASRecFit, fit_sasrec, score_sasrec
from ccf_llm_hf.cf.tables import read_vector_table
from ccf_llm_hf.cf.vectors import CFVectors

__all__ = [
    "CFVectors",
    "LightGCNConfig",
    "MFConfig",
    "SASRecConfig",
    "SASRecFit",
    "fit_cf",
    "fit_lightgcn",
    "fit_mf",
    "fit_sasrec",
    "read_vector_table",
    "score_cf",
    "score_sasrec",
]

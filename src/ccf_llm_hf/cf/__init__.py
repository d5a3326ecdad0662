"""Collaborative-filtering models: their vectors, our own fits, imports."""

from ccf_llm_hf.cf.embeddings import CFEmbeddings
from ccf_llm_hf.cf.mf import MFConfig, fit_cf, fit_mf
from ccf_llm_hf.cf.scoring import load_scores
from ccf_llm_hf.cf.tables import read_vector_table

__all__ = ["CFEmbeddings", "MFConfig", "fit_cf", "fit_mf", "load_scores", "read_vector_table"]

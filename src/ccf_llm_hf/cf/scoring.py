"""Scores to compare with: from a CF folder or from a file of scores."""

import hashlib
from pathlib import Path

import pandas as pd
import torch

from ccf_llm_hf.cf.histories import read_histories
from ccf_llm_hf.cf.sasrec_encoder import ENCODER_FILE, SASRecEncoder
from ccf_llm_hf.cf.snapshots import at
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.rows import read_rows
from ccf_llm_hf.evaluation.scores import read_scores


def load_scores(path: str | Path, data_dir: str | Path, split: str = "test") -> pd.DataFrame:
    """What a comparison is given as, turned into scores of a split's rows.

    Args:
        path: a folder of `CFVectors`, scored with its last snapshot, of SASRec with each row's
            own history; or a parquet file of scores.
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id, label, score and, if known, prob.

    Raises:
        InputError: `path` is neither, or damaged.
    """
    if not Path(path).is_dir():
        return read_scores(path)
    embeddings = CFVectors.load(path)
    if embeddings.model_name == "sasrec":
        return score_sasrec(path, data_dir, split)
    return embeddings.score(read_rows(data_dir, split))


def score_sasrec(folder: str | Path, data_dir: str | Path, split: str = "test") -> pd.DataFrame:
    """SASRec's own scores: each row by the state after the likes that precede it.

    The table in `folder` holds one state per user, which stands still after its last snapshot; this
    is the model itself, and what a comparison with SASRec should show.

    Args:
        folder: written by `ccf-llm fit-cf sasrec`.
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id, label, score (logit) and prob (sigmoid), float64, in the split's
        order.

    Raises:
        InputError: the folder lacks the encoder or holds another fit's, or is damaged.
    """
    table, rows = CFVectors.load(folder).last(), read_rows(data_dir, split)
    encoder = _encoder_of(table, Path(folder) / ENCODER_FILE)
    histories = read_histories(data_dir, split, table.item_ids, encoder.max_history)
    states = encoder.as_users(histories.states(encoder))
    places = torch.from_numpy(pd.Index(table.item_ids).get_indexer(pd.Index(rows["item_id"])))
    items = at(table.item_vectors[0], places, table.default_item[0])
    logits = ((states * items).sum(-1) + table.offset).double()
    return rows[["user_id", "item_id", "label"]].assign(
        score=logits.numpy(), prob=logits.sigmoid().numpy()
    )


def _encoder_of(table: CFVectors, path: Path) -> SASRecEncoder:
    encoder = SASRecEncoder.load(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != table.metadata.get("encoder_sha256"):
        raise InputError(
            f"{path} is not the encoder that the table beside it was made with; restore the files "
            "of one fit"
        )
    return encoder

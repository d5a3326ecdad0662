"""SASRec: a user's state from their earlier likes, tuned on validation, in snapshots in time."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ccf_llm_hf.cf.config import SASRecConfig
from ccf_llm_hf.cf.early_stopping import EarlyStopping
from ccf_llm_hf.cf.histories import Histories, read_histories
from ccf_llm_hf.cf.sasrec_encoder import ENCODER_FILE, SASRecEncoder
from ccf_llm_hf.cf.snapshots import (
    Snapshot,
    describe_fit,
    look_up,
    mean_of,
    score_cross_fit,
    stack_snapshots,
)
from ccf_llm_hf.cf.solver import Rows, limit_threads
from ccf_llm_hf.cf.training_data import (
    Plan,
    TrainingData,
    load_training_data,
    mark_seen,
    plan_snapshots,
)
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import auc
from ccf_llm_hf.io import sha256_of, write_file

L2_GRID = (1e-4, 1e-3, 3e-3)  # our choice
DROPOUT_GRID = (0.2, 0.5)  # the paper's: of ML-1M, and of its sparser data sets
SEQUENCES_PER_STEP = 64  # our choice
PATIENCE = 4  # epochs; our choice


@dataclass(frozen=True)
class _Chosen:
    l2: float
    dropout: float
    item_bias: bool


@dataclass
class _Fit:
    """The fits of a grid point: validation AUC of the last one, its encoder, all tables."""

    chosen: _Chosen
    encoder: SASRecEncoder
    snapshots: list[Snapshot]
    auc: float
    epochs: int


@dataclass
class SASRecFit:
    """What a fit leaves: the table of states and items, and the encoder that makes states."""

    vectors: CFVectors
    encoder: SASRecEncoder

    def save(self, folder: str | Path) -> None:
        """Write both; the table records the encoder's sha256, which tells a mixture of two fits."""
        path, content = Path(folder) / ENCODER_FILE, self.encoder.to_bytes()
        write_file(path, lambda partial: partial.write_bytes(content))
        self.vectors.metadata["encoder_sha256"] = sha256_of([path])
        self.vectors.save(folder)


def fit_sasrec(data_dir: str | Path, config: SASRecConfig | None = None) -> SASRecFit:
    """Fit SASRec (Kang & McAuley 2018) on the training rows of a prepared folder.

    The logit of a row is the state after the likes before it, times the item's embedding. As with
    the CTR peers of CoLLM, the loss is the log loss of the labelled training rows, not the paper's
    sampled next items. A snapshot goes on from the one before it with one epoch of all rows before
    its time: with more of them the oldest rows, which all snapshots see, would be overfitted. The
    last goes on until it no longer gets better on the whole validation split, each row of which is
    read with its own history. L2, dropout and whether items have biases are chosen by AUC there.

    The table holds, for every snapshot, each user's state after the training likes before its time;
    an unknown user stands at the state of the empty history, an unknown item at the mean of the
    known ones (our choice). Within a snapshot these states stand still: the scores of rows by their
    own histories are `score_sasrec`'s.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        config: default `SASRecConfig()`.

    Returns:
        Table and encoder; the table's `metadata` records what was chosen. `validation_auc` is by
        each row's own history, the training AUCs are by the table; `epochs` is of the last
        snapshot.

    Raises:
        InputError: the folder is no prepared one, train is empty, or a split has one class only.
    """
    config = config or SASRecConfig()
    data = load_training_data(Path(data_dir))
    histories = read_histories(data_dir, "validation", data.items["item_id"], config.max_history)
    plan = plan_snapshots(data, config.snapshots, config.dim + 1)
    grid = _grid(config)
    total = (len(grid) + (config.item_bias is None)) * (len(plan.rows) - 1)
    # Dropout draws from torch's own generator, which is the caller's.
    with torch.random.fork_rng(devices=[]), limit_threads(len(data.train)):
        with tqdm(total=total, desc="fit sasrec", unit=" fits") as bar:
            fit = _best_fit(data, histories, config, plan, bar)
        encoder, snapshots, chosen = fit.encoder, fit.snapshots, fit.chosen
        vectors = stack_snapshots(snapshots, plan, data, "sasrec")
        vectors.metadata |= describe_fit(
            data,
            _held_out(encoder, data.validation, histories),
            score_cross_fit(data.train, plan, snapshots),
            snapshots[-1].logits(data.train),
            plan.cross_fit,
        )
    vectors.metadata |= {
        "l2": f"{chosen.l2:g}",
        "dropout": f"{chosen.dropout:g}",
        "item_bias": str(chosen.item_bias).lower(),
        "epochs": str(fit.epochs),
        "seed": str(config.seed),
    }
    return SASRecFit(vectors, encoder)


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
    items = look_up(table.item_vectors[0], places, table.default_item[0])
    logits = ((states * items).sum(-1) + table.offset).double()
    return rows[["user_id", "item_id", "label"]].assign(
        score=logits.numpy(), prob=logits.sigmoid().numpy()
    )


def _encoder_of(table: CFVectors, path: Path) -> SASRecEncoder:
    encoder = SASRecEncoder.load(path)
    if sha256_of([path]) != table.metadata.get("encoder_sha256"):
        raise InputError(
            f"{path} is not the encoder that the table beside it was made with; restore the files "
            "of one fit"
        )
    return encoder


def _grid(config: SASRecConfig) -> list[_Chosen]:
    l2 = L2_GRID if config.l2 is None else (config.l2,)
    dropout = DROPOUT_GRID if config.dropout is None else (config.dropout,)
    bias = True if config.item_bias is None else config.item_bias
    return [_Chosen(*values, bias) for values in itertools.product(l2, dropout)]


def _best_fit(
    data: TrainingData, histories: Histories, config: SASRecConfig, plan: Plan, bar: tqdm
) -> _Fit:
    """That of the best validation AUC over the grid; that point is also tried without biases."""
    best: _Fit | None = None
    for point in _grid(config):
        best = _better(best, _fit(data, histories, config, point, plan, bar))
    assert best is not None
    if config.item_bias is None:
        without = replace(best.chosen, item_bias=False)
        best = _better(best, _fit(data, histories, config, without, plan, bar))
    return best


def _better(best: _Fit | None, fit: _Fit) -> _Fit:
    return fit if best is None or fit.auc > best.auc else best


def _new_encoder(data: TrainingData, config: SASRecConfig, chosen: _Chosen) -> SASRecEncoder:
    torch.manual_seed(config.seed)
    return SASRecEncoder(
        len(data.items),
        config.dim,
        config.blocks,
        config.heads,
        config.max_history,
        chosen.dropout,
        chosen.item_bias,
    )


def _fit(
    data: TrainingData,
    histories: Histories,
    config: SASRecConfig,
    chosen: _Chosen,
    plan: Plan,
    bar: tqdm,
) -> _Fit:
    encoder = _new_encoder(data, config, chosen)
    width = config.dim + chosen.item_bias
    nobody, nothing = torch.zeros(len(data.users), width), torch.zeros(len(data.items), width)
    snapshots = [Snapshot.of_rows(data.train[:0], nobody, nothing)]
    stopping = EarlyStopping(PATIENCE)
    for part in plan.rows[1:]:
        rows = data.train[part]
        train = _Training(encoder, rows, config.learning_rate, chosen.l2)
        if len(rows) < len(data.train):
            train.epoch()
        else:
            train.to_the_best(config.max_epochs, stopping, data.validation, histories)
        snapshots.append(_snapshot(encoder, rows, len(data.users)))
        bar.update()
    return _Fit(chosen, encoder, snapshots, stopping.best, stopping.step)


def _snapshot(encoder: SASRecEncoder, rows: Rows, num_users: int) -> Snapshot:
    """Every user's state after the likes among `rows`."""
    nothing_liked = np.empty(0, dtype=np.int64)
    likes = [nothing_liked] * (num_users + 1)
    for user, of_user in _by_user(rows):
        likes[user] = rows.items[of_user[rows.labels[of_user] > 0]].numpy()
    users = encoder.as_users(encoder.states(likes))
    items = encoder.item_vectors().detach().clone()
    offset = encoder.offset.detach().clone()
    return Snapshot.of_rows(rows, users[:-1], items, users[-1], offset)


def _held_out(encoder: SASRecEncoder, rows: Rows, histories: Histories) -> Tensor:
    """`(n,)` logits of rows by their own histories."""
    vectors = encoder.item_vectors().detach()
    default = mean_of(vectors, encoder.known)
    items = look_up(torch.where(encoder.known[:, None], vectors, default), rows.items, default)
    states = encoder.as_users(histories.states(encoder))
    return (states * items).sum(-1) + encoder.offset.detach()


def _by_user(rows: Rows) -> list[tuple[int, Tensor]]:
    """Each user with the places of their rows, in order of time."""
    order = rows.users.argsort(stable=True)
    users, counts = rows.users[order].unique_consecutive(return_counts=True)
    return list(zip(users.tolist(), order.split(counts.tolist()), strict=True))


@dataclass
class _Sequences:
    """Likes that one pass reads, and where each row's state stands among them.

    Attributes:
        tokens: `(sequences, length)` int64.
        lengths: `(sequences,)` likes in each.
        sequence: `(n,)` sequence of each row.
        position: `(n,)` how many of its likes precede the row.
    """

    tokens: Tensor
    lengths: Tensor
    sequence: Tensor
    position: Tensor

    @classmethod
    def of_rows(cls, rows: Rows, encoder: SASRecEncoder) -> "_Sequences":
        """Rows of a user share a pass as long as the likes fit; then a sequence starts anew half a
        window later. So a row is trained with the last half to whole window of likes, at a small
        part of what a pass of its own would cost (our choice); scoring takes the whole."""
        window = encoder.max_history
        stride = max(1, window // 2)
        liked = rows.labels > 0
        parts: list[np.ndarray] = []
        sequence, position = torch.empty_like(rows.users), torch.empty_like(rows.users)
        for _, of_user in _by_user(rows):
            likes = rows.items[of_user[liked[of_user]]].numpy()
            earlier = liked[of_user].cumsum(0) - liked[of_user].long()
            starts = -(-(earlier - window).clamp(min=0) // stride) * stride
            for start in starts.unique().tolist():
                here = starts == start
                sequence[of_user[here]] = len(parts)
                position[of_user[here]] = earlier[here] - start
                parts.append(likes[start : int(earlier[here].max())])
        return cls(*encoder.tokens(parts), sequence, position)


class _Training:
    """An encoder, to go on training on some rows."""

    def __init__(self, encoder: SASRecEncoder, rows: Rows, learning_rate: float, l2: float) -> None:
        self.encoder, self.rows = encoder, rows
        encoder.known.copy_(mark_seen(rows.items, len(encoder.known)))
        self.sequences = _Sequences.of_rows(rows, encoder)
        self.weights = [weight for weight in encoder.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, learning_rate, weight_decay=l2)

    def to_the_best(
        self, max_epochs: int, stopping: EarlyStopping, held_out: Rows, histories: Histories
    ) -> None:
        """Epochs until the AUC of held-out rows no longer rises; ends with the best weights."""
        labels = held_out.labels.numpy()
        for epoch in range(1, max_epochs + 1):
            self.epoch()
            scores = _held_out(self.encoder, held_out, histories)
            if stopping.update(auc(labels, scores.numpy()), epoch, self.weights):
                break
        with torch.no_grad():
            for weight, best in zip(self.weights, stopping.weights, strict=True):
                weight.copy_(best)

    def epoch(self) -> None:
        """Every row once, the sequences in random order."""
        encoder, sequences = self.encoder, self.sequences
        encoder.train()
        order = torch.randperm(len(sequences.tokens))
        place = order.argsort()[sequences.sequence]
        by_place = place.argsort(stable=True)
        steps = range(0, len(order), SEQUENCES_PER_STEP)
        bounds = torch.searchsorted(place[by_place], torch.tensor([*steps, len(order)]))
        for step, first, last in zip(steps, bounds[:-1], bounds[1:], strict=True):
            read, of_step = order[step : step + SEQUENCES_PER_STEP], by_place[first:last]
            states = encoder(sequences.tokens[read, : int(sequences.lengths[read].max()) + 1])
            users = encoder.as_users(states[place[of_step] - step, sequences.position[of_step]])
            batch = self.rows[of_step]
            items = encoder.items(batch.items)
            if encoder.item_bias:
                items = torch.cat([items, encoder.biases[batch.items, None]], 1)
            logits = (users * items).sum(-1) + encoder.offset
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

"""LightGCN: vectors spread over the graph of liked items, tuned on validation, cross-fit."""

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ccf_llm_hf.cf.config import LightGCNConfig
from ccf_llm_hf.cf.early_stopping import EarlyStopping
from ccf_llm_hf.cf.snapshots import Snapshot, describe_fit, score_cross_fit, stack_snapshots
from ccf_llm_hf.cf.solver import Rows, limit_threads
from ccf_llm_hf.cf.training_data import (
    Plan,
    TrainingData,
    load_training_data,
    mark_seen,
    plan_folds,
    plan_snapshots,
)
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.evaluation.metrics import auc

LAYER_GRID = (1, 2, 3)  # the paper tries 1 to 4
# Our choice, for the sum of the log loss: not comparable with the L2 of a BPR loss.
L2_GRID = (0.5, 1.0, 2.0, 3.0, 4.0)
LEARNING_RATE_GRID = (0.01, 0.03)  # our choice
INITIAL_SCALE = 0.1  # as in the authors' PyTorch code
EVALUATE_EVERY = 5  # steps; our choice
PATIENCE = 40  # steps; our choice


@dataclass(frozen=True)
class _Chosen:
    layers: int
    l2: float
    learning_rate: float
    steps: int = 0


def fit_lightgcn(data_dir: str | Path, config: LightGCNConfig | None = None) -> CFVectors:
    """Fit LightGCN (He et al. 2020) on the training rows of a prepared folder.

    A vector is the mean of what 0 to `layers` steps of symmetrically normalized propagation over
    the graph of the positive training rows make of it. As with the CTR peers of CoLLM, the loss is
    the log loss of all labelled training rows, not the paper's BPR; there are no biases of users,
    items or at large. Full-batch Adam; layers, L2, learning rate and the number of steps are chosen
    on the whole validation split. With `cross_fit="folds"` each snapshot is fitted afresh on
    the rows, and the graph, of all folds but one, and rotated onto the fit on all rows, which is
    the last. With `"snapshots"` each is fitted on the rows before its time, from where the one
    before it ended, for as many steps; the last is stopped early on validation again. An unknown
    user or item stands at the mean of the known ones (our choice).

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        config: default `LightGCNConfig()`.

    Returns:
        The vectors after propagation; `metadata` records what was chosen and how it scores.

    Raises:
        InputError: the folder is no prepared one, train is empty, or a split has one class only.
    """
    config = config or LightGCNConfig()
    data = load_training_data(Path(data_dir))
    if config.cross_fit == "folds":
        plan = plan_folds(data, config.folds, config.dim)
    else:
        plan = plan_snapshots(data, config.snapshots, config.dim)
    grid = _grid(config)
    total = len(grid) + len(plan.rows) - (plan.cross_fit == "snapshots")
    with (
        limit_threads(len(data.train)),
        tqdm(total=total, desc="fit lightgcn", unit=" fits") as bar,
    ):
        chosen = _choose(data, config, grid, bar)
        snapshots = _fit_tables(data, config, chosen, plan, bar)
    vectors = stack_snapshots(snapshots, plan, data, "lightgcn")
    vectors.metadata |= describe_fit(
        data,
        snapshots[-1].logits(data.validation),
        score_cross_fit(data.train, plan, snapshots),
        snapshots[-1].logits(data.train),
        plan.cross_fit,
    )
    vectors.metadata |= {
        "layers": str(chosen.layers),
        "l2": f"{chosen.l2:g}",
        "learning_rate": f"{chosen.learning_rate:g}",
        "steps": str(chosen.steps),
        "seed": str(config.seed),
    }
    return vectors


def _grid(config: LightGCNConfig) -> list[_Chosen]:
    layers = LAYER_GRID if config.layers is None else (config.layers,)
    l2 = L2_GRID if config.l2 is None else (config.l2,)
    rates = LEARNING_RATE_GRID if config.learning_rate is None else (config.learning_rate,)
    return [_Chosen(*values) for values in itertools.product(layers, l2, rates)]


def _choose(data: TrainingData, config: LightGCNConfig, grid: list[_Chosen], bar: tqdm) -> _Chosen:
    """The grid point, and its number of steps, of the best validation AUC."""
    start, found = _initial_vectors(data, config), []
    for point in grid:
        fit = _Fit(data, data.train, point)
        stopping = EarlyStopping(PATIENCE)
        fit.run(start, config.max_steps, stopping)
        found.append((stopping.best, stopping.step, point))
        bar.update()
    _, steps, best = max(found, key=lambda entry: entry[0])
    return _Chosen(best.layers, best.l2, best.learning_rate, steps)


def _initial_vectors(data: TrainingData, config: LightGCNConfig) -> Tensor:
    """`(users + items, dim)`."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (len(data.users) + len(data.items), config.dim)
    return INITIAL_SCALE * torch.randn(shape, generator=generator)


def _fit_tables(
    data: TrainingData, config: LightGCNConfig, chosen: _Chosen, plan: Plan, bar: tqdm
) -> list[Snapshot]:
    start = _initial_vectors(data, config)
    if plan.cross_fit == "folds":
        return _fit_folds(data, chosen, plan, start, bar)
    nothing = data.train[:0]
    snapshots = [_Fit(data, nothing, chosen).snapshot(torch.zeros_like(start))]
    vectors, fitted = start, nothing
    for part in plan.rows[1:]:
        rows = data.train[part]
        # Who is new starts from noise: L2 has drawn the unseen to zero, where they would stay.
        warm = torch.where(_mark_seen_nodes(data, fitted)[:, None], vectors, start)
        fit = _Fit(data, rows, chosen)
        if len(rows) < len(data.train):
            vectors = fit.run(warm, chosen.steps)
        else:
            vectors = fit.run(warm, config.max_steps, EarlyStopping(PATIENCE))
        snapshots.append(fit.snapshot(vectors))
        fitted = rows
        bar.update()
    return snapshots


def _fit_folds(
    data: TrainingData, chosen: _Chosen, plan: Plan, start: Tensor, bar: tqdm
) -> list[Snapshot]:
    """The fit on all rows comes last; the others start where it started, for it knows their labels,
    and are rotated onto it."""
    snapshots = []
    for part in plan.rows:
        fit = _Fit(data, data.train[part], chosen)
        snapshots.append(fit.snapshot(fit.run(start, chosen.steps)))
        bar.update()
    whole = snapshots[-1]
    return [*(snapshot.rotate_onto(whole) for snapshot in snapshots[:-1]), whole]


def _mark_seen_nodes(data: TrainingData, rows: Rows) -> Tensor:
    return torch.cat(
        [mark_seen(rows.users, len(data.users)), mark_seen(rows.items, len(data.items))]
    )


class _Fit:
    """A fit on some of the training rows and their graph."""

    def __init__(self, data: TrainingData, rows: Rows, chosen: _Chosen) -> None:
        self.data, self.rows, self.chosen = data, rows, chosen
        self.adjacency = build_adjacency(self.rows, len(data.users), len(data.items))

    def run(self, start: Tensor, steps: int, stopping: EarlyStopping | None = None) -> Tensor:
        """Vectors before propagation, after `steps` or, with `stopping`, where they were best."""
        vectors = start.clone()
        optimizer = torch.optim.Adam([vectors], self.chosen.learning_rate)
        for step in range(1, steps + 1):
            vectors.grad = self._gradient(vectors)
            optimizer.step()
            if stopping is None or (step % EVALUATE_EVERY and step < steps):
                continue
            scores = self.snapshot(vectors).logits(self.data.validation)
            value = auc(self.data.validation.labels.numpy(), scores.numpy())
            if stopping.update(value, step, [vectors]):
                break
        return stopping.weights[0] if stopping else vectors

    def _gradient(self, vectors: Tensor) -> Tensor:
        """Of the rows' mean log loss with the L2 penalty."""
        spread = self._propagate(vectors).requires_grad_()
        users, items = spread.split([len(self.data.users), len(self.data.items)])
        for piece in self.rows.pieces():
            # Not indexing: this gradient sums rows without sorting them first.
            logits = (F.embedding(piece.users, users) * F.embedding(piece.items, items)).sum(-1)
            loss = F.binary_cross_entropy_with_logits(logits, piece.labels, reduction="sum")
            loss.backward(retain_graph=True)
        # Propagation is symmetric, so its gradient is propagation.
        back = self._propagate(spread.grad)
        return (back + self.chosen.l2 * vectors) / len(self.rows)

    def _propagate(self, vectors: Tensor | None) -> Tensor:
        assert vectors is not None
        return propagate(vectors, self.adjacency, self.chosen.layers)

    def snapshot(self, vectors: Tensor) -> Snapshot:
        """What the vectors are after propagation."""
        spread = self._propagate(vectors)
        users, items = spread.split([len(self.data.users), len(self.data.items)])
        return Snapshot.of_rows(self.rows, users, items)


def build_adjacency(rows: Rows, num_users: int, num_items: int) -> Tensor:
    """`(users + items, users + items)` sparse, `1 / sqrt(degree * degree)` at the liked pairs."""
    nodes = num_users + num_items
    liked = rows[rows.labels > 0]
    pairs = torch.unique(liked.users * nodes + liked.items + num_users)
    users, items = pairs // nodes, pairs % nodes
    heads, tails = torch.cat([users, items]), torch.cat([items, users])
    degrees = torch.bincount(heads, minlength=nodes).float()
    weights = (degrees[heads] * degrees[tails]).rsqrt()
    order = heads.argsort(stable=True)
    offsets = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)]).long()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        return torch.sparse_csr_tensor(
            offsets, tails[order], weights[order], size=(nodes, nodes), check_invariants=False
        )


def propagate(vectors: Tensor, adjacency: Tensor, layers: int) -> Tensor:
    """Mean of the vectors after 0 to `layers` steps over the graph, `(nodes, dim)`."""
    total, spread = vectors.clone(), vectors
    for _ in range(layers):
        spread = adjacency @ spread
        total += spread
    return total / (layers + 1)

"""Fit matrix factorization with logistic loss: the optimum of a regularized objective.

With logit z = p_u . q_i + b_u + b_i + b the objective is (our choice; Gaussian priors on all but b)

    sum over rows of log loss(z) + sum over d of factors * w_d / 2 (|P_d|^2 + |Q_d|^2)
                                 + user_bias / 2 |b_u|^2 + item_bias / 2 |b_i|^2

w_d grows from 1 to 2 over the dimensions. Equal weights would leave the factors free to rotate;
these gather them in the first dimensions and put those without support at zero, so that
a dimension keeps its meaning from one snapshot in time to the next.

It is solved to convergence rather than for some epochs, so that a fit depends on its rows alone and
snapshots differ by their data, not by how long they were trained.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FULL_BATCH_ROWS = 300_000
LIVE_LOGIT = 0.05
BATCH_ROWS = 1 << 15
PIECE_ROWS = 1 << 18


@dataclass
class Rows:
    """Interactions as table rows: `users`, `items` `(n,)` int64 and `labels` `(n,)` float32."""

    users: Tensor
    items: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Rows":
        return Rows(self.users[index], self.items[index], self.labels[index])


@dataclass
class Parameters:
    """The model: factors `(users, dim)`, `(items, dim)`, biases `(users,)`, `(items,)`, `(1,)`."""

    user_factors: Tensor
    item_factors: Tensor
    user_bias: Tensor
    item_bias: Tensor
    offset: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return list(vars(self).values())

    def logits(self, rows: Rows) -> Tensor:
        """`(n,)` logits of rows whose users and items are in the tables."""
        # index_select, because the gradient of F.embedding is twenty times slower for biases.
        logits = self.user_bias.index_select(0, rows.users) + self.offset
        logits = logits + self.item_bias.index_select(0, rows.items)
        if not self.user_factors.shape[1]:
            return logits
        user = self.user_factors.index_select(0, rows.users)
        return logits + (user * self.item_factors.index_select(0, rows.items)).sum(-1)


@dataclass(frozen=True)
class Penalties:
    """Strengths of the L2 penalties, and whether there are biases at all."""

    factors: float
    user_bias: float
    item_bias: float
    use_biases: bool = True


def initial_parameters(num_users: int, num_items: int, dim: int, seed: int) -> Parameters:
    """Biases at zero, factors at N(0, 0.1^2): at zero they would sit on a saddle point."""
    generator = torch.Generator().manual_seed(seed)
    return Parameters(
        0.1 * torch.randn(num_users, dim, generator=generator),
        0.1 * torch.randn(num_items, dim, generator=generator),
        torch.zeros(num_users),
        torch.zeros(num_items),
        torch.zeros(1),
    )


def solve(
    rows: Rows, penalties: Penalties, start: Parameters, *, iterations: int, epochs: int, seed: int
) -> Parameters:
    """Minimize the objective from `start`, which stays as it is.

    Up to `FULL_BATCH_ROWS` rows by L-BFGS on all rows (at most `iterations` iterations); beyond, by
    `epochs` epochs of Adam on mini-batches, whose penalties are shared out over a user's or item's
    rows. Time is linear in rows; memory beyond the tables does not depend on them.

    Args:
        rows: interactions to fit.
        penalties: of the objective.
        start: warm start.
        iterations: of L-BFGS.
        epochs: of Adam.
        seed: of Adam's row order.

    Returns:
        New parameters; users and items without rows end at the prior's mode, zero, and so do factor
        dimensions that move no logit by `LIVE_LOGIT`.
    """
    found = Parameters(*(tensor.clone() for tensor in start.tensors()))
    trained = found.tensors() if penalties.use_biases else found.tensors()[:2]
    if not start.user_factors.shape[1]:
        trained = trained[2:]
    for tensor in trained:
        tensor.requires_grad_()
    if len(rows) <= FULL_BATCH_ROWS:
        _full_batch(rows, penalties, found, trained, iterations)
    else:
        _mini_batches(rows, penalties, found, trained, epochs, seed)
    for tensor in trained:
        tensor.requires_grad_(False)
    for tensor, ids in zip(found.tensors(), (rows.users, rows.items) * 2, strict=False):
        tensor[torch.bincount(ids, minlength=len(tensor)) == 0] = 0
    # What is left of a dimension on its way to zero is noise, and would look like signal rescaled.
    dead = _largest(found.user_factors) * _largest(found.item_factors) < LIVE_LOGIT
    found.user_factors[:, dead] = 0
    found.item_factors[:, dead] = 0
    return found


def _largest(factors: Tensor) -> Tensor:
    return factors.abs().amax(0) if len(factors) else factors.new_zeros(factors.shape[1])


def _weights(found: Parameters) -> Tensor:
    return torch.linspace(1, 2, found.user_factors.shape[1])


def _full_batch(
    rows: Rows, penalties: Penalties, found: Parameters, trained: list[Tensor], iterations: int
) -> None:
    optimizer = torch.optim.LBFGS(
        trained,
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-2,
        tolerance_change=1e-4,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(rows), PIECE_ROWS):
            piece = rows[first : first + PIECE_ROWS]
            loss = F.binary_cross_entropy_with_logits(
                found.logits(piece), piece.labels, reduction="sum"
            )
            loss.backward()
            total += loss.item()
        penalty = _penalty(found, penalties)
        penalty.backward()
        return total + penalty.item()

    optimizer.step(closure)


def _penalty(found: Parameters, penalties: Penalties) -> Tensor:
    factors = found.user_factors.square().sum(0) + found.item_factors.square().sum(0)
    biases = penalties.user_bias * found.user_bias.square().sum()
    biases = biases + penalties.item_bias * found.item_bias.square().sum()
    return (penalties.factors * factors @ _weights(found) + biases) / 2


def _mini_batches(
    rows: Rows,
    penalties: Penalties,
    found: Parameters,
    trained: list[Tensor],
    epochs: int,
    seed: int,
) -> None:
    users = torch.bincount(rows.users, minlength=len(found.user_bias)).clamp(min=1)
    items = torch.bincount(rows.items, minlength=len(found.item_bias)).clamp(min=1)
    optimizer = torch.optim.Adam(trained, lr=0.03)
    steps = epochs * -(-len(rows) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(rows), generator=generator).split(BATCH_ROWS):
            batch = rows[index]
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(found.logits(batch), batch.labels)
            share = _shared_penalty(batch, penalties, found, users, items)
            (loss + share / len(batch)).backward()
            optimizer.step()
            schedule.step()


def _shared_penalty(
    batch: Rows, penalties: Penalties, found: Parameters, users: Tensor, items: Tensor
) -> Tensor:
    """The penalty of the batch's rows; over an epoch it adds up to the whole one."""
    user, item = 1 / users[batch.users], 1 / items[batch.items]
    total = penalties.user_bias * found.user_bias.index_select(0, batch.users).square() @ user
    total = (
        total + penalties.item_bias * found.item_bias.index_select(0, batch.items).square() @ item
    )
    if found.user_factors.shape[1]:
        weights = penalties.factors * _weights(found)
        squares = found.user_factors.index_select(0, batch.users).square() @ weights
        total = total + squares @ user
        squares = found.item_factors.index_select(0, batch.items).square() @ weights
        total = total + squares @ item
    return total / 2


def refreshed(previous: Parameters, start: Parameters) -> Parameters:
    """A warm start: the previous optimum plus the first start's factors.

    Without them, rows new since then, and factors that were regularized away, would sit on the
    saddle point at zero.
    """
    return replace(
        previous,
        user_factors=previous.user_factors + start.user_factors,
        item_factors=previous.item_factors + start.item_factors,
    )

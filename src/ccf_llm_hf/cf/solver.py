"""Fit matrix factorization with logistic loss: the optimum of a regularized objective.

With logit z = p_u . q_i + b_u + b_i + b the objective is (our choice; Gaussian priors on all but b)

    sum over rows of log loss(z) + sum over d of factors * w_d / 2 (|P_d|^2 + |Q_d|^2)
                                 + user_bias / 2 |b_u|^2 + item_bias / 2 |b_i|^2

With fields (LightFM's form, Kula 2015, arXiv 1507.08439) q_i is the item's own vector plus, for
each field, the mean of its values' vectors, b_i likewise. Penalties are on these parts, and those
on values have strengths of their own. (The mean is ours: by a sum, an item of many values would
have a wider prior than one of a single value.)

w_d grows from 1 to 2 over the dimensions. Equal weights would leave the factors free to rotate;
these gather them in the first dimensions and put those without support at zero, so that
a dimension keeps its meaning from one snapshot in time to the next.

It is solved to convergence rather than for some epochs, so that a fit depends on its rows alone and
snapshots differ by their data, not by how long they were trained.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INITIAL_SCALE = 0.1  # standard deviation of the first factors; our choice
LIVE_LOGIT = 0.05  # moves a probability by at most .0125
# What the rescaling assumes: the log loss's curvature p (1 - p) and a factor's mean square.
CURVATURE = 0.2
FACTOR_SQUARE = 0.05
# L-BFGS runs this many iterations at a time, until they gain less than TOLERANCE per row.
ITERATIONS_AT_ONCE = 10
TOLERANCE = 1e-5
LBFGS_HISTORY = 3  # each step kept costs twice the tables' memory
PIECE_ROWS = 1 << 18  # keeps the gathered vectors below 100 MB
ONE_THREAD_ROWS = 200_000


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

    def pieces(self) -> list["Rows"]:
        """The rows in pieces, at least one, so that what is gathered for them stays small."""
        starts = range(0, max(1, len(self)), PIECE_ROWS)
        return [self[start : start + PIECE_ROWS] for start in starts]


@dataclass
class ItemFields:
    """Which values items have in their fields: `items[k]` has `values[k]`, at `weights[k]`.

    Attributes:
        items: `(n,)` int64, table rows.
        values: `(n,)` int64, in [0, num_values).
        weights: `(n,)` float32: 1 over the number of values that the item has in that field.
        num_values: of all fields together.
        of_field: `(num_values,)` int64, the place of each value's field.
    """

    items: Tensor
    values: Tensor
    weights: Tensor
    num_values: int
    of_field: Tensor

    @classmethod
    def none(cls) -> "ItemFields":
        """No fields."""
        nobody = torch.zeros(0, dtype=torch.int64)
        return cls(nobody, nobody, torch.zeros(0), 0, nobody)

    def add_to(self, own: Tensor, of_values: Tensor) -> Tensor:
        """What items `(num_items, ...)` have of their own, plus that of their values."""
        if not self.num_values:
            return own
        weights = self.weights.view(-1, *[1] * (own.dim() - 1))
        return own.index_add(0, self.items, weights * of_values[self.values])

    def scale(self, scales: Sequence[float]) -> "ItemFields":
        """The same with each field's weights times a scale of its own; a field of scale 0 is out.

        At penalties of one strength a scale is what the field's values have for a standard
        deviation beside those of a field of scale 1.
        """
        of_entries = torch.tensor(scales, dtype=torch.float32)[self.of_field[self.values]]
        kept = of_entries > 0
        return replace(
            self,
            items=self.items[kept],
            values=self.values[kept],
            weights=self.weights[kept] * of_entries[kept],
        )

    def restrict(self, present: Tensor) -> "ItemFields":
        """The same of a smaller table, which has the items `(num_items,)` that are marked."""
        kept = present[self.items]
        place = present.cumsum(0) - 1
        return replace(
            self,
            items=place[self.items[kept]],
            values=self.values[kept],
            weights=self.weights[kept],
        )


@dataclass
class Parameters:
    """The model: factors `(users, dim)`, `(items, dim)`, biases `(users,)`, `(items,)`, `(1,)`,
    and those of the values of fields, `(values, dim)` and `(values,)`, with who has them.

    An item's are its own; `whole` adds its values'.
    """

    user_factors: Tensor
    item_factors: Tensor
    user_bias: Tensor
    item_bias: Tensor
    offset: Tensor
    value_factors: Tensor
    value_bias: Tensor
    fields: ItemFields

    def zeros(self) -> "Parameters":
        """A model that knows nothing, of the same sizes."""
        tensors: dict[str, Any] = {
            name: torch.zeros_like(value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def whole(self) -> "Parameters":
        """The same model without fields: each item has what its values give it."""
        if not self.fields.num_values:
            return self
        return replace(
            self,
            item_factors=self.fields.add_to(self.item_factors, self.value_factors),
            item_bias=self.fields.add_to(self.item_bias, self.value_bias),
            value_factors=self.value_factors[:0],
            value_bias=self.value_bias[:0],
            fields=ItemFields.none(),
        )

    def logits(self, rows: Rows) -> Tensor:
        """`(n,)` logits; an index below zero is an unknown user or item, at the prior's mode."""
        whole = self.whole()
        return torch.cat([whole._logits(piece) for piece in rows.pieces()])

    def _logits(self, rows: Rows) -> Tensor:
        known_user, known_item = rows.users >= 0, rows.items >= 0
        users, items = rows.users.clamp(min=0), rows.items.clamp(min=0)
        products = (self.user_factors[users] * self.item_factors[items]).sum(-1)
        logits = self.offset + products * (known_user & known_item)
        return logits + self.user_bias[users] * known_user + self.item_bias[items] * known_item


@dataclass(frozen=True)
class Penalties:
    """Strengths of the L2 penalties, whether there are biases at all, and the scale of each field,
    see `ItemFields.scale`."""

    factors: float
    user_bias: float
    item_bias: float
    use_biases: bool = True
    value_factors: float = 1.0
    value_bias: float = 1.0
    field_scales: tuple[float, ...] = ()


def draw_parameters(
    num_users: int, num_items: int, dim: int, seed: int, fields: ItemFields | None = None
) -> Parameters:
    """Biases at zero, factors at random: at zero they would sit on a saddle point."""
    fields = fields or ItemFields.none()
    generator = torch.Generator().manual_seed(seed)
    return Parameters(
        INITIAL_SCALE * torch.randn(num_users, dim, generator=generator),
        INITIAL_SCALE * torch.randn(num_items, dim, generator=generator),
        torch.zeros(num_users),
        torch.zeros(num_items),
        torch.zeros(1),
        INITIAL_SCALE * torch.randn(fields.num_values, dim, generator=generator),
        torch.zeros(fields.num_values),
        fields,
    )


def solve(rows: Rows, penalties: Penalties, start: Parameters, *, iterations: int) -> Parameters:
    """Minimize the objective from `start`, which stays as it is.

    L-BFGS over all rows. Every variable is rescaled by its curvature, without which the biases of
    frequent items alone take hundreds of iterations; gradients are two sparse products. Time is
    linear in rows and table entries, memory too.

    Args:
        rows: interactions to fit, at least one.
        penalties: of the objective.
        start: warm start.
        iterations: of L-BFGS, at most.

    Returns:
        New parameters; users, items and values without rows end at the prior's mode, zero, and so
        do factor dimensions that move no logit by `LIVE_LOGIT`.
    """
    dim = start.user_factors.shape[1]
    matrix = _Matrix(rows, len(start.user_bias), len(start.item_bias))
    users = _Side(
        start.user_factors[matrix.users],
        start.user_bias[matrix.users],
        matrix.user_counts,
        penalties.factors,
        penalties.user_bias,
        penalties.use_biases,
        bias_column=dim,
    )
    items = _Side(
        start.item_factors[matrix.items],
        start.item_bias[matrix.items],
        matrix.item_counts,
        penalties.factors,
        penalties.item_bias,
        penalties.use_biases,
        bias_column=dim + 1,
    )
    values = _Values(start, matrix, penalties) if start.fields.num_values else None
    with limit_threads(len(rows)):
        offset = _minimize(
            matrix, users, items, values, start.offset, iterations, penalties.use_biases
        )
    found = start.zeros()
    found.user_factors[matrix.users] = users.vectors()[:, :dim]
    found.item_factors[matrix.items] = items.vectors()[:, :dim]
    if penalties.use_biases:
        found.user_bias[matrix.users] = users.vectors()[:, dim]
        found.item_bias[matrix.items] = items.vectors()[:, dim + 1]
    if values is not None:
        found.value_factors[values.present] = values.side.vectors()[:, :dim]
        if penalties.use_biases:
            found.value_bias[values.present] = values.side.vectors()[:, dim + 1]
    found.offset = offset
    # What is left of a dimension on its way to zero is noise, and would look like signal rescaled.
    dead = _largest(found.user_factors) * _largest(found.whole().item_factors) < LIVE_LOGIT
    for factors in (found.user_factors, found.item_factors, found.value_factors):
        factors[:, dead] = 0
    return found


def _largest(factors: Tensor) -> Tensor:
    return factors.abs().amax(0)


class _Side:
    """The vectors of users, `[p, b_u, 1]`, or items, `[q, 1, b_i]`, as L-BFGS varies them.

    Those of values, `[q, 0, b]`, are parts of items'. A vector is `constant + variable * scale`;
    the constant column has scale zero. Without biases both last columns are left out.
    """

    def __init__(
        self,
        factors: Tensor,
        bias: Tensor,
        counts: Tensor,
        factor_penalty: float,
        bias_penalty: float,
        use_biases: bool,
        bias_column: int,
        constant: float = 1.0,
    ) -> None:
        dim = factors.shape[1]
        width = dim + 2 * use_biases
        evidence = CURVATURE * counts.float()
        self.constant, self.weights = torch.zeros(width), torch.zeros(width)
        start, self.scale = torch.zeros(len(bias), width), torch.zeros(len(bias), width)
        self.weights[:dim] = factor_penalty * factor_weights(dim)
        start[:, :dim] = factors
        self.scale[:, :dim] = (self.weights[:dim] + FACTOR_SQUARE * evidence[:, None]).rsqrt()
        if use_biases:
            self.constant[2 * dim + 1 - bias_column] = constant
            self.weights[bias_column] = bias_penalty
            start[:, bias_column] = bias
            self.scale[:, bias_column] = (bias_penalty + evidence).rsqrt()
        self.variable = start / self.scale.clamp(min=torch.finfo(torch.float32).tiny)

    def vectors(self) -> Tensor:
        """`(n, width)`."""
        return torch.addcmul(self.constant, self.variable, self.scale)

    def penalty(self, vectors: Tensor) -> float:
        """Of the objective, for these vectors."""
        return float(vectors.square().sum(0) @ self.weights) / 2

    def set_gradient(self, of_loss: Tensor, vectors: Tensor) -> None:
        """The objective's gradient with respect to the variable; `of_loss` is overwritten."""
        self.variable.grad = of_loss.addcmul_(vectors, self.weights).mul_(self.scale)


class _Values:
    """The values of fields that the fitted items have: their vectors, and who has them.

    Attributes:
        present: the values, as rows of the whole table.
        side: their vectors.
    """

    def __init__(self, start: Parameters, matrix: "_Matrix", penalties: Penalties) -> None:
        marked = torch.zeros(len(start.item_bias), dtype=torch.bool)
        marked[matrix.items] = True
        fields = start.fields.restrict(marked)
        self.present, values = _occurring(fields.values, fields.num_values)
        by_item = fields.items.argsort(stable=True)
        by_value = values.argsort(stable=True)
        self._of_items = _csr(
            torch.bincount(fields.items, minlength=len(matrix.items)),
            values[by_item].int(),
            fields.weights[by_item],
            len(self.present),
        )
        self._of_values = _csr(
            torch.bincount(values, minlength=len(self.present)),
            fields.items[by_value].int(),
            fields.weights[by_value],
            len(matrix.items),
        )
        squares = fields.weights.square() * matrix.item_counts[fields.items]
        evidence = torch.zeros(len(self.present)).index_add(0, values, squares)
        self.side = _Side(
            start.value_factors[self.present],
            start.value_bias[self.present],
            evidence,
            penalties.value_factors,
            penalties.value_bias,
            penalties.use_biases,
            bias_column=start.item_factors.shape[1] + 1,
            constant=0.0,
        )

    def spread(self, vectors: Tensor) -> Tensor:
        """What each item has of its values, `(items, width)`."""
        return self._of_items @ vectors

    def gather(self, gradients: Tensor) -> Tensor:
        """Gradients with respect to values, `(values, width)`, from those of items."""
        return self._of_values @ gradients


class _Matrix:
    """Rows as a sparse matrix of the users and items that occur, by user and by item.

    Attributes:
        users, items: table rows that occur.
        user_counts, item_counts: rows of each.
        labels: `(n,)`, by user.
    """

    def __init__(self, rows: Rows, num_users: int, num_items: int) -> None:
        self.users, users = _occurring(rows.users, num_users)
        self.items, items = _occurring(rows.items, num_items)
        by_user = users.argsort(stable=True)
        self.labels = rows.labels[by_user]
        users, items = users[by_user], items[by_user]
        self.user_counts = torch.bincount(users, minlength=len(self.users))
        self.item_counts = torch.bincount(items, minlength=len(self.items))
        self._items_by_user = items.int()
        self._by_item = items.argsort(stable=True)
        self._users_by_item = users[self._by_item].int()

    def logits(self, users: Tensor, items: Tensor) -> Tensor:
        """`(n,)` products of the rows' vectors, by user."""
        if len(self.labels) > len(users) * len(items):  # repeats, more than a sparse matrix takes
            of_rows = users.repeat_interleave(self.user_counts, 0)  # (n, width), by user
            return (of_rows * items[self._items_by_user]).sum(-1)
        pattern = self._user_rows(torch.zeros_like(self.labels))
        return torch.sparse.sampled_addmm(pattern, users, items.t(), beta=0.0).values()

    def gradients(self, residuals: Tensor, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the loss with respect to the users' and the items' vectors."""
        by_item = _csr(
            self.item_counts, self._users_by_item, residuals[self._by_item], len(self.users)
        )
        return self._user_rows(residuals) @ items, by_item @ users

    def _user_rows(self, values: Tensor) -> Tensor:
        return _csr(self.user_counts, self._items_by_user, values, len(self.items))


def _occurring(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The table rows that occur, and each id's place among them."""
    present = torch.bincount(ids, minlength=size) > 0
    return present.nonzero().flatten(), (present.cumsum(0) - 1)[ids]


def _csr(counts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """`(len(counts), width)` sparse, `counts` values in each row."""
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            offsets, columns, values, size=(len(counts), width), check_invariants=False
        )


@contextlib.contextmanager
def limit_threads(rows: int) -> Iterator[None]:
    """One thread for few rows: the steps are so short that threads would wait more than work, and
    for minutes when another process wants the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if rows < ONE_THREAD_ROWS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _minimize(
    matrix: _Matrix,
    users: _Side,
    items: _Side,
    values: _Values | None,
    start_offset: Tensor,
    iterations: int,
    free_offset: bool,
) -> Tensor:
    """Move all sides' variables to the optimum; returns the offset."""
    shift, scale = torch.zeros(1), (CURVATURE * len(matrix.labels)) ** -0.5 * free_offset
    optimizer = torch.optim.LBFGS(
        [users.variable, items.variable, *([values.side.variable] if values else []), shift],
        max_iter=min(ITERATIONS_AT_ONCE, iterations),
        max_eval=100 * ITERATIONS_AT_ONCE,
        history_size=LBFGS_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    least = float("inf")

    def closure() -> float:
        nonlocal least
        user, own = users.vectors(), items.vectors()
        item = own if values is None else own + values.spread(value := values.side.vectors())
        logits = matrix.logits(user, item) + start_offset + shift * scale
        losses = F.binary_cross_entropy_with_logits(logits, matrix.labels, reduction="none")
        residuals = logits.sigmoid_().sub_(matrix.labels)
        of_users, of_items = matrix.gradients(residuals, user, item)
        # In double precision: the last iterations gain less than a float's resolution of the sum.
        total = float(losses.sum(dtype=torch.float64)) + users.penalty(user) + items.penalty(own)
        if values is not None:
            total += values.side.penalty(value)
            values.side.set_gradient(values.gather(of_items), value)
        users.set_gradient(of_users, user)
        items.set_gradient(of_items, own)
        shift.grad = residuals.sum().unsqueeze(0) * scale
        least = min(least, total)
        return total

    for _ in range(0, iterations, ITERATIONS_AT_ONCE):
        before = least
        optimizer.step(closure)
        if before - least < TOLERANCE * len(matrix.labels):
            break
    return start_offset + shift * scale


def factor_weights(dim: int) -> Tensor:
    """w_d: how much more a later dimension is penalized, `(dim,)` from 1 to 2."""
    return torch.linspace(1, 2, dim)


def refresh(previous: Parameters, start: Parameters) -> Parameters:
    """A warm start: the previous optimum plus the first start's factors.

    Without them, rows new since then, and factors that were regularized away, would sit on the
    saddle point at zero.
    """
    return replace(
        previous,
        user_factors=previous.user_factors + start.user_factors,
        item_factors=previous.item_factors + start.item_factors,
        value_factors=previous.value_factors + start.value_factors,
    )

"""Stop a fit when validation AUC no longer rises, and keep the weights that were best."""

from collections.abc import Sequence

from torch import Tensor


class EarlyStopping:
    """The best of what a fit went through.

    Args:
        patience: how many steps (or epochs) without a new best end the fit.

    Attributes:
        best: highest AUC so far; minus infinity before the first.
        step: where it was reached.
        weights: copies of the tensors there.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = float("-inf")
        self.step = 0
        self.weights: list[Tensor] = []

    def update(self, value: float, step: int, tensors: Sequence[Tensor]) -> bool:
        """Take note of an AUC; True says that the fit is over."""
        if value > self.best:
            self.best, self.step = value, step
            self.weights = [tensor.detach().clone() for tensor in tensors]
        return step - self.step >= self.patience

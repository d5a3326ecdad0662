"""The frozen tables of the CF model, as the fusion reads them."""

from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_ccf_llm import CF_TENSORS
from .configuration_ccf_llm import CCFLLMConfig

STEPS = 8


class CFTable(nn.Module):
    """Frozen CF vectors of users and items, in one or more snapshots in time.

    Vectors enter ALG at unit RMS per dimension; `*_scale` holds that RMS per snapshot, because
    snapshots of one CF model differ in scale.
    """

    offset: Tensor
    default_user: Tensor

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        snapshots, dim = config.num_snapshots, config.cf_dim
        users, items = config.num_users, config.num_items
        self.register_buffer("user_vectors", torch.zeros(snapshots, users, dim))
        self.register_buffer("item_vectors", torch.zeros(snapshots, items, dim))
        self.register_buffer("user_known", torch.zeros(snapshots, users, dtype=torch.bool))
        self.register_buffer("item_known", torch.zeros(snapshots, items, dtype=torch.bool))
        self.register_buffer("default_user", torch.zeros(snapshots, dim))
        self.register_buffer("default_item", torch.zeros(snapshots, dim))
        self.register_buffer("offset", torch.zeros(snapshots))
        self.register_buffer("snapshot_times", torch.zeros(snapshots, dtype=torch.long))
        self.register_buffer("user_scale", torch.ones(snapshots, dim))
        self.register_buffer("item_scale", torch.ones(snapshots, dim))
        # Of the config, so that tables saved without it still load.
        self.user_precision, self.decay = config.cf_user_precision, config.fold_in_decay

    def fill(self, cf: Any) -> None:
        """Take the tensors of a `CFVectors` and measure their scales."""
        for name in CF_TENSORS:
            buffer = getattr(self, name)
            buffer.copy_(torch.as_tensor(getattr(cf, name)).to(buffer.dtype))
        for side in ("user", "item"):
            known = getattr(self, f"{side}_known").unsqueeze(-1).float()
            square = (getattr(self, f"{side}_vectors").pow(2) * known).sum(1)
            rms = (square / known.sum(1).clamp(min=1)).sqrt()
            getattr(self, f"{side}_scale").copy_(torch.where(rms > 1e-8, rms, 1.0))

    def lookup(self, side: str, rows: Tensor, snapshots: Tensor) -> tuple[Tensor, Tensor]:
        """Raw vectors `(..., cf_dim)` and whether each is known; rows past the table are not."""
        vectors, known = getattr(self, f"{side}_vectors"), getattr(self, f"{side}_known")
        default = getattr(self, f"default_{side}")[snapshots]
        size = vectors.shape[1]
        if size == 0:
            return default, torch.zeros_like(rows, dtype=torch.bool)
        inside = rows.clamp(max=size - 1)
        seen = known[snapshots, inside] & (rows < size)
        return torch.where(seen.unsqueeze(-1), vectors[snapshots, inside], default), seen

    def scaled(self, side: str, rows: Tensor, snapshots: Tensor) -> tuple[Tensor, Tensor]:
        """As `lookup`, at the scale that ALG takes."""
        vectors, seen = self.lookup(side, rows, snapshots)
        return vectors / getattr(self, f"{side}_scale")[snapshots], seen

    def logits(self, users: Tensor, items: Tensor, snapshots: Tensor) -> Tensor:
        """The CF model's own logits; unknown users and items stand at their defaults."""
        user, _ = self.lookup("user", users, snapshots)
        item, _ = self.lookup("item", items, snapshots)
        return (user * item).sum(-1) + self.offset[snapshots]

    @torch.no_grad()
    def folded_users(self, items: Tensor, targets: Tensor, depths: Tensor, when: Tensor) -> Tensor:
        """The user vectors that histories ask for: the mode of the CF model's posterior.

        The CF model's own objective for one user, with the item vectors held (our choice): it
        serves users that the CF model has never seen, and follows those that it has.

        Args:
            items: `(n, longest)` table rows of the histories, oldest first; -1 where padded, rows
                past the table are unknown. Both count for nothing.
            targets: `(n, longest)` float32, what the CF model would have been fitted to: 1 liked,
                0 disliked, graded between where ratings are.
            depths: `(n,)` how many of its items each history has.
            when: `(n,)` CF snapshots.

        Returns:
            `(n, cf_dim)` float32; the default user where the history is empty.
        """
        vectors, seen = self.lookup("item", items.clamp(min=0), when[:, None].expand_as(items))
        age = depths[:, None] - 1 - torch.arange(items.shape[1], device=items.device)
        weight = (seen & (items >= 0) & (age >= 0)) * self.decay ** age.clamp(min=0)
        precision = torch.tensor(self.user_precision, device=vectors.device)
        free = precision > 0
        default = self.default_user[when]
        # What the fixed dimensions say, an item bias for example, is in every logit as it is.
        fixed = (vectors * torch.where(free, 0.0, default)[:, None]).sum(-1)
        base = fixed + self.offset[when][:, None]
        x, prior, start = vectors[..., free], precision[free], default[:, free]
        user = start.clone()
        for _ in range(STEPS):
            logits = (x @ user[..., None])[..., 0] + base
            p = torch.sigmoid(logits)
            residual = weight * (p - targets)
            gradient = (residual[:, None] @ x)[:, 0] + prior * (user - start)
            # Jaakkola's bound in place of p (1 - p): no step can overshoot.
            bound = weight * torch.where(logits.abs() < 1e-3, 0.25, (p - 0.5) / logits)
            curvature = x.mT @ (bound[..., None] * x) + torch.diag(prior)
            user = user - torch.linalg.solve(curvature, gradient)
        return default.masked_scatter(free.expand_as(default), user)

    def folded_logits(self, users: Tensor, items: Tensor, snapshots: Tensor) -> Tensor:
        """As `logits`, for user vectors `(..., cf_dim)` in place of table rows."""
        item, _ = self.lookup("item", items, snapshots)
        return (users * item).sum(-1) + self.offset[snapshots]


__all__ = ["CFTable"]

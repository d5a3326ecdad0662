"""CCF-LLM (Liu, Zhang, Dong, Fang, CIKM 2024) as transformers models, top to bottom.

    c' = ALG(c)                       a CF vector mapped into the backbone's embedding space
    s  = ALG_text(t)                  t: the item's words as the backbone reads them
    g  = sigmoid(W [s ; c'; v] + b)   one weight per dimension; v: how much of the item is known
    e  = g * s + (1 - g) * c'         the embedding of an item slot

    logit = scale * h_last . (w_Yes - w_No)   at the end of a candidate's block

The authors published no code. The text vector, shapes of ALG and gate, the rescaling of the gate's
inputs and its evidence, the cold vectors, the user slot and the CF logit are our choice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .adapter_ccf_llm import Adapter, without_adapter
from .attention_ccf_llm import Layout, attention_inputs, use_packed_attention
from .checkpoint_ccf_llm import (
    CF_TENSORS,
    FIELD_TENSORS,
    CheckpointMixin,
    load_sentence_encoder,
)
from .configuration_ccf_llm import IGNORED_LABEL, CCFLLMConfig

if TYPE_CHECKING:
    # As remote code, transformers fetches the files that a loaded one names. Named here, ranking
    # and pipeline are saved with a model that was loaded alone.
    from .pipeline_ccf_llm import CTRRankingPipeline  # noqa: F401

# Of text, in what a fusion without a gate puts into a slot.
SHARES = {"sum": 0.5, "cf_only": 0.0}
LEAST_EVIDENCE = 0.01  # of an item that CF does not know: all but 1 % of its slot starts as text
FOLD_IN_STEPS = 8  # of Newton's method; a test holds their result against the optimum
# Of a batch, what `CCFLLMForCTR.cf_logits` takes.
CF_INPUTS = (
    "candidate_users",
    "candidate_items",
    "answer_positions",
    "sequence_ids",
    "history_depths",
    "history_items",
    "history_targets",
    "history_unshown",
    "new_field_values",
    "new_field_weights",
)
NewTitles = tuple[Tensor, Tensor]  # token ids of new items' titles, flat, and their lengths
READ_TOKENS = 4096  # of one pass that reads texts, padding included
STATES_AT_ONCE = 4096  # rows of a catalog that are worked on at a time: memory, not results
TEXTS_KEPT = 4096  # of items outside the catalog, whose states a model remembers
NewFields = tuple[Tensor, Tensor]  # `(n, most)` rows of new items' field values, and their weights


class CFTable(nn.Module):
    """Frozen vectors of the CF model: users `(num_users, cf_dim)`, items `(num_items, cf_dim)`.

    A user or item that the CF model was not fitted on is unknown and stands at the model's default
    vector; so do rows past the table. Rows past the item table are new items: where values of their
    fields, such as the author, have vectors `(num_field_values, cf_dim)`, the default plus these.
    Vectors enter ALG at unit RMS per dimension; `*_scale` holds that RMS.

    Users may have tastes for values of fields, see `folded_users`: `field_tastes`
    `(num_field_values,)` are their variances, `item_values` `(num_items, num_item_values)` which
    values an item has, -1 where there are no more.
    """

    field_vectors: Tensor | None
    field_tastes: Tensor | None
    item_values: Tensor | None
    item_vectors: Tensor
    item_known: Tensor
    user_known: Tensor
    default_user: Tensor
    default_item: Tensor
    offset: Tensor

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        users, items, dim = config.num_users, config.num_items, config.cf_dim
        self.register_buffer("user_vectors", torch.zeros(users, dim))
        self.register_buffer("item_vectors", torch.zeros(items, dim))
        self.register_buffer("user_known", torch.zeros(users, dtype=torch.bool))
        self.register_buffer("item_known", torch.zeros(items, dtype=torch.bool))
        self.register_buffer("default_user", torch.zeros(dim))
        self.register_buffer("default_item", torch.zeros(dim))
        self.register_buffer("offset", torch.zeros(()))
        values = config.num_field_values
        most = config.num_item_values
        self.register_buffer("field_vectors", torch.zeros(values, dim) if values else None)
        self.register_buffer("field_tastes", torch.zeros(values) if most else None)
        own = torch.full((items, most), -1, dtype=torch.int32) if most else None
        self.register_buffer("item_values", own)
        self.register_buffer("user_scale", torch.ones(dim))
        self.register_buffer("item_scale", torch.ones(dim))
        self.user_precision = config.cf_user_precision

    def fill(self, cf: Any) -> None:
        """Take the tensors of a `CFVectors`, of its last fit, and measure their scales.

        Where fits are of folds of users, no user is known: training meets strangers alone, folded
        in, and so does serving.
        """
        for name in CF_TENSORS:
            buffer = getattr(self, name)
            buffer.copy_(torch.as_tensor(getattr(cf, name))[-1].to(buffer.dtype))
        for name in FIELD_TENSORS:
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(cf, name))
        if cf.cross_fit == "users":
            self.user_known.zero_()
        for side in ("user", "item"):
            vectors, known = getattr(self, f"{side}_vectors"), getattr(self, f"{side}_known")
            getattr(self, f"{side}_scale").copy_(rms_of_known(vectors, known))

    def lookup(
        self, side: str, rows: Tensor, new: NewFields | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors `(..., cf_dim)` of `user` or `item` rows `(...)`, and whether each is known.

        Args:
            new: fields of the items past the table: rows of `field_vectors` `(n, most)`, -1 where
                padded, and what each counts.
        """
        vectors, known = getattr(self, f"{side}_vectors"), getattr(self, f"{side}_known")
        default = getattr(self, f"default_{side}")
        if len(vectors) == 0:
            found = default.expand(*rows.shape, -1)
            seen = torch.zeros_like(rows, dtype=torch.bool)
        else:
            inside = rows.clamp(max=len(vectors) - 1)
            seen = known[inside] & (rows < len(vectors))
            found = torch.where(seen.unsqueeze(-1), vectors[inside], default)
        return self.add_new(rows, found, seen, new) if side == "item" else (found, seen)

    def add_new(
        self, rows: Tensor, found: Tensor, seen: Tensor, new: NewFields | None
    ) -> tuple[Tensor, Tensor]:
        """What `lookup` found of item rows, with the new items that a value of a field tells of."""
        if new is None or not len(new[0]) or self.field_vectors is None:
            return found, seen
        values, weights = new
        there = values >= 0
        parts = self.field_vectors[values.clamp(min=0)] * (weights * there).unsqueeze(-1)
        made = self.default_item + parts.sum(1)  # (n, cf_dim)
        beyond = rows - len(self.item_vectors)
        place = beyond.clamp(min=0, max=len(made) - 1)
        told = there.any(1)[place] & (beyond >= 0)
        return torch.where(told.unsqueeze(-1), made[place], found), seen | told

    def scaled(
        self, side: str, rows: Tensor, new: NewFields | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `lookup`, at the scale that ALG takes."""
        vectors, seen = self.lookup(side, rows, new)
        return vectors / getattr(self, f"{side}_scale"), seen

    def logits(self, users: Tensor, items: Tensor, new: NewFields | None = None) -> Tensor:
        """The CF model's own logits of rows `(...)`; `new` as in `lookup`."""
        vectors = self.lookup("item", items, new)[0]
        return (self.lookup("user", users)[0] * vectors).sum(-1) + self.fit_of(items)[1]

    def folded_logits(
        self, users: FoldedUsers, items: Tensor, new: NewFields | None = None
    ) -> Tensor:
        """As `logits`, of items `(..., m)`, for users `(...)` in place of table rows."""
        vectors = self.lookup("item", items, new)[0]
        # A product, which takes a fifth of the time of a sum over elements.
        logits = (vectors @ users.vectors.unsqueeze(-1)).squeeze(-1) + self.fit_of(items)[1]
        if self.item_values is None or users.values is None:
            return logits
        return logits + users.taste_of(self.values_of(items, new))

    def fit_of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Default user `(..., cf_dim)` and global bias `(...)` of the fit that rows are read by."""
        return self.default_user.expand(*items.shape, -1), self.offset.expand(items.shape)

    def values_of(self, items: Tensor, new: NewFields | None = None) -> Tensor:
        """The values that users may have tastes for of item rows `(...)`: `(..., most)`, -1 where
        there are no more."""
        assert self.item_values is not None
        tables = [self.item_values] if new is None else [self.item_values, new[0]]
        width = max(table.shape[1] for table in tables)
        values = torch.full((*items.shape, width), -1, device=items.device)
        for table in tables:
            here = (items >= 0) & (items < len(table))
            values[..., : table.shape[1]][here] = table[items[here]].long()
            items = items - len(table)
        return values

    @torch.no_grad()
    def folded_users(
        self, items: Tensor, targets: Tensor, depths: Tensor, new: NewFields | None = None
    ) -> FoldedUsers:
        """The users that histories ask for: the mode of the CF model's posterior.

        The CF model's own objective for one user, with the item vectors held (our choice): it
        serves users that the CF model has never seen, and follows those that it has. What few
        dimensions cannot hold, such as a liking for one author among thousands, the user's tastes
        do: an effect of each value of a field, at a Gaussian prior about zero of its own variance;
        one step of Newton's from the mode without tastes, each value by itself.

        Args:
            items: `(n, longest)` table rows of the histories, oldest first; -1 where padded, rows
                past the table are new. What is not known counts for nothing.
            targets: `(n, longest)` float32, what the CF model would have been fitted to: 1 liked,
                0 disliked, graded between where ratings are.
            depths: `(n,)` how many of its items each history has.
            new: as in `lookup`.

        Returns:
            n users; the default one without tastes where the history is empty.
        """
        if not items.shape[1]:
            items, targets = (F.pad(part, (0, 1), value=-1) for part in (items, targets))
        vectors, seen = self.lookup("item", items.clamp(min=0), new)
        place = torch.arange(items.shape[1], device=items.device)
        there = (items >= 0) & (place < depths[:, None])
        default, offset = (part[:, 0] for part in self.fit_of(items))
        users = fold_in(vectors, targets, seen & there, self.user_precision, default, offset)
        if self.item_values is None:
            return FoldedUsers(users)
        p = torch.sigmoid((vectors @ users[..., None])[..., 0] + offset[:, None])
        sums = torch.stack([targets - p, p * (1 - p)]) * there  # (2, n, longest)
        values = self.values_of(items, new)
        known, column = torch.unique(values, return_inverse=True)
        column = column.flatten(1).expand(2, -1, -1)  # (2, n, longest * most)
        sums = sums.repeat_interleave(values.shape[-1], dim=-1)
        residuals, curvatures = sums.new_zeros(2, len(users), len(known)).scatter_add(
            2, column, sums
        )
        assert self.field_tastes is not None
        prior = self.field_tastes[known.clamp(min=0)] * (known >= 0)
        return FoldedUsers(users, known, prior * residuals / (1 + prior * curvatures))


@dataclass
class FoldedUsers:
    """Users that are solved for from histories.

    Attributes:
        vectors: `(n, cf_dim)` float32.
        values: `(m,)` int64, ascending, field values that occur in the histories; None where the CF
            model knows no tastes.
        tastes: `(n, m)` float32, what each user's logit of an item gains by a value.
    """

    vectors: Tensor
    values: Tensor | None = None
    tastes: Tensor | None = None

    def taste_of(self, values: Tensor) -> Tensor:
        """What the logits of items with these values `(n, items, most)` gain: `(n, items)`."""
        if self.values is None or self.tastes is None or not len(self.values):
            return torch.zeros(values.shape[:-1], device=values.device)
        place = torch.searchsorted(self.values, values).clamp(max=len(self.values) - 1)
        there = (self.values[place] == values) & (values >= 0)
        gains = self.tastes.gather(1, place.flatten(1)).view(values.shape)
        return (gains * there).sum(-1)

    def at(self, rows: Tensor) -> FoldedUsers:
        """Some of them."""
        tastes = None if self.tastes is None else self.tastes[rows]
        return FoldedUsers(self.vectors[rows], self.values, tastes)


def rms_of_known(vectors: Tensor, known: Tensor) -> Tensor:
    """Root mean square `(cf_dim,)` over known rows of `(n, cf_dim)`; 1 for an empty dimension."""
    weight = known.unsqueeze(-1).float()
    rms = ((vectors.pow(2) * weight).sum(0) / weight.sum(0).clamp(min=1)).sqrt()
    return torch.where(rms > 1e-8, rms, 1.0)


def fold_in(
    vectors: Tensor,
    targets: Tensor,
    counts: Tensor,
    user_precision: list[float] | None,
    default: Tensor,
    offset: Tensor,
) -> Tensor:
    """Users `(n, cf_dim)` solved for from item vectors `(n, longest, cf_dim)` and their targets.

    Args:
        counts: `(n, longest)` bool, which items there are.
        user_precision: `(cf_dim,)` of the prior; 0 for a dimension that is fixed at the default.
        default: `(cf_dim,)` or `(n, cf_dim)`, the prior's mean.
        offset: scalar or `(n,)`, the CF model's global bias.
    """
    weight = counts.to(vectors.dtype)
    precision = torch.tensor(user_precision, device=vectors.device)
    free = precision > 0
    default = default.expand(len(vectors), -1)
    # What the fixed dimensions say, an item bias for example, is in every logit as it is.
    fixed = (vectors * torch.where(free, 0.0, default)[:, None]).sum(-1)
    base = fixed + offset.expand(len(vectors))[:, None]
    x, prior, start = vectors[..., free], precision[free], default[:, free]
    user = start.clone()
    for _ in range(FOLD_IN_STEPS):
        logits = (x @ user[..., None])[..., 0] + base  # (n, longest)
        p = torch.sigmoid(logits)
        residual = weight * (p - targets)
        gradient = (residual[:, None] @ x)[:, 0] + prior * (user - start)  # (n, free)
        # Jaakkola's bound in place of p (1 - p): no step can overshoot.
        bound = weight * torch.where(logits.abs() < 1e-3, 0.25, (p - 0.5) / logits)
        curvature = x.mT @ (bound[..., None] * x) + torch.diag(prior)  # (n, free, free)
        user = user - torch.linalg.solve(curvature, gradient)
    return default.masked_scatter(free.expand_as(default), user)


class StaticText(nn.Module):
    """t as an ablation: the mean input embedding of an item's tokens, which is s as it stands.

    Computed from the live embedding table, so it can never be stale.
    """

    title_ids: Tensor
    title_lengths: Tensor

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        self.register_buffer("title_ids", torch.zeros(config.num_title_tokens, dtype=torch.int32))
        self.register_buffer("title_lengths", torch.zeros(config.num_items, dtype=torch.int32))

    def forward(self, items: Tensor, words: nn.Module, new_titles: NewTitles | None) -> Tensor:
        """`(n,)` rows -> `(n, hidden_size)`.

        Args:
            items: catalog rows; rows past the catalog are those of `new_titles`. An item without a
                title gives zeros.
            words: the backbone's embedding.
            new_titles: titles of items outside the catalog.
        """
        ids, lengths = self.title_ids.long(), self.title_lengths.long()
        if new_titles is not None:
            ids, lengths = torch.cat([ids, new_titles[0]]), torch.cat([lengths, new_titles[1]])
        starts = lengths.cumsum(0) - lengths
        counts = lengths[items]
        owner = torch.repeat_interleave(torch.arange(len(items), device=items.device), counts)
        within = torch.arange(len(owner), device=items.device) - (counts.cumsum(0) - counts)[owner]
        embedded = words(ids[starts[items][owner] + within])  # (all titles' tokens, hidden_size)
        total = embedded.new_zeros(len(items), embedded.shape[-1]).index_add(0, owner, embedded)
        return total / counts.clamp(min=1).unsqueeze(-1).to(total.dtype)


class ContextualText(nn.Module):
    """t: an item's words as a language model reads them (our choice).

    Its states, the mean over the item's tokens at one layer, are standardized over the catalog
    dimension by dimension and reduced to their principal components, whitened:
    `t = (states - mean) @ projection`. Some dimensions of a backbone are a thousand times as large
    as others and say less; raw states hide the rest behind them. What the last components would add
    is a catalog's noise: less to store, and a linear probe of unseen books does better without.
    `vectors` holds the catalog's, in half precision.
    """

    vectors: Tensor
    mean: Tensor
    projection: Tensor

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        width, dim = config.text_width, config.text_dim
        # With dtypes of their own, which no loading in another precision changes.
        half, full = torch.float16, torch.float32
        self.register_buffer("vectors", torch.zeros(config.num_items, dim, dtype=half))
        self.register_buffer("mean", torch.zeros(width, dtype=full))
        self.register_buffer("projection", torch.zeros(width, dim, dtype=full))

    def fit(self, states: Tensor) -> None:
        """Learn mean and projection from the states `(n, width)` of a catalog.

        Each component has unit RMS, the scale that ALG takes, but those in which a small catalog
        does not vary are zero: a new item would stand a thousand deviations out.
        """
        count = int(states.any(-1).sum())
        if not count:
            return
        parts = states.split(STATES_AT_ONCE)
        mean = states.new_zeros(states.shape[1], dtype=torch.float64)
        for part in parts:
            mean += part.sum(0, dtype=torch.float64) / count
        covariance = mean.new_zeros(len(mean), len(mean))
        for part in parts:
            centered = part[part.any(-1)].double() - mean  # of items with words
            covariance += centered.mT @ centered / count
        variance = covariance.diagonal()
        deviation = torch.where(variance > 1e-12, variance.sqrt(), 1.0)
        variances, axes = torch.linalg.eigh(covariance / deviation / deviation[:, None])
        dim = self.projection.shape[1]
        kept, axes = variances.flip(0)[:dim], axes.flip(1)[:, :dim]
        scales = torch.where(kept > 0.01 * kept.mean(), kept.sqrt(), torch.inf)
        self.mean.copy_(mean)
        self.projection.copy_(axes / scales / deviation[:, None])

    def reduce(self, states: Tensor) -> Tensor:
        """t `(n, text_dim)` float32 of states `(n, width)`; zeros, the catalog's mean, for an item
        without words."""
        mean, projection = self.mean.float(), self.projection.float()  # of a model cast to half
        reduced = (states.to(mean.device) - mean) @ projection
        return reduced * states.any(-1, keepdim=True).to(reduced)

    def fill(self, states: Tensor) -> None:
        """Take the states of every catalog item, in table order."""
        parts = (self.reduce(part) for part in states.split(STATES_AT_ONCE))
        self.vectors = torch.cat([part.to(self.vectors) for part in parts])

    def forward(self, items: Tensor, new_states: Tensor | None) -> Tensor:
        """`(n,)` rows -> `(n, text_dim)` float32; rows past the catalog are those of `new_states`
        `(new items, width)`."""
        known = len(self.vectors)
        if new_states is None:
            return self.vectors[items].float()
        new = self.reduce(new_states)
        inside = items < known
        found = new.new_zeros(len(items), new.shape[-1])
        found[inside] = self.vectors[items[inside]].float()
        found[~inside] = new[items[~inside] - known]
        return found


class _Reached(Exception):
    """Carries the states of a layer out of a backbone whose other layers nobody needs."""


def states_after(backbone: nn.Module, layer: int, **inputs: Any) -> Tensor:
    """Hidden states `(n, length, width)` after `layer` of a model's layers; those above do not run.

    Args:
        inputs: what the model takes.
    """
    config: Any = backbone.config
    layers = next(
        module
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = layers[layer - 1].register_forward_hook(stop)
    try:
        backbone(**inputs)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError("a layer did not run")


@torch.no_grad()
def read_texts(
    reader: Any, layer: int, texts: list[list[int]], before: list[int] | None = None
) -> Tensor:
    """States of texts, the mean over a text's tokens: `(len(texts), width)` float32 on the CPU.

    Args:
        reader: a transformers model without head, causal or a sentence encoder.
        layer: after how many of its layers.
        texts: token ids; an empty text gives zeros.
        before: tokens put before every text, which the mean leaves out.
    """
    before, device = before or [], reader.device
    pooled = torch.zeros(len(texts), reader.config.hidden_size)
    was_training = reader.training
    reader.eval()
    # Long ones first, those of about one length together: little is padded.
    left = sorted((i for i, text in enumerate(texts) if text), key=lambda i: -len(texts[i]))
    while left:
        length = len(before) + len(texts[left[0]])
        count = max(1, READ_TOKENS // length)
        rows, left = left[:count], left[count:]
        lengths = torch.tensor([len(before) + len(texts[i]) for i in rows], device=device)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for place, i in enumerate(rows):
            ids[place, : len(before) + len(texts[i])] = torch.tensor(before + texts[i])
        column = torch.arange(length, device=device)
        real = column < lengths[:, None]
        states = states_after(
            reader, layer, input_ids=ids.to(device), attention_mask=real.long(), use_cache=False
        )
        own = (real & (column >= len(before))).unsqueeze(-1)
        total = (states.float() * own).sum(1)
        pooled[rows] = (total / own.sum(1)).cpu()
    reader.train(was_training)
    return pooled


def unit_rms(x: Tensor) -> Tensor:
    """Rescale the last dimension to unit root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


class AlignmentNetwork(nn.Module):
    """ALG: maps a vector `(n, dim)` of CF or of text to the backbone's space `(n, hidden_size)`.

    Linear - GELU - Linear (our choice), each as PyTorch initializes it: a fresh one gives a fifth
    of `slot_scale`, the RMS of the backbone's token embeddings.
    """

    def __init__(self, config: CCFLLMConfig, dim: int) -> None:
        super().__init__()
        hidden = dim * config.alignment_multiplier
        self.up = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, config.text_config.hidden_size)
        self.scale = config.slot_scale

    def forward(self, vectors: Tensor) -> Tensor:
        return self.scale * self.out(F.gelu(self.up(vectors)))


class FusionGate(nn.Module):
    """GATE: how much of each dimension comes from text, in (0, 1).

    `(n, hidden_size)` for the paper's dimension-wise gate, `(n, 1)` for the scalar ablation. Both
    vectors are rescaled to unit RMS first (our choice), so that neither modality wins by its scale.
    A third input then tells what that hides (our choice): `evidence` `(n, 1)`, the mean square of
    the item's CF vector, 1 for the average item. A fit shrinks the vector of an item of few rows
    towards zero, so it measures how much of an item is known. Before training, the share of text
    is about `1 / (1 + evidence)`.
    """

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        size = 1 if config.fusion == "scalar_gate" else width
        self.linear = nn.Linear(2 * width, size)
        self.evidence_weight = nn.Parameter(-torch.ones(size))

    def forward(self, text: Tensor, aligned: Tensor, evidence: Tensor) -> Tensor:
        known = self.evidence_weight * torch.log(evidence + LEAST_EVIDENCE)
        vectors = torch.cat([unit_rms(text), unit_rms(aligned)], dim=-1)
        return torch.sigmoid(self.linear(vectors) + known)


class CCFLLMPreTrainedModel(PreTrainedModel):
    config_class = CCFLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []  # noqa: RUF012
    # Tables and scales, but no flag: the option would cast those to float too.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "user_vectors",
        "item_vectors",
        "default_user",
        "default_item",
        "offset",
        "field_vectors",
        "field_tastes",
        "user_scale",
        "item_scale",
    ]
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FusionGate):
            init.normal_(module.linear.weight, std=0.1 * module.linear.in_features**-0.5)
            init.zeros_(module.linear.bias)
            init.constant_(module.evidence_weight, -1.0)
        elif isinstance(module, CFTable):
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name.endswith("_scale") else init.zeros_)(buffer)
        elif isinstance(module, (StaticText, ContextualText)):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        elif isinstance(module, CCFLLMModel):
            init.normal_(module.cold_item, std=0.02)
            init.normal_(module.cold_user, std=0.02)
        elif isinstance(module, CCFLLMForCTR):
            init.zeros_(module.answer_weight)
            init.ones_(module.cf_logit_scale)
            init.constant_(module.answer_scale, 0.1)


class CCFLLMModel(CCFLLMPreTrainedModel):
    """The backbone, reading hybrid prompts whose slots are filled by text and CF together."""

    language_model: Any

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.language_model = (
            AutoModel.from_config(config.text_config) if config.checkpoint_form == "full" else None
        )
        if self.language_model is not None:
            use_packed_attention(self.language_model)
        self.cf = CFTable(config)
        self.item_alignment = AlignmentNetwork(config, config.cf_dim)
        self.user_alignment = AlignmentNetwork(config, config.cf_dim)
        self.item_text: StaticText | ContextualText = StaticText(config)
        self.text_alignment = None
        if config.item_text == "contextual":
            self.item_text = ContextualText(config)
            self.text_alignment = AlignmentNetwork(config, config.text_dim)
        # What a checkpoint's loading added to the backbone's weights; None: that is not known.
        self.merged_adapter: Adapter | None = {}
        self.merged_scale = 0.0
        self._new_states: dict[tuple[int, ...], Tensor] = {}
        self._read_by = (0, 0)
        self._sentence_encoder: list[Any] = []  # in a list, where no state dict finds it
        self.gate = None if config.fusion in SHARES else FusionGate(config)
        self.cold_item = nn.Parameter(torch.zeros(width))
        self.cold_user = nn.Parameter(torch.zeros(width))
        self.post_init()

    def renew_cf(self) -> None:
        """Put an empty CF table of the configuration's sizes in the place of the present one."""
        config: Any = self.config
        self.cf = CFTable(config).to(self.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def read_texts(self, texts: list[list[int]]) -> Tensor:
        """States `(len(texts), text_width)` float32 of items' token ids, on the CPU.

        A backbone reads them without its LoRA, so that a vector stays the same while LoRA learns.
        """
        config: Any = self.config
        if config.sentence_encoder:
            return read_texts(self.sentence_encoder(), config.text_layer, texts)
        if self.merged_adapter is None:
            raise ValueError(
                "An item outside the catalog is read by the backbone without LoRA, and this full "
                "checkpoint does not tell its LoRA from the weights: load its slim form."
            )
        before, backbone = config.text_prefix_ids, self.language_model
        with without_adapter(backbone, self.merged_adapter, self.merged_scale):
            return read_texts(backbone, config.text_layer, texts, before)

    def sentence_encoder(self) -> PreTrainedModel:
        """The sentence encoder, loaded when first asked for."""
        if not self._sentence_encoder:
            config: Any = self.config
            encoder: Any = load_sentence_encoder(config)
            self._sentence_encoder.append(encoder.to(self.device))
        return self._sentence_encoder[0]

    def new_states(self, new_titles: NewTitles) -> Tensor:
        """States of items outside the catalog `(new items, text_width)`; the latest are kept, since
        one user's requests come back with the same ones."""
        ids, kept = new_titles[0].tolist(), self._new_states
        weights = [
            weight for weight in self.language_model.parameters() if not weight.is_inference()
        ]
        stamp = (len(weights), sum(weight._version for weight in weights))
        if stamp != self._read_by:  # the backbone has learned, or was loaded into
            kept.clear()
            self._read_by = stamp
        texts = []
        for length in new_titles[1].tolist():
            texts.append(tuple(ids[:length]))
            del ids[:length]
        missing = [text for text in dict.fromkeys(texts) if text not in kept]
        kept.update(zip(missing, self.read_texts([list(text) for text in missing]), strict=True))
        states = [kept[text] for text in texts]
        for text in list(kept)[: max(0, len(kept) - TEXTS_KEPT)]:
            del kept[text]
        return torch.stack(states)

    def text_vectors(self, items: Tensor, new_titles: NewTitles | None = None) -> Tensor:
        """t of items `(n,)`: `(n, text_dim)` float32, of static text `(n, hidden_size)`. What two
        items say is alike as their vectors' cosine.

        Args:
            items: catalog rows; rows past the catalog count on through `new_titles`.
        """
        if isinstance(self.item_text, StaticText):
            return self.item_text(items, self.get_input_embeddings(), new_titles)
        if new_titles is None or not len(new_titles[1]):
            return self.item_text(items, None)
        return self.item_text(items, self.new_states(new_titles))

    def item_words(self, items: Tensor, new_titles: NewTitles | None = None) -> Tensor:
        """s of items `(n,)`: `(n, hidden_size)` in the fusion's precision."""
        vectors = self.text_vectors(items, new_titles).to(self.cold_item.dtype)
        return vectors if self.text_alignment is None else self.text_alignment(vectors)

    def aligned_items(
        self, items: Tensor, new_fields: NewFields | None = None
    ) -> tuple[Tensor, Tensor]:
        """c' of items `(n,)`: aligned CF vectors, the cold-item vector where there is none; and the
        evidence behind each, `(n, 1)`."""
        vectors, known = self.cf.scaled("item", items, new_fields)
        known = known.unsqueeze(-1)
        cold = self.config.slot_scale * self.cold_item
        aligned = torch.where(known, self.item_alignment(vectors.to(cold.dtype)), cold)
        return aligned, (vectors.pow(2).mean(-1, keepdim=True) * known).to(cold.dtype)

    def aligned_users(self, users: Tensor) -> Tensor:
        """A user slot is the aligned CF vector alone: users have no text (our choice)."""
        vectors, known = self.cf.scaled("user", users)
        cold = self.config.slot_scale * self.cold_user
        return torch.where(known.unsqueeze(-1), self.user_alignment(vectors.to(cold.dtype)), cold)

    def fuse(self, text: Tensor, aligned: Tensor, evidence: Tensor) -> Tensor:
        """e: the embedding of an item slot, from s and c', both `(n, hidden_size)`."""
        if self.config.fusion == "cf_only":
            return aligned
        if self.config.fusion == "sum":
            return text + aligned
        assert self.gate is not None
        gate = self.gate(text, aligned, evidence)
        return gate * text + (1 - gate) * aligned

    def fill_slots(
        self,
        embeddings: Tensor,
        item_slots: Tensor,
        user_slots: Tensor,
        new_titles: NewTitles | None,
        new_fields: NewFields | None,
    ) -> Tensor:
        """Put fused vectors where the prompt has slots; `(1, length, hidden_size)`.

        An item is fused once for all its slots.
        """
        row, column = (item_slots >= 0).nonzero(as_tuple=True)
        if len(row):
            items, place = torch.unique(item_slots[row, column], return_inverse=True)
            words = self.item_words(items, new_titles)
            fused = self.fuse(words, *self.aligned_items(items, new_fields))
            embeddings = embeddings.index_put((row, column), fused[place].to(embeddings.dtype))
        row, column = (user_slots >= 0).nonzero(as_tuple=True)
        if len(row):
            users = self.aligned_users(user_slots[row, column])
            embeddings = embeddings.index_put((row, column), users.to(embeddings.dtype))
        return embeddings

    def check_slots(self, input_ids: Tensor, item_slots: Tensor, user_slots: Tensor) -> Tensor:
        """Where slots stand `(1, length)`; raises when tokens and slots disagree."""
        for kind, slots in (("item", item_slots), ("user", user_slots)):
            token = getattr(self.config, f"{kind}_slot_token_id")
            tokens = input_ids == (-1 if token is None else token)
            if not torch.equal(tokens, slots >= 0):
                found, filled = int(tokens.sum()), int((slots >= 0).sum())
                raise ValueError(
                    f"The prompt has {found} {kind} slot tokens but {filled} {kind} slots to fill: "
                    "build the batch with the processor saved beside this model."
                )
        return (item_slots >= 0) | (user_slots >= 0)

    def forward(
        self,
        input_ids: Tensor,
        item_slots: Tensor,
        user_slots: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        block_ids: Tensor,
        history_depths: Tensor,
        new_title_ids: Tensor | None = None,
        new_title_lengths: Tensor | None = None,
        new_field_values: Tensor | None = None,
        new_field_weights: Tensor | None = None,
        cache: Cache | None = None,
    ) -> BaseModelOutput:
        """Hidden states `(1, new tokens, hidden_size)` of a row made by the processor.

        Args:
            input_ids, item_slots, user_slots: `(1, new tokens)`.
            position_ids, sequence_ids, block_ids, history_depths: `(1, cached + new tokens)`.
            new_title_ids, new_title_lengths: titles of items past the catalog.
            new_field_values, new_field_weights: their fields, see `CFTable.lookup`.
            cache: keys and values of the row's leading tokens; the new tokens are added to it.
        """
        cached = 0 if cache is None else cache.get_seq_length()
        if input_ids.shape != (1, position_ids.shape[1] - cached):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, not one row of "
                f"{position_ids.shape[1]} - {cached} cached tokens: build it with the processor."
            )
        slots = self.check_slots(input_ids, item_slots, user_slots)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        titles = pair(new_title_ids, new_title_lengths)
        fields = pair(new_field_values, new_field_weights)
        embeddings = self.fill_slots(embeddings, item_slots, user_slots, titles, fields)
        layout = Layout(sequence_ids[0], block_ids[0], history_depths[0], position_ids[0])
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids[:, cached:],
            use_cache=cache is not None,
            **cache_input(self.language_model, cache),
            **attention_inputs(self.language_model.config, layout, cached, embeddings.dtype),
        )
        return BaseModelOutput(last_hidden_state=outputs.last_hidden_state)


def cache_input(backbone: PreTrainedModel, cache: Cache | None) -> dict[str, Cache]:
    """The cache under the backbone's name for it, which transformers 5.24 changed."""
    if cache is None:
        return {}
    takes = inspect.signature(type(backbone).forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}


def pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Two tensors of which a batch has both or neither."""
    return None if first is None or second is None else (first, second)


@dataclass
class CTROutput(ModelOutput):
    """`loss` scalar (with labels) and `logits` `(batch, num_candidates)`; padded ones are 0."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class CCFLLMForCTR(CheckpointMixin, CCFLLMPreTrainedModel):
    """Will the user like the candidate? `logit = scale * h_last . (w_Yes - w_No)`, by BCE.

    Only these two rows of the language-model head are kept and multiplied. The learned scale
    starts at 0.1 (our choice): what a fresh fusion makes the backbone say is noise with a standard
    deviation of about 2, which would drown the CF logit and the first thousands of labels.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__(config)
        self.model = CCFLLMModel(config)
        self.answer_weight = nn.Parameter(torch.zeros(2, config.text_config.hidden_size))
        self.answer_scale = nn.Parameter(torch.ones(()))
        self.cf_logit_scale = nn.Parameter(torch.ones(()))
        self.post_init()

    @property
    def cf(self) -> CFTable:
        """The CF model's vectors."""
        return self.model.cf

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: two rows of the head are all there is."""

    def forward(
        self,
        input_ids: Tensor,
        item_slots: Tensor,
        user_slots: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        block_ids: Tensor,
        history_depths: Tensor,
        answer_positions: Tensor,
        candidate_items: Tensor,
        candidate_mask: Tensor,
        candidate_users: Tensor,
        history_items: Tensor | None = None,
        history_targets: Tensor | None = None,
        history_unshown: Tensor | None = None,
        new_title_ids: Tensor | None = None,
        new_title_lengths: Tensor | None = None,
        new_field_values: Tensor | None = None,
        new_field_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
    ) -> CTROutput | tuple[Tensor, ...]:
        """Score the candidates of a batch made by [`CCFLLMProcessor`].

        Args:
            input_ids, item_slots, user_slots: `(1, new tokens)`.
            position_ids, sequence_ids, block_ids, history_depths: `(1, cached + new tokens)`.
            answer_positions: `(batch, num_candidates)`, the new token that each answer is read at.
            candidate_items: `(batch, num_candidates)` CF table rows, for the CF model's own logits.
            candidate_mask: `(batch, num_candidates)` bool, False where padded.
            candidate_users: `(batch,)` CF table rows.
            history_items, history_targets: `(num_sequences, longest)`, the signed histories, for
                `cf_fold_in`; -1 where padded.
            history_unshown: `(num_sequences,)`, how many of these come before the prompt's.
            new_title_ids, new_title_lengths: titles of items past the catalog.
            new_field_values, new_field_weights: their fields, see `CFTable.lookup`.
            labels: `(batch, num_candidates)` 0/1, -100 where padded.
            num_items_in_batch: labels of the whole optimizer step; the loss is then the sum over
                this batch divided by it, else the mean.
            cache: keys and values of the row's leading tokens.
        """
        hidden = self.model(
            input_ids=input_ids,
            item_slots=item_slots,
            user_slots=user_slots,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            block_ids=block_ids,
            history_depths=history_depths,
            new_title_ids=new_title_ids,
            new_title_lengths=new_title_lengths,
            new_field_values=new_field_values,
            new_field_weights=new_field_weights,
            cache=cache,
        ).last_hidden_state
        answers = hidden[0][answer_positions].float()  # (batch, num_candidates, hidden_size)
        yes, no = self.answer_weight.float()
        logits = self.answer_scale * (answers @ (yes - no))
        if self.config.cf_logit:
            logits = logits + self.cf_logit_scale * self.cf_logits(
                candidate_users,
                candidate_items,
                answer_positions,
                sequence_ids[:, -input_ids.shape[1] :],
                history_depths[:, -input_ids.shape[1] :],
                history_items,
                history_targets,
                history_unshown,
                new_field_values,
                new_field_weights,
            )
        logits = logits.masked_fill(~candidate_mask, 0.0)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        output = CTROutput(loss=loss, logits=logits)
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def cf_logits(
        self,
        candidate_users: Tensor,
        candidate_items: Tensor,
        answer_positions: Tensor,
        sequence_ids: Tensor,
        history_depths: Tensor,
        history_items: Tensor | None = None,
        history_targets: Tensor | None = None,
        history_unshown: Tensor | None = None,
        new_field_values: Tensor | None = None,
        new_field_weights: Tensor | None = None,
    ) -> Tensor:
        """The CF model's own logits `(batch, num_candidates)`; with `cf_fold_in` those of users
        folded in from the history that each candidate sees.

        Arguments as in `forward`, but `sequence_ids` and `history_depths` of the new tokens alone.
        """
        new = pair(new_field_values, new_field_weights)
        if not self.config.cf_fold_in:
            users = candidate_users[:, None].expand_as(candidate_items)
            return self.cf.logits(users, candidate_items, new)
        if history_items is None or history_targets is None or history_unshown is None:
            raise ValueError(
                "This model folds users in from signed histories: build the batch with a processor "
                'of histories="signed".'
            )
        sequences = sequence_ids[0][answer_positions]  # (batch, num_candidates)
        depths = history_depths[0][answer_positions]
        asked = torch.stack([sequences.flatten(), depths.flatten()])
        (sequence, depth), place = torch.unique(asked, dim=1, return_inverse=True)
        folded = self.cf.folded_users(
            history_items[sequence],
            history_targets[sequence],
            history_unshown[sequence] + depth,
            new,
        )
        # Each candidate with the user that it sees: (batch * num_candidates, 1).
        logits = self.cf.folded_logits(folded.at(place), candidate_items.flatten()[:, None], new)
        return logits.view(candidate_items.shape)

    @torch.no_grad()
    def text_vectors(self, items: Tensor, new_titles: NewTitles | None = None) -> Tensor:
        """What items `(n,)` say: `(n, text_dim)` float32, of static text `(n, hidden_size)`; alike
        as their cosine.

        Args:
            items: catalog rows; rows past the catalog count on through `new_titles`.
            new_titles: as in `item_gates`.
        """
        return self.model.text_vectors(items, new_titles).float()

    @torch.no_grad()
    def item_gates(
        self,
        items: Tensor,
        new_titles: NewTitles | None = None,
        new_fields: NewFields | None = None,
    ) -> Tensor:
        """Share taken from text per dimension, `(n,)` -> `(n, hidden_size)`.

        It depends on the item alone. Fusions without a gate give their constant, see `SHARES`.

        Args:
            items: catalog rows; rows past the catalog count on through `new_titles`.
            new_titles: token ids of new items' titles, flat, and their lengths (the processor's
                `new_title_ids` and `new_title_lengths`).
            new_fields: their fields, see `CFTable.lookup` (`new_field_values` and
                `new_field_weights`).
        """
        width = self.config.text_config.hidden_size
        if self.model.gate is None:
            share = SHARES[self.config.fusion]
            return torch.full((len(items), width), share, device=items.device)
        text = self.model.item_words(items, new_titles)
        gate = self.model.gate(text, *self.model.aligned_items(items, new_fields))
        return gate.expand(-1, width)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities: `sigmoid(logits / logit_temperature)`."""
        return torch.sigmoid(logits / self.config.logit_temperature)


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Binary cross-entropy of `(batch, num_candidates)` logits with labels in [0, 1].

    Args:
        logits: float.
        labels: 0/1, -100 where padded; probabilities between, where training distills a teacher.
        num_items: the loss is the sum divided by it, for accumulated gradients; None: the mean.
    """
    valid = labels != IGNORED_LABEL
    wanted = labels[valid].to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits[valid], wanted, reduction="sum")
    return total / (valid.sum().clamp(min=1) if num_items is None else num_items)


CCFLLMConfig.register_for_auto_class()
CCFLLMForCTR.register_for_auto_class("AutoModel")

__all__ = ["CCFLLMForCTR", "CCFLLMModel"]

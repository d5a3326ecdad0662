"""CCF-LLM (Liu, Zhang, Dong, Fang, CIKM 2024) as transformers models, top to bottom.

    c' = ALG(c)                       a CF vector mapped into the backbone's embedding space
    s  = mean input embedding of the item's title tokens
    g  = sigmoid(W [s ; c'] + b)      one weight per dimension
    e  = g * s + (1 - g) * c'         the embedding of an item slot

The authors published no code. Shapes of ALG and gate, the rescaling of the gate's inputs, the cold
vectors and the user slot are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .cf_table_ccf_llm import CFTable
from .checkpoint_ccf_llm import Adapter
from .configuration_ccf_llm import CCFLLMConfig
from .layout_ccf_llm import Layout
from .loading_ccf_llm import CheckpointMixin
from .loss_ccf_llm import ctr_loss
from .tiles_ccf_llm import attention_inputs, use_tiles


def unit_rms(x: Tensor) -> Tensor:
    """Rescale the last dimension to unit root mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


class AlignmentNetwork(nn.Module):
    """ALG: maps a CF vector `(n, cf_dim)` to the backbone's space `(n, hidden_size)`.

    Linear - GELU - Linear (our choice), at the scale of the backbone's token embeddings.
    """

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        hidden = config.cf_dim * config.alignment_multiplier
        self.up = nn.Linear(config.cf_dim, hidden)
        self.out = nn.Linear(hidden, config.text_config.hidden_size)
        self.scale = config.slot_scale

    def forward(self, cf: Tensor) -> Tensor:
        return self.scale * self.out(F.gelu(self.up(cf)))


class FusionGate(nn.Module):
    """GATE: how much of each dimension comes from text, in (0, 1).

    `(n, hidden_size)` for the paper's dimension-wise gate, `(n, 1)` for the scalar ablation. Both
    inputs are rescaled to unit RMS first (our choice), so that neither modality wins by its scale.
    """

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear = nn.Linear(2 * width, 1 if config.fusion == "scalar_gate" else width)

    def forward(self, text: Tensor, aligned: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(torch.cat([unit_rms(text), unit_rms(aligned)], dim=-1)))


class CCFLLMPreTrainedModel(PreTrainedModel):
    config_class = CCFLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []  # noqa: RUF012
    # Tables and scales, but no flag or time: the option would cast those to float too.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        *("user_vectors", "item_vectors", "default_user", "default_item"),
        *("offset", "user_scale", "item_scale"),
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AlignmentNetwork):
            for linear in (module.up, module.out):
                init.normal_(linear.weight, std=linear.in_features**-0.5)
                init.zeros_(linear.bias)
        elif isinstance(module, FusionGate):
            init.normal_(module.linear.weight, std=0.1 * module.linear.in_features**-0.5)
            init.zeros_(module.linear.bias)
        elif isinstance(module, CFTable):
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name.endswith("_scale") else init.zeros_)(buffer)
        elif isinstance(module, CCFLLMModel):
            init.normal_(module.cold_item, std=0.02)
            init.normal_(module.cold_user, std=0.02)
            init.zeros_(module.title_ids)
            init.zeros_(module.title_lengths)
        elif isinstance(module, CCFLLMForCTR):
            init.zeros_(module.answer_weight)
            init.ones_(module.cf_logit_scale)
            init.constant_(module.answer_scale, 0.1)


class CCFLLMModel(CCFLLMPreTrainedModel):
    """The backbone, reading hybrid prompts whose slots are filled by text and CF together."""

    language_model: Any
    title_ids: Tensor
    title_lengths: Tensor

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.language_model = (
            AutoModel.from_config(config.text_config) if config.checkpoint_form == "full" else None
        )
        if self.language_model is not None:
            use_tiles(self.language_model)
        self.cf = CFTable(config)
        self.item_alignment = AlignmentNetwork(config)
        self.user_alignment = AlignmentNetwork(config)
        self.gate = FusionGate(config) if config.fusion in ("gate", "scalar_gate") else None
        self.cold_item = nn.Parameter(torch.zeros(width))
        self.cold_user = nn.Parameter(torch.zeros(width))
        self.register_buffer("title_ids", torch.zeros(config.num_title_tokens, dtype=torch.int32))
        self.register_buffer("title_lengths", torch.zeros(config.num_items, dtype=torch.int32))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def text_embeddings(self, items: Tensor, new_titles: tuple[Tensor, Tensor] | None) -> Tensor:
        """s: mean input embedding of each item's title, `(n,)` -> `(n, hidden_size)`.

        Computed from the live embedding table, so it can never be stale. Rows past the catalog are
        taken from `new_titles`; an item without a title gives zeros.
        """
        ids, lengths = self.title_ids.long(), self.title_lengths.long()
        if new_titles is not None:
            ids, lengths = torch.cat([ids, new_titles[0]]), torch.cat([lengths, new_titles[1]])
        starts = lengths.cumsum(0) - lengths
        counts = lengths[items]
        owner = torch.repeat_interleave(torch.arange(len(items), device=items.device), counts)
        within = torch.arange(len(owner), device=items.device) - (counts.cumsum(0) - counts)[owner]
        words = self.get_input_embeddings()(ids[starts[items][owner] + within])
        total = words.new_zeros(len(items), words.shape[-1]).index_add(0, owner, words)
        return total / counts.clamp(min=1).unsqueeze(-1).to(total.dtype)

    def aligned_items(self, items: Tensor, snapshots: Tensor) -> Tensor:
        """c': aligned CF vectors of items, the cold-item vector where there is none."""
        vectors, known = self.cf.scaled("item", items, snapshots)
        known = self.some_dropped(known)
        cold = self.config.slot_scale * self.cold_item
        return torch.where(known.unsqueeze(-1), self.item_alignment(vectors.to(cold.dtype)), cold)

    def user_slots_embeddings(self, users: Tensor, snapshots: Tensor) -> Tensor:
        """A user slot is the aligned CF vector alone: users have no text (our choice)."""
        vectors, known = self.cf.scaled("user", users, snapshots)
        known = self.some_dropped(known)
        cold = self.config.slot_scale * self.cold_user
        return torch.where(known.unsqueeze(-1), self.user_alignment(vectors.to(cold.dtype)), cold)

    def some_dropped(self, known: Tensor) -> Tensor:
        """In training with `slot_dropout`, a random share of the known is taken for unknown."""
        if not (self.training and self.config.slot_dropout):
            return known
        return known & (torch.rand(known.shape, device=known.device) >= self.config.slot_dropout)

    def fuse(self, text: Tensor, aligned: Tensor) -> Tensor:
        """e: the embedding of an item slot, from s and c', both `(n, hidden_size)`."""
        if self.config.fusion in ("concat", "cf_only"):
            return aligned
        if self.config.fusion == "sum":
            return text + aligned
        assert self.gate is not None  # text_only has no slots to fuse
        gate = self.gate(text, aligned)
        return gate * text + (1 - gate) * aligned

    def fill_slots(
        self,
        embeddings: Tensor,
        item_slots: Tensor,
        user_slots: Tensor,
        snapshots: Tensor,
        new_titles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Put fused vectors where the prompt has slots; `(1, length, hidden_size)`.

        `snapshots` holds each token's CF snapshot. An item is fused once for all its slots.
        """
        row, column = (item_slots >= 0).nonzero(as_tuple=True)
        if len(row):
            asked = torch.stack([item_slots[row, column], snapshots[row, column]])
            pairs, place = torch.unique(asked, dim=1, return_inverse=True)
            text = self.text_embeddings(pairs[0], new_titles).to(self.cold_item.dtype)
            fused = self.fuse(text, self.aligned_items(pairs[0], pairs[1]))
            embeddings = embeddings.index_put((row, column), fused[place].to(embeddings.dtype))
        row, column = (user_slots >= 0).nonzero(as_tuple=True)
        if len(row):
            users = self.user_slots_embeddings(user_slots[row, column], snapshots[row, column])
            embeddings = embeddings.index_put((row, column), users.to(embeddings.dtype))
        return embeddings

    def check_slots(self, input_ids: Tensor, item_slots: Tensor, user_slots: Tensor) -> Tensor:
        """Where slots stand; raises when tokens and slots disagree or the arm has no slots."""
        for kind, slots in (("item", item_slots), ("user", user_slots)):
            token = getattr(self.config, f"{kind}_slot_token_id")
            tokens = input_ids == (-1 if token is None else token)
            if not torch.equal(tokens, slots >= 0):
                found, filled = int(tokens.sum()), int((slots >= 0).sum())
                raise ValueError(
                    f"The prompt has {found} {kind} slot tokens but {filled} {kind} slots to fill: "
                    "build the batch with the processor saved beside this model."
                )
        slots = (item_slots >= 0) | (user_slots >= 0)
        if self.config.fusion == "text_only" and bool(slots.any()):
            raise ValueError(
                "This model is text_only but the prompt has slots: "
                "use formats 'title' in the processor."
            )
        return slots

    def forward(
        self,
        input_ids: Tensor,
        item_slots: Tensor,
        user_slots: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        block_ids: Tensor,
        history_depths: Tensor,
        snapshots: Tensor | None = None,
        new_title_ids: Tensor | None = None,
        new_title_lengths: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states `(1, new tokens, hidden_size)` of a row made by the processor.

        Args:
            input_ids, item_slots, user_slots: `(1, new tokens)`.
            position_ids, sequence_ids, block_ids, history_depths: `(1, cached + new tokens)`.
            snapshots: `(num_sequences,)`; default the last for all.
            new_title_ids, new_title_lengths: titles of items past the catalog.
            past_key_values: cache of the row's leading tokens; the new tokens are added to it.
        """
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if input_ids.shape != (1, position_ids.shape[1] - cached):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, not one row of "
                f"{position_ids.shape[1]} - {cached} cached tokens: build it with the processor."
            )
        slots = self.check_slots(input_ids, item_slots, user_slots)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        new = None
        if new_title_ids is not None:
            assert new_title_lengths is not None  # the processor writes both or neither
            new = (new_title_ids, new_title_lengths)
        when = self.token_snapshots(sequence_ids[:, cached:], snapshots)
        embeddings = self.fill_slots(embeddings, item_slots, user_slots, when, new)
        layout = Layout(sequence_ids[0], block_ids[0], history_depths[0], position_ids[0])
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids[:, cached:],
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **attention_inputs(self.language_model.config, layout, cached, embeddings.dtype),
            **kwargs,
        )
        return BaseModelOutput(last_hidden_state=outputs.last_hidden_state)

    def token_snapshots(self, sequence_ids: Tensor, snapshots: Tensor | None) -> Tensor:
        """CF snapshot of every token, from those of the sequences, `(num_sequences,)`."""
        last = self.cf.offset.shape[0] - 1
        if snapshots is None:
            return torch.full_like(sequence_ids, last)
        return snapshots[sequence_ids] % (last + 1)


@dataclass
class CTROutput(ModelOutput):
    """`loss` scalar (with labels) and `logits` `(batch, num_candidates)`; padded ones are 0."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class CCFLLMForCTR(CheckpointMixin, CCFLLMPreTrainedModel):
    """Will the user like the candidate? `logit = scale * h_last . (w_Yes - w_No)`, by BCE.

    Only these two rows of the language-model head are kept and multiplied. The learned scale
    starts at 0.1 (our choice): what a fresh fusion makes the backbone say is noise with a standard
    deviation of about 2, which would drown the CF residual and the first thousands of labels.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CCFLLMConfig) -> None:
        super().__init__(config)
        self.model = CCFLLMModel(config)
        self.answer_weight = nn.Parameter(torch.zeros(2, config.text_config.hidden_size))
        self.answer_scale = nn.Parameter(torch.ones(()))
        self.cf_logit_scale = nn.Parameter(torch.ones(()))
        self._adapter: Adapter = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: two rows of the head are all there is."""

    def forward(
        self,
        answer_positions: Tensor,
        candidate_items: Tensor,
        candidate_mask: Tensor,
        candidate_users: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        history_items: Tensor | None = None,
        history_targets: Tensor | None = None,
        history_unshown: Tensor | None = None,
        **inputs: Any,
    ) -> CTROutput | tuple[Tensor, ...]:
        """Score the candidates of a batch made by [`CCFLLMProcessor`].

        Args:
            answer_positions: `(batch, num_candidates)`, the new token that each answer is read at.
            candidate_items, candidate_users: CF table rows, for the CF model's own logits.
            candidate_mask: `(batch, num_candidates)` bool, False where padded.
            labels: `(batch, num_candidates)` 0/1, -100 where padded.
            num_items_in_batch: labels of the whole optimizer step; the loss is then the sum over
                this batch divided by it, else the mean.
            history_items, history_targets: `(num_sequences, longest)`, the signed histories, for
                `cf_fold_in`; -1 where padded.
            history_unshown: `(num_sequences,)`, how many of these come before the prompt's.
        """
        hidden = self.model(**inputs).last_hidden_state[0][answer_positions].float()
        answers = self.answer_weight.float()
        direction = answers[0] if self.config.score_head == "yes_only" else answers[0] - answers[1]
        logits = self.answer_scale * (hidden @ direction)
        targets, taught = labels, self.config.cf_target_share if self.training else 0.0
        if self.config.cf_logit or taught:
            pairs = (candidate_users, candidate_items)
            history = (history_items, history_targets, history_unshown)
            cf_logits = self.cf_logits(answer_positions, pairs, history, inputs)
            if self.config.cf_logit:
                logits = logits + self.cf_logit_scale * cf_logits
            if taught and labels is not None:
                targets = torch.lerp(labels.float(), torch.sigmoid(cf_logits.float()), taught)
        logits = logits.masked_fill(~candidate_mask, 0.0)
        loss = None
        if labels is not None:
            pairwise = self.config.pairwise_share
            loss = ctr_loss(logits, labels, num_items_in_batch, pairwise, targets)
        output = CTROutput(loss=loss, logits=logits)
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def cf_logits(
        self,
        answer_positions: Tensor,
        pairs: tuple[Tensor, Tensor],
        history: tuple[Tensor | None, Tensor | None, Tensor | None],
        inputs: dict[str, Any],
    ) -> Tensor:
        """The CF model's own logits `(batch, num_candidates)`, each by its candidate's snapshot;
        with `cf_fold_in` of users folded in from the history that the candidate sees."""
        users, items = pairs
        new = inputs["input_ids"].shape[1]
        sequences = inputs["sequence_ids"][0, -new:][answer_positions]
        when = self.model.token_snapshots(sequences, inputs.get("snapshots"))
        if not self.config.cf_fold_in:
            return self.model.cf.logits(users[:, None].expand_as(items), items, when)
        depths = inputs["history_depths"][0, -new:][answer_positions]
        folded = self.folded_users(sequences, depths, when, *history)
        return self.model.cf.folded_logits(folded, items, when)

    def folded_users(
        self,
        sequences: Tensor,
        depths: Tensor,
        when: Tensor,
        history_items: Tensor | None,
        history_targets: Tensor | None,
        history_unshown: Tensor | None,
    ) -> Tensor:
        """User vectors `(batch, num_candidates, cf_dim)` by the histories that candidates see."""
        if history_items is None or history_targets is None or history_unshown is None:
            raise ValueError(
                "This model folds users in from signed histories: build the batch with a processor "
                'of histories="signed".'
            )
        asked = torch.stack([sequences.flatten(), depths.flatten(), when.flatten()])
        (sequence, depth, snapshot), place = torch.unique(asked, dim=1, return_inverse=True)
        users = self.model.cf.folded_users(
            history_items[sequence],
            history_targets[sequence],
            history_unshown[sequence] + depth,
            snapshot,
        )
        return users[place].view(*sequences.shape, -1)

    @torch.no_grad()
    def item_gates(
        self, items: Tensor, snapshot: int = -1, new_titles: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Share taken from text per dimension, `(n,)` -> `(n, hidden_size)`.

        It depends on the item alone. Arms without a gate give their constant: 1 text only, 0 CF
        only, 0.5 sum.

        Args:
            items: catalog rows; rows past the catalog count on through `new_titles`.
            snapshot: CF snapshot; default the last.
            new_titles: token ids of new items' titles, flat, and their lengths (the processor's
                `new_title_ids` and `new_title_lengths`).
        """
        fusion, width = self.config.fusion, self.config.text_config.hidden_size
        if self.model.gate is None:
            share = {"text_only": 1.0, "sum": 0.5}.get(fusion, 0.0)
            return torch.full((len(items), width), share, device=items.device)
        snapshots = torch.full_like(items, snapshot) % self.model.cf.offset.shape[0]
        text = self.model.text_embeddings(items, new_titles).to(self.model.cold_item.dtype)
        gate = self.model.gate(text, self.model.aligned_items(items, snapshots))
        return gate.expand(-1, width)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities: `sigmoid(logits / logit_temperature)`."""
        return torch.sigmoid(logits / self.config.logit_temperature)


CCFLLMConfig.register_for_auto_class()
CCFLLMForCTR.register_for_auto_class("AutoModel")

__all__ = ["CCFLLMForCTR", "CCFLLMModel"]

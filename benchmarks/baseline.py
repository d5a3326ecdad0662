"""What a competent user of transformers would write: one row a sample, padded batches.

The same hybrid content, fusion, backbone and trainable parameters as the package, without its row
layout and attention. `FAIR` sorts rows by length, pads each batch to its own longest row and keeps
the vocabulary's logits at the last position only; `COLLM` pads every row to the longest of the data
set and multiplies the whole vocabulary at every position, as CoLLM's published code does. Both use
sdpa, `inputs_embeds` and no gradient for frozen weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.training.cross_fit import encode_rows


@dataclass
class Sample:
    """One row: token ids with the items and users in their slots (-1 elsewhere), and its label."""

    ids: list[int]
    items: list[int]
    users: list[int]
    fit: int
    label: int


@dataclass
class Way:
    """How rows become batches. `tokens` is the padded size of a batch."""

    name: str
    sort: bool
    pad_to_longest_of_all: bool
    all_logits: bool
    tokens: int = 1024


FAIR = Way("fair baseline", sort=True, pad_to_longest_of_all=False, all_logits=False)
COLLM = Way("CoLLM's way", sort=False, pad_to_longest_of_all=True, all_logits=True)


def write_samples(processor: Any, groups: Sequence[Group]) -> list[Sample]:
    """Every sample of the groups as a row by itself, with only the history it may see."""
    samples = []
    for group in groups:
        for item, length, label in zip(
            group.candidates, group.history_lengths, group.labels, strict=True
        ):
            row = processor(user=group.user, history=group.history[:length], candidates=[item])
            columns = (row[name][0].tolist() for name in ("input_ids", "item_slots", "user_slots"))
            samples.append(Sample(*columns, fit=group.fit, label=label))
    return samples


class Baseline:
    """A plain causal language model behind the fusion of a `CCFLLMForCTR`.

    Args:
        model: gives the fusion modules and the answers' token ids.
        backbone: folder of the causal language model, the same weights as `model`'s.
        lora: settings of `peft.LoraConfig`, or None.
    """

    def __init__(self, model: Any, backbone: str, lora: dict[str, Any] | None = None) -> None:
        self.model = model
        self.causal = AutoModelForCausalLM.from_pretrained(
            backbone, dtype=torch.float32, attn_implementation="sdpa"
        ).requires_grad_(False)
        self.dtype = torch.float32
        if lora:
            peft.inject_adapter_in_model(peft.LoraConfig(**lora), self.causal)

    def freeze_in_bf16(self) -> None:
        """Round the decoder layers' frozen weights, as `training.stage.freeze_in_bf16` does."""
        self.dtype = torch.bfloat16
        for name, parameter in self.causal.get_decoder().layers.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(self.dtype)

    def batches(self, samples: Sequence[Sample], way: Way) -> Iterator[list[Sample]]:
        """Cut rows into batches of at most `way.tokens` padded tokens."""
        rows = sorted(samples, key=lambda s: -len(s.ids)) if way.sort else list(samples)
        longest = max(len(sample.ids) for sample in samples)
        batch: list[Sample] = []
        for sample in rows:
            width = longest if way.pad_to_longest_of_all else len((batch or [sample])[0].ids)
            if batch and width * (len(batch) + 1) > way.tokens:
                yield batch
                batch = []
            batch.append(sample)
        yield batch

    def logits(self, batch: Sequence[Sample], way: Way, longest: int) -> Tensor:
        """The model's logit of each row, with the CF model's own where `model` adds it; rows are
        padded on the left."""
        length = longest if way.pad_to_longest_of_all else max(len(s.ids) for s in batch)

        def padded(name: str, filler: int) -> Tensor:
            rows = (getattr(sample, name) for sample in batch)
            return torch.tensor([[filler] * (length - len(row)) + row for row in rows])

        items, users = padded("items", -1), padded("users", -1)
        ids = padded("ids", 0).masked_fill((items >= 0) | (users >= 0), 0)
        mask = torch.tensor([[0] * (length - len(s.ids)) + [1] * len(s.ids) for s in batch])
        fits = torch.tensor([[sample.fit + 1] for sample in batch])
        items = torch.where(items >= 0, encode_rows(items, fits), items)
        users = torch.where(users >= 0, encode_rows(users, fits), users)
        fusion = self.model.model
        embeddings = self.causal.get_input_embeddings()(ids)
        embeddings = fusion.fill_slots(embeddings, items, users, None)
        hidden = self.causal.get_decoder()(
            inputs_embeds=embeddings.to(self.dtype),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        head = self.causal.get_output_embeddings()
        vocabulary = head((hidden if way.all_logits else hidden[:, -1:]).to(head.weight.dtype))
        last = vocabulary[:, -1]
        config = self.model.config
        logits = last[:, config.yes_token_id] - last[:, config.no_token_id]
        logits = self.model.answer_scale * logits
        if config.cf_logit:
            if ((items >= 0).sum(1) != 1).any():
                raise ValueError("the CF logit needs prompts whose only item slot is the candidate")
            own = fusion.cf.logits(users.amax(1), items.amax(1))
            logits = logits + self.model.cf_logit_scale * own
        return logits

    def train_pass(self, samples: Sequence[Sample], way: Way) -> None:
        """Forward and backward over all rows."""
        longest = max(len(sample.ids) for sample in samples)
        for batch in self.batches(samples, way):
            logits = self.logits(batch, way, longest)
            labels = torch.tensor([float(sample.label) for sample in batch])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, labels, reduction="sum"
            )
            (loss / len(samples)).backward()

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample], way: Way) -> Tensor:
        """Logits of all rows, in order."""
        longest = max(len(sample.ids) for sample in samples)
        places = {id(sample): place for place, sample in enumerate(samples)}
        scores = torch.empty(len(samples))
        for batch in self.batches(samples, way):
            scores[[places[id(s)] for s in batch]] = self.logits(batch, way, longest)
        return scores

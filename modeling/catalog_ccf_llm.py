"""The catalog of a model: titles and CF tables, which another catalog can take the place of."""

from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_ccf_llm import CCFLLMConfig, ids_fingerprint

logger = logging.get_logger(__name__)


class CatalogMixin(PreTrainedModel):
    """The part of [`CCFLLMForCTR`] that deals with which items and users it knows."""

    config_class: type[CCFLLMConfig]
    model: Any

    def set_titles(self, titles: list[list[int]]) -> None:
        """Take the title tokens of every catalog item, in table order."""
        values = {
            "title_ids": [token for title in titles for token in title],
            "title_lengths": [len(title) for title in titles],
        }
        for name, value in values.items():
            old = getattr(self.model, name)
            setattr(self.model, name, torch.tensor(value, dtype=old.dtype, device=old.device))

    def replace_catalog(self, processor: Any, cf: Any = None) -> Self:
        """Put another catalog of items and users under the trained weights, in place.

        Backbone, LoRA, gate, cold vectors and score stay. So do the alignment networks, when the
        new CF vectors are as wide as the old ones; else they start afresh and must be trained. A
        log line says which. The calibration (`config.logit_temperature`) is that of the old data.

        Args:
            processor: over the new catalog: `old_processor.with_catalog(item_ids, ...)`.
            cf: a `CFVectors` of the same ids (all snapshots are kept); None: no CF vectors, so
                that every user and item is read as cold, an item by its title.

        Returns:
            This model.

        Raises:
            ValueError: `cf` has other ids than `processor`, or the processor another tokenizer.
        """
        self._check_new_catalog(processor, cf)
        config, old_dim = self.config, self.config.cf_dim
        titles = processor.item_title_ids()
        without_cf = {
            "num_users": len(processor.user_ids),
            "num_items": len(processor.item_ids),
            "num_snapshots": 1,
            "cf_model": "",
            "ids_fingerprint": processor.ids_fingerprint,
            "cf_user_precision": None,
        }
        config.update(without_cf if cf is None else cf_settings(cf))
        config.num_title_tokens = sum(map(len, titles))
        self.set_titles(titles)
        self.model.cf = type(self.model.cf)(config).to(self.device)
        if cf is not None:
            self.model.cf.fill(cf)
        if config.cf_dim != old_dim:
            self._restart_alignment()
            logger.warning(
                "The alignment networks start afresh, because the new CF vectors have %d "
                "dimensions instead of %d: train them.",
                config.cf_dim,
                old_dim,
            )
        elif cf is not None:
            logger.warning(
                "The alignment networks are kept, because the new CF vectors have %d dimensions "
                "too: train them, unless the new vectors continue the old ones.",
                old_dim,
            )
        return self

    def _check_new_catalog(self, processor: Any, cf: Any) -> None:
        fingerprint = processor.ids_fingerprint
        if cf is not None and ids_fingerprint(cf.user_ids, cf.item_ids) != fingerprint:
            raise ValueError(
                "cf and processor name other users or items, or in another order: make the "
                "processor by with_catalog(cf.item_ids, cf.item_titles, cf.user_ids)."
            )
        if self.config.cf_fold_in and (cf is None or cf.user_precision is None):
            raise ValueError(
                "This model folds users in, and the new CF vectors come without the prior that it "
                "takes (user_precision): fit them by `fit-cf mf`."
            )
        for kind in ("item_slot_token_id", "user_slot_token_id"):
            ours, given = getattr(self.config, kind), getattr(processor, kind)
            if ours not in (None, given):
                raise ValueError(
                    f"{kind} is {ours} in the model but {given} in the processor: make it from "
                    "the model's own processor by with_catalog."
                )

    def _restart_alignment(self) -> None:
        for side in ("item", "user"):
            old = getattr(self.model, f"{side}_alignment")
            fresh = type(old)(self.config)
            self._init_weights(fresh)
            setattr(self.model, f"{side}_alignment", fresh.to(old.out.weight))


def cf_settings(cf: Any) -> dict[str, Any]:
    """The part of a configuration that a `CFVectors` decides."""
    return {
        "num_users": len(cf.user_ids),
        "num_items": len(cf.item_ids),
        "num_snapshots": cf.item_vectors.shape[0],
        "cf_dim": cf.item_vectors.shape[2],
        "cf_model": cf.model_name,
        "ids_fingerprint": ids_fingerprint(cf.user_ids, cf.item_ids),
        "cf_user_precision": cf.user_precision,
    }


__all__ = ["CatalogMixin", "cf_settings"]

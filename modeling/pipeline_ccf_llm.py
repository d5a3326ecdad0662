"""`pipeline("ctr-ranking")`: users, histories and candidates in, ranked lists out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import Pipeline

from .configuration_ccf_llm import CUSTOM_PIPELINES, TASK, read_id
from .modeling_ccf_llm import CCFLLMForCTR
from .processing_ccf_llm import CCFLLMProcessor, Request, read_items
from .ranking_ccf_llm import PREFIX_BYTES, PrefixCache, RankedItem, check_counts, explain, rank
from .ranking_ccf_llm import preselect as choose

INPUT_KEYS = ("user", "history", "candidates", "top_k")
Checked = tuple[Request, int]  # a checked input and the length of its list


class CTRRankingPipeline(Pipeline):
    """Ranks candidates for users by the probability that they will like them.

        ranker = pipeline("ctr-ranking", model=repo, trust_remote_code=True)
        ranker({"user": "42", "history": ["Heat (1995)"], "candidates": ["Alien (1979)", "Se7en"]})

    A call takes one dict, or a list, data set or generator of dicts; `batch_size` of them share a
    forward pass. Keys:

    - `user`: raw id; without it, or with one that the model has not seen, the history alone speaks.
    - `history`: liked items, oldest first; a model of signed histories takes disliked ones too, as
      `{"id": ..., "liked": False}`.
    - `candidates`: items to rank, each a raw id, a title, or `{"id": ..., "title": ...}`; a title
      outside the catalog is a new item, whose dict may hold fields such as `author`. Default:
      `preselect` catalog items that are not in the history: of the highest CF scores for this user
      above an unknown one's, and of fields shared with what was liked.
    - `top_k`: length of the list.

    Each dict becomes a list of dicts, best first: `item_id` (None for a new item), `title`,
    `probability`, `logit`, `text_share` and `cf_share` (how much of the item's slot comes from its
    title and from its CF vector), `known` (whether the CF model has a vector of the item).

    Args (of the pipeline, and of every call):
        top_k: length of the lists whose input names none (default 10).
        preselect: catalog items to score where no candidates are given (default 100).
        max_per_topic: most items of a list that may share an author, say, that is, a value of one
            of the processor's `evidence_fields` (default: no limit).
    """

    model: CCFLLMForCTR
    processor: CCFLLMProcessor
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()
        self.prefixes = PrefixCache(PREFIX_BYTES)
        # While loading, transformers puts classes in here, which no config can be printed with.
        self.model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        preselect: int | None = None,
        max_per_topic: int | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"{TASK} has no parameter {min(unknown)!r}: use top_k, preselect, max_per_topic or "
                "batch_size."
            )
        given = {"top_k": top_k, "preselect": preselect}
        varied = {} if max_per_topic is None else {"max_per_topic": max_per_topic}
        check_counts(**varied)
        given = {name: value for name, value in given.items() if value is not None}
        return given | varied, varied, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers looks at the first of a list, and an empty one has none.
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, *args, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict[str, Any]]]:
        """Ranked lists, `batch_size` users a forward pass.

        The processor packs a whole batch; transformers' own way, to pad tensors that were made one
        input at a time, does not fit prompts whose tensors number rows and new titles.
        """
        requests = self._requests(inputs, preprocess_params)
        while batch := list(islice(requests, batch_size)):
            for ranked in self.forward(batch, **forward_params):
                yield self.postprocess(ranked, **postprocess_params)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> list[dict[str, Any]]:
        request = self.preprocess(inputs, **preprocess_params)
        (ranked,) = self.forward([request], **forward_params)
        return self.postprocess(ranked, **postprocess_params)

    def _requests(self, inputs: Any, preprocess_params: dict[str, Any]) -> Iterator[Checked]:
        sized = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
        several = (inputs[place] for place in range(len(inputs))) if sized else inputs
        for place, one in enumerate(several):
            try:
                request = self.preprocess(one, **preprocess_params)
            except ValueError as error:
                raise ValueError(f"input {place}: {error}") from error
            yield request

    def preprocess(  # type: ignore[override]
        self,
        input_: Any,
        top_k: int = 10,
        preselect: int = 100,
        max_per_topic: int | None = None,
    ) -> Checked:
        """Check one input and choose its candidates if it names none.

        Raises:
            ValueError: naming the key that is wrong, and the mend.
        """
        if not isinstance(input_, Mapping) or set(input_) - set(INPUT_KEYS):
            found = sorted(map(str, input_)) if isinstance(input_, Mapping) else type(input_)
            raise ValueError(
                f"{TASK} takes a dict with the keys {', '.join(INPUT_KEYS)}, or a list of such "
                f"dicts, not {found}."
            )
        user = read_id(input_.get("user"))
        wanted = input_.get("top_k")
        top_k = top_k if wanted is None else wanted
        check_counts(top_k=top_k, preselect=preselect)
        history = read_items(input_.get("history"), "history")
        candidates = input_.get("candidates")
        if candidates is None:
            count = int(preselect)
            candidates = choose(self.model, self.processor, user, history, count, max_per_topic)
        candidates = read_items(candidates, "candidates")
        if not candidates:
            raise ValueError("candidates is empty: give at least one item, or leave it out.")
        return Request(user, history, candidates), int(top_k)

    def _forward(  # type: ignore[override]
        self, input_tensors: list[Checked], max_per_topic: int | None = None
    ) -> list[list[RankedItem]]:
        """The ranked list of each input; they share forward passes as far as these hold them."""
        longest = max(top_k for _, top_k in input_tensors)
        requests = [request for request, _ in input_tensors]
        options: Any = {"max_per_topic": max_per_topic, "prefixes": self.prefixes}
        ranked = rank(self.model, self.processor, requests, longest, **options)
        return [items[:top_k] for items, (_, top_k) in zip(ranked, input_tensors, strict=True)]

    def postprocess(  # type: ignore[override]
        self, model_outputs: list[RankedItem]
    ) -> list[dict[str, Any]]:
        """One ranked list as dicts."""
        return [vars(item) for item in model_outputs]

    def explain(
        self, inputs: Mapping[str, Any], max_lines: int | None = None
    ) -> list[dict[str, Any]]:
        """Why the candidates of one input have their logits: a dict for each, in their order, with
        the fields of [`Reasons`]; `max_lines` as in `explain`.

        Raises:
            ValueError: as a call does.
        """
        request, _ = self.preprocess(inputs)
        reasons = explain(self.model, self.processor, request, max_lines=max_lines)
        return [asdict(one) for one in reasons]

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save the model and the processor: a checkpoint that this pipeline loads again."""
        self.model.save_pretrained(Path(save_directory), **kwargs)
        self.processor.save_pretrained(Path(save_directory))


__all__ = ["CTRRankingPipeline"]

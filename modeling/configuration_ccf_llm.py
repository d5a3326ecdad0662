"""Configuration of CCF-LLM, raw ids as text, and the fingerprint that ties a CF table to its
catalog."""

import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

FUSIONS = ("gate", "scalar_gate", "sum", "cf_only")
ITEM_TEXTS = ("contextual", "static")
CHECKPOINT_FORMS = ("full", "slim")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
TASK = "ctr-ranking"
CONVERT = "convert it by `python examples/convert_checkpoint.py OLD NEW` of ccf-llm-hf"
IGNORED_LABEL = -100  # of padded candidates, as everywhere in transformers
AUTO_MAP = {
    "AutoConfig": "configuration_ccf_llm.CCFLLMConfig",
    "AutoModel": "modeling_ccf_llm.CCFLLMForCTR",
    "AutoModelForSequenceClassification": "modeling_ccf_llm.CCFLLMForCTR",
    "AutoProcessor": "processing_ccf_llm.CCFLLMProcessor",
}
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_ccf_llm.CTRRankingPipeline", "pt": ["AutoModel"], "type": "text"}
}


WHOLE = re.compile(r"-?[0-9]+\.0+")  # an integer that went through a floating-point column


def read_id(value: Any) -> str | None:
    """A raw id as text, the same by whatever door it comes in: integers of any size exactly, 12.0
    as 12, bytes decoded, blanks around it trimmed; None where it is missing (None, NaN, empty).

    Raises:
        ValueError: a container, or anything else that is no single id.
    """
    if getattr(value, "shape", None) == ():  # a number of NumPy's or PyTorch's
        value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return None
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{value!r} is no id: its bytes are not UTF-8.") from None
    if isinstance(value, str):
        text = value.strip()
        return (text.partition(".")[0] if WHOLE.fullmatch(text) else text) or None
    if isinstance(value, (Integral, UUID)):
        return str(value)
    if isinstance(value, (Real, Decimal)):
        if not math.isfinite(value):
            return None
        if isinstance(value, float) and abs(value) >= 2**53:
            raise ValueError(
                f"{value!r} is no id: a floating-point number this large stands for several "
                "integers; give an integer or text."
            )
        whole = math.trunc(value)
        return str(whole if value == whole else value)
    shown = " ".join(repr(value).split())
    raise ValueError(f"{shown[:80]} is no id: give one string or integer.")


def ids_fingerprint(
    user_ids: list[str], item_ids: list[str], field_values: Sequence[tuple[str, str]] = ()
) -> str:
    """Sha256 (hex) over the raw ids in table order, and the (field, value) pairs that have CF
    vectors, if any; a CF table fits only the catalog it names."""
    named = [user_ids, item_ids, *([list(field_values)] if field_values else [])]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def check_kinds(function: Callable[..., Any], values: dict[str, Any]) -> None:
    """Refuse values, as JSON has them, that a function's annotations do not allow for.

    Raises:
        ValueError: naming the first.
    """
    hints = get_type_hints(function)
    for name, value in values.items():
        if name in hints and not is_kind(value, hints[name]):
            kind = re.sub(r"<class '(\w+)'>", r"\1", str(hints[name]))
            raise ValueError(
                f"{name} is {repr(value)[:80]} and must be {kind}; numbers are finite, and whole "
                "ones not below 0."
            )


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type hint's; see `check_kinds`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(is_kind(value, part) for part in parts)
    if origin is tuple:
        fits = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return fits and all(map(is_kind, value, parts))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(is_kind(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_kind(one, parts[1]) for one in value.values())
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and type(value) is not bool
        return number and math.isfinite(value) and (kind is float or value >= 0)
    return kind is Any or origin is not None or isinstance(value, kind)


def check_release(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` that says how to convert a checkpoint of release 0.1."""
    if "cf_residual" in settings or "layout" in settings:
        raise ValueError(f"This checkpoint was written by ccf-llm-hf 0.1: {CONVERT}.")


def wrong_size(backbone: dict[str, Any]) -> str | None:
    """The first size that a backbone's configuration lacks, or that is none; None where all are
    there. transformers would put that of some large model in its place."""
    kind = backbone["model_type"]
    if not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return None
    default = AutoConfig.for_model(kind)
    for name in SIZES:
        own = default.attribute_map.get(name, name)
        value = backbone.get(own, backbone.get(name))
        if hasattr(default, own) and not (isinstance(value, int) and value > 0):
            return own
    return None


class CCFLLMConfig(PreTrainedConfig):
    """Everything that shapes a [`CCFLLMForCTR`]; all arguments are keyword-only.

    Args:
        text_config: the backbone's configuration (a `PreTrainedConfig` or its dict); default Llama.
        fusion: how an item slot is filled from text and CF, one of `FUSIONS`. `gate` is the
            paper's. Which slots and words a prompt shows is the processor's matter.
        cf_logit: add a learned scale times the CF model's own logit to the score (our choice).
        cf_fold_in: the user vector in that logit is solved for from the signed history that the
            prompt shows, at the CF model's own prior, instead of looked up (our choice). It needs
            `cf_user_precision` and a processor with `histories="signed"`.
        cf_user_precision: `(cf_dim,)` precision of the CF model's Gaussian prior over user vectors
            about its default user; 0 for a dimension that is fixed there. None: not known.
        cf_dim: width of a CF vector.
        num_users, num_items: rows of the CF tables; the item table covers the whole catalog.
        num_field_values: values of item fields that have CF vectors.
        num_item_values: how many of them, at most, an item has that users have tastes for; 0 where
            users have no tastes.
        item_text: how an item's words are read for its slot, one of `ITEM_TEXTS`: `contextual`, by
            the states of a language model (ours; `from_backbone` takes it where slots have words in
            them), or `static`, by the mean of their token embeddings.
        text_dim: width of a contextual text vector, at most `text_width` (our choice: 128).
        text_layer: after how many layers states are read; `from_backbone` takes half of the
            backbone's and all of a sentence encoder's.
        text_width: width of a state.
        text_prefix_ids: tokens before every text. The first one that a causal model reads takes up
            attention that nothing else wants, and its states say nothing of the item.
        sentence_encoder: Hub id or folder of a sentence encoder that reads texts in the backbone's
            place. It is loaded when an item outside the catalog is first met.
        sentence_encoder_revision, sentence_encoder_fingerprint: its weights.
        num_title_tokens: total number of title tokens of the catalog, for `static`.
        alignment_multiplier: hidden width of ALG over `cf_dim` (our choice: 10).
        slot_scale: factor of ALG's output: the RMS of the backbone's token embeddings.
        yes_token_id, no_token_id: the two answers in the backbone's vocabulary.
        item_slot_token_id, user_slot_token_id: placeholders, past the backbone's vocabulary.
        logit_temperature: `prob = sigmoid(logit / logit_temperature)`, fitted on validation.
        cf_model: name of the CF model behind the tables.
        ids_fingerprint: see [`ids_fingerprint`].
        lora: `{r, lora_alpha, target_modules, use_rslora, lora_dropout}` or None.
        backbone_name, backbone_revision, backbone_fingerprint: the weights it was trained on.
        checkpoint_form: `full` (one self-contained model.safetensors) or `slim` (without backbone).

    Raises:
        ValueError: on an unknown `fusion`, `item_text` or `checkpoint_form`, a `cf_fold_in` without
            `cf_logit` or `cf_user_precision`, or a checkpoint of release 0.1.
    """

    model_type = "ccf_llm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        *,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        fusion: str = "gate",
        cf_logit: bool = False,
        cf_fold_in: bool = False,
        cf_user_precision: list[float] | None = None,
        cf_dim: int = 32,
        num_users: int = 0,
        num_items: int = 0,
        item_text: str = "static",
        text_dim: int = 128,
        text_layer: int = 0,
        text_width: int = 0,
        text_prefix_ids: list[int] | None = None,
        sentence_encoder: str = "",
        sentence_encoder_revision: str | None = None,
        sentence_encoder_fingerprint: str = "",
        num_field_values: int = 0,
        num_item_values: int = 0,
        num_title_tokens: int = 0,
        alignment_multiplier: int = 10,
        slot_scale: float = 1.0,
        yes_token_id: int = 0,
        no_token_id: int = 1,
        item_slot_token_id: int | None = None,
        user_slot_token_id: int | None = None,
        logit_temperature: float = 1.0,
        cf_model: str = "",
        ids_fingerprint: str = "",
        lora: dict[str, Any] | None = None,
        backbone_name: str = "",
        backbone_revision: str | None = None,
        backbone_fingerprint: str = "",
        checkpoint_form: str = "full",
        **kwargs: Any,
    ) -> None:
        check_release(kwargs)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is unknown: choose one of {', '.join(FUSIONS)}.")
        if item_text not in ITEM_TEXTS:
            raise ValueError(
                f"item_text={item_text!r} is unknown: choose one of {', '.join(ITEM_TEXTS)}."
            )
        if checkpoint_form not in CHECKPOINT_FORMS:
            raise ValueError(
                f"checkpoint_form={checkpoint_form!r} is unknown: choose full or slim."
            )
        if cf_fold_in and not (cf_logit and cf_user_precision):
            raise ValueError(
                "cf_fold_in needs cf_logit and a CF model whose prior over users is known "
                "(cf_user_precision): turn it off, or take a CF table fitted by `fit-cf mf`."
            )
        if not logit_temperature > 0:
            raise ValueError(f"logit_temperature={logit_temperature} must be above 0.")
        if not isinstance(text_config, PreTrainedConfig):
            values = dict(text_config or {})
            kind = values.pop("model_type", "llama")
            if not (isinstance(kind, str) and kind in CONFIG_MAPPING):
                raise ValueError(
                    f"text_config names a model_type {kind!r}, which this transformers has not: "
                    "install a newer one, or restore the file."
                )
            text_config = AutoConfig.for_model(kind, **values)
        self.text_config = text_config
        self.fusion = fusion
        self.cf_logit = cf_logit
        self.cf_fold_in = cf_fold_in
        self.cf_user_precision = cf_user_precision
        self.cf_dim = cf_dim
        self.num_users = num_users
        self.num_items = num_items
        self.item_text = item_text
        self.text_dim = text_dim
        self.text_layer = text_layer
        self.text_width = text_width
        self.text_prefix_ids = list(text_prefix_ids or [])
        self.sentence_encoder = sentence_encoder
        self.sentence_encoder_revision = sentence_encoder_revision
        self.sentence_encoder_fingerprint = sentence_encoder_fingerprint
        self.num_field_values = num_field_values
        self.num_item_values = num_item_values
        self.num_title_tokens = num_title_tokens
        self.alignment_multiplier = alignment_multiplier
        self.slot_scale = slot_scale
        self.yes_token_id = yes_token_id
        self.no_token_id = no_token_id
        self.item_slot_token_id = item_slot_token_id
        self.user_slot_token_id = user_slot_token_id
        self.logit_temperature = logit_temperature
        self.cf_model = cf_model
        self.ids_fingerprint = ids_fingerprint
        self.lora = lora
        self.backbone_name = backbone_name
        self.backbone_revision = backbone_revision
        self.backbone_fingerprint = backbone_fingerprint
        self.checkpoint_form = checkpoint_form
        # With ccf_llm_hf installed the pipeline is known already: the one that a checkpoint names
        # stays unread, since transformers would run the checkpoint's code for it.
        if TASK in PIPELINE_REGISTRY.get_supported_tasks():
            kwargs.pop("custom_pipelines", None)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but what names no backbone and its sizes is refused: it would be one of
        26 GB.

        Raises:
            OSError: config.json is missing, or that of another model.
            ValueError: a value of it is missing, or of a type that it cannot be.
        """
        backbone = config_dict.get("text_config")
        place = kwargs.get("name_or_path", "this folder")
        if not backbone or (isinstance(backbone, dict) and "model_type" not in backbone):
            raise OSError(
                f"{place} has no config.json of a CCF-LLM checkpoint, whose text_config names a "
                "model_type: name the folder that one was saved to."
            )
        if isinstance(backbone, dict) and (wrong := wrong_size(backbone)):
            raise ValueError(
                f"{place}/config.json gives no {wrong} of its {backbone['model_type']} backbone in "
                "text_config: restore the file."
            )
        check_kinds(cls.__init__, config_dict)
        return super().from_dict(config_dict, **kwargs)


__all__ = ["CCFLLMConfig"]

"""Building, saving and loading a [`CCFLLMForCTR`]: fresh around a backbone, full, or slim."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .catalog_ccf_llm import CatalogMixin, cf_settings
from .checkpoint_ccf_llm import (
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    CF_FILE,
    CF_TENSORS,
    FORMAT_VERSION,
    FUSION_FILE,
    HUB_ARGUMENTS,
    Adapter,
    Publishable,
    adapter_scale,
    backbone_fingerprint,
    check_catalog,
    copy_code,
    find_file,
    injected_adapter,
    load_injected_adapter,
    merge_adapter,
    plain_state,
    read_adapter,
    read_tensors,
    write_adapter,
    write_tensors,
)
from .configuration_ccf_llm import AUTO_MAP, CCFLLMConfig
from .pipeline_ccf_llm import CUSTOM_PIPELINES
from .tiles_ccf_llm import use_tiles

logger = logging.get_logger(__name__)

# An installed ccf_llm_hf puts a function here that finds a backbone's local copy by its name.
backbone_resolver: Callable[[str], str] | None = None
AUTO_ARGUMENTS = (
    "trust_remote_code",
    "code_revision",
    "adapter_kwargs",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
)


class CheckpointMixin(Publishable, CatalogMixin):
    """The part of [`CCFLLMForCTR`] that deals with folders and repos.

    A checkpoint is *full* (one self-contained model.safetensors, LoRA merged) or *slim* (CF table,
    fusion weights and adapter; the backbone by name, revision and fingerprint).
    """

    config_class: type[CCFLLMConfig]
    model: Any
    answer_weight: nn.Parameter
    _adapter: Adapter
    _no_split_modules: Any
    answer_scale: nn.Parameter
    cf_logit_scale: nn.Parameter

    @property
    def language_model(self) -> nn.Module:
        """The backbone without its head."""
        return self.model.language_model

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        *,
        backbone_name: str | None = None,
        revision: str | None = None,
        cf: Any = None,
        item_title_ids: list[list[int]] | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        **settings: Any,
    ) -> Self:
        """A fresh model around a pretrained backbone.

        Args:
            backbone: folder or Hub id of a causal language model.
            backbone_name: name to record when `backbone` is a local copy.
            cf: a `CFVectors` (all snapshots are kept); None for text_only.
            item_title_ids: title tokens of every catalog item, in table order.
            settings: other arguments of [`CCFLLMConfig`], such as `fusion`.
        """
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        causal = AutoModelForCausalLM.from_pretrained(
            backbone, revision=revision, dtype=dtype, **options
        )
        titles = item_title_ids or []
        text_config = copy.deepcopy(causal.get_decoder().config)
        if cf is not None:
            settings |= cf_settings(cf)
        else:
            settings.setdefault("num_items", len(titles))
        embedding: Any = causal.get_input_embeddings()
        count = embedding.weight.shape[0]
        with torch.no_grad():  # through the module: Gemma's scales its rows
            words = embedding(torch.arange(0, count, max(1, count // 4096)))
        config = CCFLLMConfig(
            text_config=text_config,
            num_title_tokens=sum(map(len, titles)),
            slot_scale=float(words.float().pow(2).mean().sqrt()),
            backbone_name=backbone_name or backbone,
            backbone_revision=revision,
            checkpoint_form="slim",
            **settings,
        )
        model = cls(config)
        model.attach_backbone(causal)
        config.backbone_fingerprint = backbone_fingerprint(model.language_model)
        config.checkpoint_form = "full"
        if cf is not None:
            model.model.cf.fill(cf)
        if titles:
            model.set_titles(titles)
        return model

    def attach_backbone(self, causal: PreTrainedModel) -> None:
        """Put a causal language model's body under the fusion and keep two rows of its head."""
        self.model.language_model = causal.get_decoder()
        use_tiles(self.model.language_model)
        head = causal.get_output_embeddings().weight.detach()
        with torch.no_grad():
            self.answer_weight.copy_(head[[self.config.yes_token_id, self.config.no_token_id]])
        self._no_split_modules = list(causal._no_split_modules or [])
        self.model._no_split_modules = self._no_split_modules

    def lora_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named LoRA parameters that PEFT injected into the backbone."""
        return [(name, p) for name, p in self.named_parameters() if ".lora_" in name]

    def fusion_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of ALG, gate and cold vectors."""
        return [
            (name, p)
            for name, p in self.named_parameters()
            if name.startswith("model.") and not name.startswith("model.language_model.")
        ]

    def gate_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the gate, a part of the fusion parameters; empty without a gate."""
        return [(name, p) for name, p in self.fusion_parameters() if name.startswith("model.gate.")]

    def head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named scalars of the score, which every stage trains: the scale of the answer and, with
        `cf_logit`, that of the CF logit."""
        scales = [("answer_scale", self.answer_scale)]
        return scales + [("cf_logit_scale", self.cf_logit_scale)] * self.config.cf_logit

    def checkpoint_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """CF table (last snapshot only) and all other weights outside the backbone."""
        cf, fusion = {}, {}
        for name, value in self.state_dict().items():
            if name.startswith("model.cf."):
                value = value[-1:].clone()
            field = name.removeprefix("model.cf.")
            if field in CF_TENSORS:
                cf[field] = value
            elif not name.startswith("model.language_model."):
                fusion[name] = value
        return cf, fusion

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, form: str | None = None, **kwargs: Any
    ) -> None:
        """Save config, code and weights.

        Args:
            form: `full` (LoRA merged, self-contained) or `slim` (CF table, fusion weights,
                adapter); default the form that the model was loaded in.

        Raises:
            ValueError: for `slim`, when the adapter was merged by a full checkpoint; with
                `push_to_hub`, which has a method of its own.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained does not upload: call push_to_hub(repo_id).")
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        loaded_form, snapshots = self.config.checkpoint_form, self.config.num_snapshots
        self.config.checkpoint_form = form or loaded_form
        self.config.num_snapshots = 1
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        try:
            if self.config.checkpoint_form == "full":
                kwargs.pop("state_dict", None)
                super().save_pretrained(folder, state_dict=self.full_state(), **kwargs)
            else:
                self.save_slim(folder)
        finally:
            self.config.checkpoint_form, self.config.num_snapshots = loaded_form, snapshots
        copy_code(folder)

    def trained_adapter(self) -> Adapter:
        """LoRA that PEFT injected into the backbone; its settings must be in `config.lora`."""
        adapter = injected_adapter(self.language_model)
        if adapter and not self.config.lora:
            raise ValueError("LoRA was injected but config.lora is None: record r and lora_alpha.")
        return adapter

    def full_state(self) -> dict[str, Tensor]:
        """Self-contained state: backbone with LoRA merged, one snapshot of the CF table."""
        cf, fusion = self.checkpoint_tensors()
        state = plain_state(self.language_model)
        if adapter := self.trained_adapter():
            merge_adapter(self.language_model, state, adapter, adapter_scale(self.config.lora))
        return {
            **{f"model.language_model.{name}": value for name, value in state.items()},
            **{f"model.cf.{name}": value for name, value in cf.items()},
            **fusion,
        }

    def save_slim(self, folder: Path) -> None:
        """Write everything but the backbone; tens of MB instead of GB."""
        injected = self.trained_adapter()
        if injected and self._adapter:
            raise ValueError(
                "LoRA was injected on top of the LoRA that this checkpoint had merged at loading, "
                "and a slim checkpoint holds one: save with form='full', or train by a recipe with "
                "init_from, which goes on with the old one."
            )
        adapter = injected or self._adapter
        if self.config.lora and not adapter:
            raise ValueError(
                "LoRA is merged into this model's weights, so it has no slim form: "
                "load the slim checkpoint, or save with form='full'."
            )
        cf, fusion = self.checkpoint_tensors()
        config = self.config
        metadata = {"format_version": FORMAT_VERSION, "ids_fingerprint": config.ids_fingerprint}
        sizes = {
            "cf_model": config.cf_model,
            "dim": str(config.cf_dim),
            "num_users": str(config.num_users),
            "num_items": str(config.num_items),
            "num_snapshots": "1",
        }
        write_tensors(folder / CF_FILE, cf, metadata | sizes)
        write_tensors(folder / FUSION_FILE, fusion, metadata | {"fusion": config.fusion})
        if adapter:
            write_adapter(folder / ADAPTER_FOLDER, adapter, self.language_model, config)
        config.save_pretrained(folder)

    def load_trained_weights(self, folder: str | Path) -> None:
        """Copy a slim checkpoint's fusion weights and adapter into this live model.

        Alignment networks for CF vectors of another width are left fresh, and a log line says so.

        Raises:
            ValueError: naming a weight of another shape.
        """
        live = dict(self.fusion_parameters() + self.head_parameters())
        tensors, _ = read_tensors(str(Path(folder) / FUSION_FILE))
        tensors = {name: value for name, value in tensors.items() if name in live}
        wrong = [name for name, value in tensors.items() if value.shape != live[name].shape]
        if any("_alignment.up." in name for name in wrong):
            logger.warning(
                "The alignment networks start afresh, because those in %s are for CF vectors of "
                "another width: train them.",
                folder,
            )
            wrong = [name for name in wrong if "_alignment." not in name]
            tensors = {name: value for name, value in tensors.items() if "_alignment." not in name}
        if wrong:
            raise ValueError(
                f"{folder} holds {min(wrong)!r} for another backbone or alignment_multiplier."
            )
        self.load_state_dict(tensors, strict=False)
        if self.lora_parameters():
            self.load_adapter_folder(Path(folder) / ADAPTER_FOLDER)

    def load_adapter_folder(self, folder: str | Path) -> None:
        """Copy a PEFT adapter folder into the LoRA modules injected into the backbone."""
        adapter = read_adapter(str(Path(folder) / ADAPTER_FILE), self.language_model)
        load_injected_adapter(self.language_model, adapter, str(folder))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        backbone: str | Path | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a full or slim checkpoint from a folder or a Hub repo.

        Args:
            backbone: for a slim checkpoint, a folder, Hub id or loaded causal language model to use
                instead of the recorded one. A loaded one is copied, since LoRA is merged into it.

        Raises:
            OSError: naming a damaged, missing or mismatched file.
            ValueError: when the recorded backbone's weights are not those the model was trained on.
        """
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        config: CCFLLMConfig = kwargs.pop("config", None) or cls.config_class.from_pretrained(
            path, **hub
        )
        check_catalog(path, hub, config.ids_fingerprint)
        if config.checkpoint_form == "full":
            return cls._load_full(path, *args, config=config, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        for_backbone = {
            key: value
            for key, value in kwargs.items()
            if key not in (*AUTO_ARGUMENTS, "revision", "subfolder", "force_download")
        }
        model = cls._load_slim(path, config, hub, backbone, for_backbone)
        return (model, {"missing_keys": set()}) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _load_full(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        for file in sorted(Path(path).glob("*.safetensors")):
            try_header(file)
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise OSError(
                f"{path} lacks {len(missing)} weights, {missing[0]!r} first: "
                "copy the checkpoint again."
            )
        return (model, info) if wants_info else model

    @classmethod
    def _load_slim(
        cls,
        path: str,
        config: CCFLLMConfig,
        hub: dict[str, Any],
        backbone: str | Path | PreTrainedModel | None,
        options: dict[str, Any],
    ) -> Self:
        fusion, _ = read_tensors(str(find_file(path, FUSION_FILE, hub)))
        cf_file = str(find_file(path, CF_FILE, hub))
        cf, metadata = read_tensors(cf_file)
        if metadata.get("ids_fingerprint") != config.ids_fingerprint:
            raise OSError(
                f"{cf_file} belongs to another catalog than config.json: restore its own file."
            )
        model = cls(config)
        causal = load_backbone(config, backbone, options)
        model.attach_backbone(causal)
        state = fusion | {f"model.cf.{name}": value for name, value in cf.items()}
        try:
            result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise OSError(f"{path}: weights do not fit config.json ({error}).") from error
        missing = [
            key for key in result.missing_keys if not key.startswith("model.language_model.")
        ]
        if missing or result.unexpected_keys:
            wrong = sorted(missing + result.unexpected_keys)[0]
            raise OSError(f"{path}: {wrong!r} is in only one of config.json and the weight files.")
        if config.lora:
            file = str(find_file(path, f"{ADAPTER_FOLDER}/{ADAPTER_FILE}", hub))
            model._adapter = read_adapter(file, model.language_model)
            body = model.language_model.state_dict()
            merge_adapter(model.language_model, body, model._adapter, adapter_scale(config.lora))
            model.language_model.load_state_dict(body)
        return model.to(causal.device).eval()  # type: ignore[arg-type]


def try_header(file: Path) -> None:
    """Raise an OSError that names `file` when it is no whole safetensors file."""
    try:
        with safe_open(str(file), framework="pt"):
            return
    except SafetensorError as error:
        raise OSError(
            f"{file} is damaged or truncated ({error}): copy or download it again."
        ) from error


def load_backbone(
    config: CCFLLMConfig, backbone: str | Path | PreTrainedModel | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The causal language model of a slim checkpoint, with its fingerprint checked."""
    if isinstance(backbone, PreTrainedModel):
        causal = copy.deepcopy(backbone)
    else:
        name = str(backbone or config.backbone_name)
        if backbone is None and backbone_resolver is not None:
            name = backbone_resolver(name)
        if options.get("dtype") in (None, "auto"):  # what this model had, not its backbone's file
            options["dtype"] = config.dtype or torch.float32
        revision = config.backbone_revision if backbone is None else None
        try:
            causal = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
        except OSError as error:
            raise OSError(
                f"backbone {name!r} of this slim checkpoint cannot be loaded: give a copy of it "
                f"with backbone=FOLDER, or load the full checkpoint ({error})."
            ) from error
    if causal.dtype == torch.float16 or not config.backbone_fingerprint:
        return causal  # float16 rounds otherwise than the fingerprint does
    if backbone_fingerprint(causal.get_decoder()) != config.backbone_fingerprint:
        message = (
            f"The weights of backbone {config.backbone_name!r} are not those that this checkpoint "
            "was trained on (a quantized copy, perhaps)"
        )
        if backbone is None:
            raise ValueError(f"{message}: name the backbone to attach with backbone=... .")
        warnings.warn(f"{message}; attached because backbone= names it.", stacklevel=3)
    return causal


__all__ = ["CheckpointMixin"]

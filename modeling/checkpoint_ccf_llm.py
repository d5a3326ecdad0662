"""Checkpoints: which files there are, and how a [`CCFLLMForCTR`] is built, saved and loaded.

A checkpoint is *full* (one self-contained model.safetensors, LoRA merged) or *slim* (CF table, text
vectors, fusion weights; the backbone by name, revision and fingerprint). Both have the LoRA adapter
beside them: items outside the catalog are read by the backbone without it.
"""

import copy
import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, logging

from .adapter_ccf_llm import (
    Adapter,
    adapter_parts,
    adapter_scale,
    add_lora,
    check_adapter,
    from_peft,
    injected_parts,
    join_parts,
    plain_state,
    to_peft,
)
from .attention_ccf_llm import use_packed_attention
from .configuration_ccf_llm import (
    AUTO_MAP,
    CHECKPOINT_FORMS,
    CONVERT,
    CUSTOM_PIPELINES,
    CCFLLMConfig,
    ids_fingerprint,
)

if TYPE_CHECKING:
    from .processing_ccf_llm import CCFLLMProcessor

logger = logging.get_logger(__name__)

FORMAT_VERSION = "2"
CF_FILE = "cf_embeddings.safetensors"
TEXT_FILE = "text_vectors.safetensors"
FUSION_FILE = "fusion.safetensors"
CATALOG_FILE = "item_catalog.jsonl"
USERS_FILE = "user_ids.jsonl"
TEXT_TOKENIZER_FOLDER = "text_tokenizer"
FIELDS_FILE = "field_values.jsonl"  # only where values of item fields have CF vectors
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_FILE = "model.safetensors"
BODY = "model.language_model."
CODE_FILES = (
    "configuration_ccf_llm.py",
    "modeling_ccf_llm.py",
    "attention_ccf_llm.py",
    "prompt_ccf_llm.py",
    "processing_ccf_llm.py",
    "ranking_ccf_llm.py",
    "pipeline_ccf_llm.py",
    "adapter_ccf_llm.py",
    "checkpoint_ccf_llm.py",
)
SHARD_ITEMS = 2048  # of a catalog, whose states are kept in one file of a cache
TEXT_SPACE = ("mean", "projection")
TEXT_SETTINGS = ("item_text", "text_dim", "text_layer", "sentence_encoder", "text_prefix_ids")
CF_TENSORS = (
    "user_vectors",
    "item_vectors",
    "user_known",
    "item_known",
    "default_user",
    "default_item",
    "offset",
)
FIELD_TENSORS = ("field_vectors", "item_values", "field_tastes")
HUB_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
)
AUTO_ARGUMENTS = (
    "trust_remote_code",
    "code_revision",
    "adapter_kwargs",
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
)


def read_lines(file: str | Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file in table order, whose values of `keys` are made text.

    Raises:
        ValueError: naming the file and line that is no object with these keys.
    """
    rows = []
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode())
                if not all(type(row[key]) in (str, int) for key in keys):
                    raise TypeError
                rows.append({**row, **{key: str(row[key]) for key in keys}})
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a JSON object, in UTF-8, with "
                    f"{' and '.join(keys)} as text: restore the file."
                ) from error
    return rows


def read_json(file: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        OSError: naming the file, when it holds none.
    """
    with reading(file):
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))


@contextmanager
def reading(path: str | Path, file: str = "") -> Iterator[None]:
    """Have whatever a damaged file makes of the libraries that read it end in one sentence.

    Raises:
        OSError: naming the file of a folder or repository; a ValueError where it was one.
    """
    try:
        yield
    except Exception as error:
        text = one_line(error)
        ours = str(path) in text or CONVERT in text  # says already what is wrong, and the mend
        if isinstance(error, (OSError, ValueError)) and ours:
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        name = f"{path}/{file}" if file else path
        raise kind(f"{name} cannot be read ({text}): restore it.") from error


def one_line(error: Exception) -> str:
    """What a library says of an error, without its line breaks and its hints."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_ids(file: str | Path) -> list[dict[str, Any]]:
    """Rows `{"id": ..., "title": ...}` of a catalog in table order."""
    return read_lines(file, ("id",))


def read_field_values(file: str | Path) -> list[tuple[str, str]]:
    """(field, value) pairs in the order of their CF vectors."""
    return [(row["field"], row["value"]) for row in read_lines(file, ("field", "value"))]


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name, then rename it."""
    # The process's own: caches are written by several at a time.
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the umask's, which safetensors does not ask for
        write(partial)
        partial.chmod(mode)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_ids(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write indented JSON."""
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def find_file(
    path_or_repo: str, name: str, hub: dict[str, Any], required: bool = True
) -> str | None:
    """Path of a checkpoint's file, local or from the Hub; None when optional and absent.

    Raises:
        OSError: naming the file, when it is required and not there.
    """
    folder, _, file = name.rpartition("/")
    inside = "/".join(part for part in (hub.get("subfolder", ""), folder) if part)
    options = {key: value for key, value in hub.items() if key != "subfolder"}
    return cached_file(
        path_or_repo,
        file,
        subfolder=inside,
        _raise_exceptions_for_missing_entries=required,
        **options,
    )


def check_catalog(path: str, hub: dict[str, Any], fingerprint: str, with_fields: bool) -> None:
    """Refuse CF tables beside another catalog than theirs, at load instead of by an IndexError.

    Args:
        with_fields: values of item fields have CF vectors too, and a file.

    Raises:
        OSError: naming the files, when they are there and do not match `fingerprint`.
    """
    items = find_file(path, CATALOG_FILE, hub, required=False)
    users = find_file(path, USERS_FILE, hub, required=False)
    if not items or not users or not fingerprint:
        return
    found = ids_fingerprint(
        [row["id"] for row in read_ids(users)],
        [row["id"] for row in read_ids(items)],
        read_field_values(str(find_file(path, FIELDS_FILE, hub))) if with_fields else (),
    )
    if found != fingerprint:
        raise OSError(
            f"{items}, {USERS_FILE}{f' or {FIELDS_FILE}' * with_fields} beside it, is not the "
            "catalog that this checkpoint was saved with: restore the files of one checkpoint."
        )


def load_tokenizer(path: str, hub: dict[str, Any], trusted: bool) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    A tokenizer.json is read as it is: the Auto class would look at config.json, whose model type is
    this code's, and ask once more whether to trust it.
    """
    with reading(path, "tokenizer.json or tokenizer_config.json"):
        if find_file(path, "tokenizer.json", hub, required=False):
            return PreTrainedTokenizerFast.from_pretrained(path, **hub)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted, **hub)


def load_text_tokenizer(path: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint's sentence encoder; None where it has none."""
    if not find_file(path, f"{TEXT_TOKENIZER_FOLDER}/tokenizer.json", hub, required=False):
        return None
    inside = "/".join(part for part in (hub.get("subfolder", ""), TEXT_TOKENIZER_FOLDER) if part)
    with reading(path, f"{TEXT_TOKENIZER_FOLDER}/tokenizer.json or tokenizer_config.json"):
        return PreTrainedTokenizerFast.from_pretrained(path, **{**hub, "subfolder": inside})


@contextmanager
def open_tensors(file: str | Path) -> Iterator[Any]:
    """A safetensors file; an OSError that names it where it is damaged or truncated."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except (SafetensorError, ValueError) as error:
        raise OSError(
            f"{file} is damaged or truncated ({error}): copy or download it again."
        ) from error


def read_tensors(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        OSError: naming the file, when it is truncated, no safetensors file, of another format
            version than this code reads, or holds NaN or infinity.
    """
    with open_tensors(file) as handle:
        metadata = handle.metadata() or {}
        # Files by other libraries, such as an adapter by PEFT, have no such version.
        version = metadata.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            mend = "load it with a newer ccf-llm-hf" if version > FORMAT_VERSION else CONVERT
            raise OSError(
                f"{file} has format version {version}, and this code reads version "
                f"{FORMAT_VERSION}: {mend}."
            )
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    check_finite(tensors, file)
    return tensors, metadata


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Raise an OSError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.sum(dtype=torch.float32).isfinite():
            continue  # the sum is a tenth of the work, and not finite where a value is not
        if not tensor.isfinite().all():
            raise OSError(
                f"{source} holds NaN or infinity in {name!r}: its training diverged, or it is "
                "damaged; take another checkpoint."
            )


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same tensors."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata)
        with partial.open("r+b") as opened:  # safetensors draws the order of the metadata
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            opened.seek(8)
            opened.write(text.encode().ljust(length))

    write_whole(file, write)


def copy_code(folder: Path) -> None:
    """Ship the modeling code, so that `trust_remote_code=True` works from the folder alone.

    As remote code, a processor is loaded without the model's file; the model ships that one itself.
    """
    for name in CODE_FILES:
        source = Path(__file__).with_name(name)
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def backbone_fingerprint(backbone: nn.Module) -> str:
    """Sha256 (hex) over names, shapes and a strided sample of up to 1024 values of each parameter.

    Values are rounded to bfloat16 first, so that loading the same weights in float32 or bfloat16
    gives the same fingerprint. Quantized or otherwise altered weights give another (our choice).
    """
    digest = hashlib.sha256()
    for name, weight in sorted(plain_state(backbone).items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


class CheckpointMixin(PreTrainedModel):
    """The part of [`CCFLLMForCTR`] that deals with folders, repositories and catalogs."""

    config: CCFLLMConfig
    config_class: type[CCFLLMConfig]
    model: Any
    answer_weight: nn.Parameter
    answer_scale: nn.Parameter
    cf_logit_scale: nn.Parameter
    _no_split_modules: Any
    _backbone_notes: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012

    @property
    def language_model(self) -> PreTrainedModel:
        """The backbone without its head."""
        return self.model.language_model

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        processor: "CCFLLMProcessor",
        *,
        backbone_name: str | None = None,
        revision: str | None = None,
        cf: Any = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        text_cache: str | Path | None = None,
        text_space_of: str | Path | None = None,
        text_dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Self:
        """A fresh model around a pretrained backbone.

        Args:
            backbone: folder, Hub id, or name in `ccf-llm`'s cache, of a causal language model.
            processor: over the catalog, with the backbone's tokenizer.
            backbone_name: name to record when `backbone` is a local copy.
            cf: a `CFVectors` of the processor's ids, of which the last fit is taken; None: no CF
                vectors.
            text_cache: folder to keep the states of the catalog's words in, with which a killed
                pass over it goes on, and the next model skips it. None: nothing is kept.
            text_space_of: slim checkpoint whose mean and projection of text vectors to take, if it
                reads words as this model does: what it was trained on. Else they are learned from
                the catalog.
            text_dtype: that of the multiplications by which the catalog is read. bfloat16 takes a
                third of the time where the hardware has it, and gives vectors whose cosine with
                float32's is above .999.
            settings: other arguments of [`CCFLLMConfig`], such as `fusion`.

        Raises:
            ValueError: an unknown setting, a tokenizer without " Yes" and " No", or a `cf` of
                other ids.
        """
        if unknown := settings.keys() - inspect.signature(CCFLLMConfig.__init__).parameters:
            raise ValueError(f"from_backbone got {min(unknown)!r}, which CCFLLMConfig has not.")
        yes, no = processor.answer_token_ids()
        check_same_ids(processor, cf)
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        place = backbone if "/" in str(backbone) else local_copy(backbone)
        with reading(place):
            causal = AutoModelForCausalLM.from_pretrained(
                place, revision=revision, dtype=dtype, **options
            )
        text_config = copy.deepcopy(causal.get_decoder().config)
        settings |= text_settings(processor, text_config, settings)
        if cf is not None:
            settings |= cf_settings(cf)
        else:
            settings.setdefault("num_items", len(processor.item_ids))
        embedding: Any = causal.get_input_embeddings()
        count = embedding.weight.shape[0]
        with torch.no_grad():  # through the module: Gemma's scales its rows
            words = embedding(torch.arange(0, count, max(1, count // 4096)))
        config = CCFLLMConfig(
            text_config=text_config,
            slot_scale=float(words.float().pow(2).mean().sqrt()),
            yes_token_id=yes,
            no_token_id=no,
            item_slot_token_id=processor.item_slot_token_id,
            user_slot_token_id=processor.user_slot_token_id,
            backbone_name=backbone_name or backbone,
            backbone_revision=revision,
            checkpoint_form="slim",
            **settings,
        )
        model = cls(config)
        model.attach_backbone(causal)
        config.backbone_fingerprint = backbone_fingerprint(model.language_model)
        config.checkpoint_form = "full"
        model.note_backbone()
        if cf is not None:
            model.model.cf.fill(cf)
        if config.sentence_encoder:
            encoder = model.model.sentence_encoder()
            config.sentence_encoder_fingerprint = backbone_fingerprint(encoder)
        space = read_text_space(text_space_of, config) if text_space_of else None
        model.set_texts(processor, text_cache, space, text_dtype)
        return model

    def attach_backbone(self, causal: PreTrainedModel) -> None:
        """Put a causal language model's body under the fusion and keep two rows of its head."""
        self.model.language_model = causal.get_decoder()
        use_packed_attention(self.model.language_model)
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

    def head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named scalars of the score, which every stage trains: the scale of the answer and, with
        `cf_logit`, that of the CF logit."""
        scales = [("answer_scale", self.answer_scale)]
        return scales + [("cf_logit_scale", self.cf_logit_scale)] * self.config.cf_logit

    def note_backbone(self) -> None:
        """Remember which weights the backbone has as loaded, so that a change is told."""
        state = plain_state(self.language_model)
        self._backbone_notes = {name: note_weight(weight) for name, weight in state.items()}

    def changed_weight(self) -> str | None:
        """Name of a backbone's weight that is not as loaded, LoRA apart; a cast is no change."""
        state = plain_state(self.language_model) if self.language_model is not None else {}
        notes = self._backbone_notes
        names = state.keys() & notes.keys()
        changed = {name for name in names if not is_noted(state[name], notes[name])}
        return min(changed | (state.keys() ^ notes.keys()), default=None)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, form: str | None = None, **kwargs: Any
    ) -> None:
        """Save config, code and weights, so that loading them gives the scores that the model has
        now, or say why that cannot be.

        Args:
            form: `full` (LoRA merged, self-contained) or `slim` (CF table, text vectors, fusion
                weights, adapter); default the form that the model was loaded in.
            kwargs: as transformers' method has them. Its `Trainer` gives `state_dict`; a slim
                checkpoint then holds, for it to go on from, what learns as the live model names it
                too, and where the backbone learned a full one is written.

        Raises:
            ValueError: an unknown form; the slim one of a model whose backbone has changed, or
                whose adapter cannot be told from it; PEFT modules other than plain LoRA in the
                backbone; `push_to_hub`, which has a method of its own.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained does not upload: call push_to_hub(repo_id).")
        if not kwargs.get("is_main_process", True):
            return
        config, folder, changed = self.config, Path(save_directory), self.changed_weight()
        of_trainer = "state_dict" in kwargs
        form = form or ("full" if of_trainer and changed else config.checkpoint_form)
        if form not in CHECKPOINT_FORMS:
            raise ValueError(f"form={form!r} is unknown: choose full or slim.")
        if form == "slim":
            self.check_slim()
        adapter, lora = self.whole_adapter()
        kept = {"checkpoint_form": config.checkpoint_form, "lora": config.lora}
        kept["backbone_fingerprint"] = config.backbone_fingerprint
        config.auto_map, config.custom_pipelines = dict(AUTO_MAP), copy.deepcopy(CUSTOM_PIPELINES)
        config.update({"checkpoint_form": form, "lora": lora})
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if form == "slim":
                self._save_slim(folder)
            else:
                config.backbone_fingerprint = "" if changed else config.backbone_fingerprint
                self._save_full(folder, kwargs)
            if adapter:
                tensors, settings = to_peft(adapter, self.language_model, config)
                (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
                write_tensors(folder / ADAPTER_FOLDER / ADAPTER_FILE, tensors, {"format": "pt"})
                write_json(folder / ADAPTER_FOLDER / ADAPTER_CONFIG, settings)
            config.architectures = [type(self).__name__.removeprefix("FSDP")]
            config.dtype = str(self.answer_weight.dtype).removeprefix("torch.")
            config.save_pretrained(folder)
        finally:
            config.update(kept)
        if form == "slim" and of_trainer:
            state = self.state_dict().items()
            live = {n: w for n, w in state if not n.startswith(BODY) or ".lora_" in n}
            write_tensors(folder / FULL_FILE, live, {"format": "pt"})
        copy_code(folder)

    def whole_adapter(self) -> tuple[Adapter, dict[str, Any] | None]:
        """All LoRA of the backbone, what loading merged and what PEFT injected, as one adapter, and
        its settings; empty where it is not known what loading merged."""
        parts, merged = injected_parts(self.language_model), self.model.merged_adapter
        if merged is None:
            return {}, self.config.lora
        for path, more in adapter_parts(merged, self.model.merged_scale).items():
            parts[path] = more + parts.get(path, [])
        return join_parts(parts, self.language_model, self.config.lora)

    def check_slim(self) -> None:
        """Raise a `ValueError` where a slim checkpoint cannot hold what this model computes."""
        if self.model.merged_adapter is None:
            raise ValueError(
                "LoRA is merged into this model's weights, so it has no slim form: "
                "load the slim checkpoint, or save with form='full'."
            )
        changed = self.changed_weight()
        if changed or not self.config.backbone_fingerprint:
            what = f" ({changed!r} differs)" if changed else ""
            raise ValueError(
                "The backbone's own weights are not those that were loaded by name, and a slim "
                f"checkpoint has none{what}: save with form='full'."
            )

    def _save_full(self, folder: Path, options: dict[str, Any]) -> None:
        """Write all weights, LoRA merged."""
        body = plain_state(self.language_model)
        for path, parts in injected_parts(self.language_model).items():
            name, module = f"{path}.weight", self.language_model.get_submodule(path)
            # A backbone frozen in bfloat16 is no reason to round its LoRA.
            dtype = torch.promote_types(body[name].dtype, self.answer_weight.dtype)
            body[name] = add_lora(module, body[name], parts, dtype)
        state = {BODY + name: weight for name, weight in body.items()}
        state |= plain_state(self, merge=True, but=(BODY,))
        injected = self._hf_peft_config_loaded
        self._hf_peft_config_loaded = False  # else transformers writes what `add_adapter` added
        try:
            super().save_pretrained(folder, **{**options, "state_dict": state})
        finally:
            self._hf_peft_config_loaded = injected
        mode = (folder / "config.json").stat().st_mode  # the umask's; see write_whole
        for weights in folder.glob("model*.safetensors"):
            weights.chmod(mode)

    def _save_slim(self, folder: Path) -> None:
        """Write everything but backbone and adapter; tens of MB instead of GB."""
        config = self.config
        cf, text, fusion = {}, {}, {}
        for name, value in plain_state(self, merge=True, but=(BODY,)).items():
            field = name.removeprefix("model.cf.")
            if field in (*CF_TENSORS, *FIELD_TENSORS):
                cf[field] = value
            elif name == "model.item_text.vectors":
                text["vectors"] = value
            else:
                fusion[name] = value
        metadata = {"format_version": FORMAT_VERSION, "ids_fingerprint": config.ids_fingerprint}
        sizes = {
            "cf_model": config.cf_model,
            "dim": str(config.cf_dim),
            "num_users": str(config.num_users),
            "num_items": str(config.num_items),
        }
        write_tensors(folder / CF_FILE, cf, metadata | sizes)
        write_tensors(folder / FUSION_FILE, fusion, metadata | {"fusion": config.fusion})
        if text:
            item_text = self.model.item_text
            space = space_fingerprint(item_text.mean, item_text.projection)
            write_tensors(folder / TEXT_FILE, text, metadata | {"text_space": space})

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module`'s, but weights with LoRA merged into them are refused where PEFT has
        put LoRA beside: `strict=False`, as trainers have it, would leave them out."""
        apart = {n.replace(".base_layer.", ".") for n in self.state_dict() if ".base_layer." in n}
        if merged := apart & state_dict.keys():
            raise ValueError(
                f"{min(merged)!r} of these weights has LoRA merged into it, and this model has LoRA"
                " beside: load them by from_pretrained."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

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
                A name of `ccf-llm`'s, such as `smollm2-135m-instruct`, is its copy in the cache,
                or the recorded one.

        Raises:
            OSError: naming a damaged, missing or mismatched file.
            ValueError: when the recorded backbone's weights are not those the model was trained on.
        """
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        with reading(path, "config.json"):
            config: CCFLLMConfig = kwargs.pop("config", None) or cls.config_class.from_pretrained(
                path, name_or_path=path, **hub
            )
        check_catalog(path, hub, config.ids_fingerprint, config.num_field_values > 0)
        if config.checkpoint_form == "full":
            with reading(path, "config.json or model.safetensors"):
                return cls._load_full(path, *args, config=config, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        for_backbone = {
            key: value
            for key, value in kwargs.items()
            if key not in (*AUTO_ARGUMENTS, "revision", "subfolder", "force_download")
        }
        with reading(path, "config.json or a file beside it"):
            model = cls._load_slim(path, config, hub, backbone, for_backbone)
        return (model, {"missing_keys": set()}) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _load_full(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        for file in sorted(Path(path).glob("*.safetensors")):
            with open_tensors(file):  # transformers' error would not name it
                pass
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise OSError(
                f"{path} lacks {len(missing)} weights, {missing[0]!r} first: "
                "copy the checkpoint again."
            )
        check_finite(model.state_dict(), path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if model.config.lora:
            model.model.merged_adapter = load_adapter(path, hub, model.config, model.language_model)
            model.model.merged_scale = adapter_scale(model.config.lora)
        model.note_backbone()
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
        state = fusion | {f"model.cf.{name}": value for name, value in cf.items()}
        if config.item_text == "contextual":
            file = str(find_file(path, TEXT_FILE, hub))
            text, metadata = read_tensors(file)
            found = (metadata.get("ids_fingerprint"), metadata.get("text_space"))
            space = space_fingerprint(*(fusion[f"model.item_text.{name}"] for name in TEXT_SPACE))
            if found != (config.ids_fingerprint, space):
                raise OSError(
                    f"{file} belongs to another catalog or another training than the files beside "
                    "it: restore its own file."
                )
            state |= {f"model.item_text.{name}": value for name, value in text.items()}
        model = cls(config)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        if dtype in (None, "auto"):  # what this model had, not its backbone's file
            loaded = isinstance(backbone, PreTrainedModel)
            dtype = None if loaded else config.dtype or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        causal = load_backbone(config, backbone, options)
        model.attach_backbone(causal)
        try:
            result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise OSError(f"{path}: weights do not fit config.json ({error}).") from error
        missing = [key for key in result.missing_keys if not key.startswith(BODY)]
        if missing or result.unexpected_keys:
            wrong = sorted(missing + result.unexpected_keys)[0]
            raise OSError(f"{path}: {wrong!r} is in only one of config.json and the weight files.")
        if config.lora:
            adapter = load_adapter(path, hub, config, model.language_model) or {}
            model.model.merged_adapter = adapter
            model.model.merged_scale = adapter_scale(config.lora)
            for name, parts in adapter_parts(adapter, model.model.merged_scale).items():
                module: Any = model.language_model.get_submodule(name)
                module.weight.data = add_lora(module, module.weight.data, parts, dtype)
        for parameter in model.parameters():  # not before: so do the full form's, LoRA merged
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        model.note_backbone()
        return model.to(causal.device).eval()  # type: ignore[arg-type]

    def set_texts(
        self,
        processor: "CCFLLMProcessor",
        cache: str | Path | None = None,
        space: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the words of every catalog item, in table order: their token ids, or the vectors of
        what a language model makes of them.

        Args:
            cache, dtype: see `from_backbone`.
            space: of the vectors, as [`read_text_space`] gives it. None: learned from the catalog.
        """
        texts, item_text = processor.item_title_ids(), self.model.item_text
        if self.config.item_text == "static":
            self._set_titles(texts)
            return
        if self.changed_weight():  # what the cache knows by the backbone's fingerprint
            cache = None
        states = self._read_catalog(texts, Path(cache) if cache else None, dtype)
        if space is None:
            item_text.fit(states)
        else:
            item_text.load_state_dict(space, strict=False)
        item_text.fill(states)

    def _read_catalog(
        self, texts: list[list[int]], cache: Path | None, dtype: torch.dtype
    ) -> Tensor:
        """States of a catalog's words, shard by shard."""
        config = self.config
        reader = [
            config.sentence_encoder_fingerprint or config.backbone_fingerprint,
            str((self.language_model.dtype, dtype)),
            config.text_layer,
            config.text_prefix_ids,
        ]
        states = torch.empty(len(texts), config.text_width)
        with logging.tqdm(total=len(texts), desc="reading items", unit=" items") as bar:
            for start in range(0, len(texts), SHARD_ITEMS):
                shard = texts[start : start + SHARD_ITEMS]
                name = hashlib.sha256(json.dumps([reader, shard]).encode()).hexdigest()
                file = cache / f"{name}.safetensors" if cache else None
                if file and file.is_file():
                    with reading(file):
                        found = read_tensors(str(file))[0]["states"].view(len(shard), -1)
                else:
                    lower = dtype != torch.float32
                    with torch.autocast(self.device.type, dtype, enabled=lower):
                        found = self.model.read_texts(shard)
                    if file:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_tensors(file, {"states": found}, {"format_version": FORMAT_VERSION})
                states[start : start + len(shard)] = found
                bar.update(len(shard))
        return states

    def _set_titles(self, titles: list[list[int]]) -> None:
        self.config.num_title_tokens = sum(map(len, titles))
        values = {
            "title_ids": [token for title in titles for token in title],
            "title_lengths": [len(title) for title in titles],
        }
        for name, value in values.items():
            old = getattr(self.model.item_text, name)
            new = torch.tensor(value, dtype=old.dtype, device=old.device)
            setattr(self.model.item_text, name, new)

    def replace_catalog(
        self,
        processor: "CCFLLMProcessor",
        cf: Any = None,
        text_cache: str | Path | None = None,
    ) -> Self:
        """Put another catalog of items and users under the trained weights, in place.

        Backbone, LoRA, gate, cold vectors and score stay, and the space of the text vectors, in
        which the new items' words are read. So do the alignment networks, when the
        new CF vectors are as wide as the old ones; else they start afresh and must be trained. A
        log line says which. The calibration (`config.logit_temperature`) is that of the old data.

        Args:
            processor: over the new catalog: `old_processor.with_catalog(item_ids, ...)`.
            cf: a `CFVectors` of the same ids; None: no CF vectors, so that every user and item is
                read as cold, an item by its title.
            text_cache: see `from_backbone`.

        Returns:
            This model.

        Raises:
            ValueError: `cf` has other ids than `processor`, or the processor another tokenizer.
        """
        self._check_new_catalog(processor, cf)
        config, old_dim = self.config, self.config.cf_dim
        without_cf = {
            "num_users": len(processor.user_ids),
            "num_items": len(processor.item_ids),
            "num_field_values": 0,
            "num_item_values": 0,
            "cf_model": "",
            "ids_fingerprint": processor.ids_fingerprint,
            "cf_user_precision": None,
        }
        config.update(without_cf if cf is None else cf_settings(cf))
        space = None
        if config.item_text == "contextual":
            space = {name: getattr(self.model.item_text, name) for name in TEXT_SPACE}
        self.set_texts(processor, text_cache, space)
        self.model.renew_cf()
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

    def _check_new_catalog(self, processor: "CCFLLMProcessor", cf: Any) -> None:
        check_same_ids(processor, cf)
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
            fresh = type(old)(self.config, self.config.cf_dim)
            setattr(self.model, f"{side}_alignment", fresh.to(old.out.weight))


def check_same_ids(processor: "CCFLLMProcessor", cf: Any) -> None:
    """Raise a `ValueError` when CF vectors are of other users or items than a processor's."""
    if cf is not None and cf.fingerprint != processor.ids_fingerprint:
        raise ValueError(
            "cf and processor name other users or items, or in another order: make the processor "
            "of cf.item_ids, cf.item_titles, cf.user_ids and, as field_values, cf.field_values."
        )


def cf_settings(cf: Any) -> dict[str, Any]:
    """The part of a configuration that a `CFVectors` decides."""
    return {
        "num_users": len(cf.user_ids),
        "num_items": len(cf.item_ids),
        "num_field_values": len(cf.field_values),
        "num_item_values": 0 if cf.item_values is None else cf.item_values.shape[1],
        "cf_dim": cf.item_vectors.shape[2],
        "cf_model": cf.model_name,
        "ids_fingerprint": cf.fingerprint,
        "cf_user_precision": cf.user_precision,
    }


def text_settings(
    processor: "CCFLLMProcessor", text_config: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """The part of a new model's configuration that says how items' words are read (our choice)."""
    reads_words = processor.uses_slots and settings.get("fusion") != "cf_only"
    kind = settings.get("item_text") or ("contextual" if reads_words else "static")
    if kind == "static":
        return {"item_text": kind}
    encoder, revision = settings.get("sentence_encoder"), settings.get("sentence_encoder_revision")
    if encoder:
        text_config = AutoConfig.from_pretrained(local_copy(encoder), revision=revision)
    layers, width = text_config.num_hidden_layers, text_config.hidden_size
    return {
        "item_text": kind,
        "text_dim": min(settings.get("text_dim") or 128, width),
        "text_layer": settings.get("text_layer") or (layers if encoder else layers // 2),
        "text_width": width,
        "text_prefix_ids": [] if encoder else processor.text_prefix_ids(),
    }


def space_fingerprint(mean: Tensor, projection: Tensor) -> str:
    """Sha256 (hex) of what makes text vectors of states."""
    digest = hashlib.sha256(mean.float().cpu().numpy().tobytes())
    digest.update(projection.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_text_space(folder: str | Path, config: CCFLLMConfig) -> dict[str, Tensor] | None:
    """Mean and projection of a slim checkpoint's text vectors; None where it has none, or reads
    words otherwise than a model of `config` does."""
    file = Path(folder) / FUSION_FILE
    if not file.is_file():
        return None
    saved = read_json(Path(folder) / "config.json")
    if any(saved.get(name) != getattr(config, name) for name in TEXT_SETTINGS):
        return None
    fusion, _ = read_tensors(str(file))
    return {name: fusion[f"model.item_text.{name}"] for name in TEXT_SPACE}


def load_adapter(
    path: str, hub: dict[str, Any], config: CCFLLMConfig, backbone: PreTrainedModel
) -> Adapter | None:
    """The adapter beside a checkpoint's weights; None where a full one has none.

    Raises:
        OSError: naming the file that is damaged, or of another adapter than the checkpoint's.
    """
    needed, lora = config.checkpoint_form == "slim", config.lora or {}
    file = find_file(path, f"{ADAPTER_FOLDER}/{ADAPTER_FILE}", hub, required=needed)
    if not file:
        return None
    adapter = from_peft(read_tensors(file)[0], backbone, file)
    check_adapter(adapter, lora, backbone, file)
    settings = find_file(path, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}", hub, required=False)
    if settings:
        found = read_json(settings)
        with reading(settings):
            scales = found.keys() >= {"r", "lora_alpha"} and adapter_scale(found)
        if scales and scales != adapter_scale(lora):
            raise OSError(
                f"{settings} and config.json say different lora_alpha, r or use_rslora: restore "
                "the files of one checkpoint."
            )
    return adapter


def note_weight(weight: Tensor) -> tuple[torch.dtype, torch.Size, int, Tensor]:
    """What tells a weight from another: dtype, shape, a sum over all its bits, and a sample."""
    if weight.is_meta:  # offloaded by accelerate
        return weight.dtype, weight.shape, 0, torch.empty(0)
    flat = weight.detach().reshape(-1)
    octets = flat.view(torch.uint8)
    whole = len(octets) // 8 * 8
    total = int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
    return weight.dtype, weight.shape, total, flat[:: max(1, len(flat) // 1024)].cpu().clone()


def is_noted(weight: Tensor, note: tuple[torch.dtype, torch.Size, int, Tensor]) -> bool:
    """Whether a weight is the one noted, or that one cast to another precision. One that is shared
    out over processes is frozen, and taken for it."""
    if isinstance(weight, DTensor):
        return True
    now = note_weight(weight)
    cast = weight.dtype != note[0]
    alike = now[1] == note[1] if cast else now[:3] == note[:3]
    return alike and torch.equal(now[3], note[3].to(weight.dtype))


def local_copy(backbone: str) -> str:
    """The folder in which `ccf-llm train` keeps this backbone, if it is there, else the name.

    `$CCF_LLM_CACHE`, or `~/.cache/ccf_llm_hf`, has folders named like
    `HuggingFaceTB/SmolLM2-135M-Instruct` without its owner, in lower case.
    """
    cache = Path(os.environ.get("CCF_LLM_CACHE") or "~/.cache/ccf_llm_hf").expanduser()
    folder = cache / backbone.rpartition("/")[2].lower()
    complete = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
    return str(folder) if complete and not Path(backbone).is_dir() else backbone


def load_sentence_encoder(config: CCFLLMConfig) -> PreTrainedModel:
    """The sentence encoder that a configuration names, with its fingerprint checked; float32.

    Raises:
        OSError: it cannot be loaded.
        ValueError: its weights are others than those of the checkpoint's text vectors.
    """
    name = local_copy(config.sentence_encoder)
    try:
        encoder = AutoModel.from_pretrained(
            name, revision=config.sentence_encoder_revision, dtype=torch.float32
        )
    except Exception as error:  # whatever transformers makes of damaged files
        raise OSError(
            f"sentence encoder {name!r}, by which this model reads items outside its catalog, "
            "cannot be loaded: make it reachable, or give items of the catalog alone "
            f"({one_line(error)})."
        ) from error
    if hasattr(encoder, "pooler"):  # nobody reads it, and without a file's it would be random
        encoder.pooler = None
    wanted = config.sentence_encoder_fingerprint
    if wanted and backbone_fingerprint(encoder) != wanted:
        raise ValueError(
            f"The weights of sentence encoder {name!r} are not those that this checkpoint's text "
            "vectors were made with: restore them."
        )
    return encoder


def load_backbone(
    config: CCFLLMConfig, backbone: str | Path | PreTrainedModel | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The causal language model of a slim checkpoint, with its fingerprint checked."""
    if isinstance(backbone, PreTrainedModel):
        causal = copy.deepcopy(backbone)
    else:
        recorded = config.backbone_name
        name = str(backbone or recorded)
        if name == recorded.rpartition("/")[2].lower() and not Path(name).is_dir():
            name = recorded  # called as `ccf-llm` calls its copy of it
        revision = config.backbone_revision if name == recorded else None
        name = local_copy(name)
        try:
            causal = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype="auto", **options
            )
        except Exception as error:  # whatever transformers makes of damaged files
            raise OSError(
                f"backbone {name!r} of this slim checkpoint cannot be loaded: give a copy of it "
                f"with backbone=FOLDER, or load the full checkpoint ({one_line(error)})."
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


__all__ = ["CheckpointMixin", "backbone_fingerprint", "read_text_space"]

"""Make one folder in fp32 safetensors out of the files that a language model is published in."""

import shutil
from pathlib import Path

CHUNK = 1 << 20


def join_parts(folder: Path, parts: list[str], whole: str) -> None:
    """Make the file `whole` in `folder` of its parts there, in their order; they are used up."""
    (folder / parts[0]).rename(folder / whole)
    with (folder / whole).open("ab") as file:
        for name in parts[1:]:
            with (folder / name).open("rb") as part:
                shutil.copyfileobj(part, file, CHUNK)
            (folder / name).unlink()


def save_fp32(source: Path, gguf_file: str | None, new: Path) -> None:
    """Write config, fp32 weights and tokenizer of a causal language model to `new`.

    Args:
        source: a folder that `from_pretrained` reads, or one that holds the GGUF.
        gguf_file: its name there, to be dequantized; None for a plain folder.
    """
    # Imported here: they take seconds, and the data sets do not need them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # A model loaded from GGUF refuses to be saved: move its weights to one that was not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(new)
    for file in new.glob("*.safetensors"):  # which are written for the owner alone
        file.chmod(new.stat().st_mode & 0o666)
    tokenizer.save_pretrained(new)

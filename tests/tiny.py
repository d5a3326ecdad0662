"""Names and builders that tests and their fixtures share."""

from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor

TITLES = [
    "Toy Story (1995)",
    "Heat (1995)",
    "Se7en (1995)",
    "Ed Wood {item} (1994)",
    "<|im_end|> the Movie",
    "",
    "Amélie (2001)",
    "Alien (1979)",
]
# Fusion and item format; the last two are CoLLM's and TALLRec's prompts.
ARMS = {
    "gate": ("gate", "slot"),
    "scalar_gate": ("scalar_gate", "slot"),
    "sum": ("sum", "slot"),
    "cf_only": ("cf_only", "slot"),
    "concat": ("cf_only", "title_slot"),
    "text_only": ("gate", "title"),
}
BACKBONES = ("llama", "qwen2", "gemma3", "gpt2")
BuildModel = Callable[..., tuple[CCFLLMForCTR, CCFLLMProcessor]]


def tiny_config(kind: str, vocab_size: int) -> PreTrainedConfig:
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if kind == "llama":
        return LlamaConfig(**shared)
    if kind == "qwen2":
        return Qwen2Config(**shared)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(**shared, head_dim=8, sliding_window=12, layer_types=layers)
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
    )


def put_bos_first(tokenizer: PreTrainedTokenizerFast) -> int:
    """Let a tokenizer put a token before every text, as Gemma's does; returns its id."""
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    return bos


def inject_lora(model: CCFLLMForCTR) -> None:
    """Inject LoRA with random, non-zero weights into every attention projection."""
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.language_model.named_modules()}
    targets = [name for name in ("q_proj", "v_proj", "c_attn", "c_proj") if name in modules]
    lora = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": targets,
        "use_rslora": False,
        "lora_dropout": 0.0,
    }
    model.config.lora = lora
    conv = "c_attn" in targets
    inject_adapter_in_model(LoraConfig(**lora, fan_in_fan_out=conv), model.language_model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in model.lora_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)

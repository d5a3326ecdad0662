"""What a GPU does with this model: invariants, then speed. Run by `benchmarks/gpu.sh`.

It needs torch and transformers alone: the model's code is that which a Hub repository carries, data
are made up, LoRA is written out. What the words of a backbone mean decides no speed, so that a
random one of 1.5 billion weights stands for its kind. A part that fails is noted and the next one
runs; the exit code is 1 where an invariant did not hold.
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from modeling.attention_ccf_llm import (  # noqa: E402
    FLEX_ATTENTION,
    SHARED,
    TILED_ATTENTION,
    BlockMasks,
    Layout,
    block_mask,
    make_tiles,
    packed_attention,
)
from modeling.configuration_ccf_llm import CCFLLMConfig  # noqa: E402
from modeling.modeling_ccf_llm import CCFLLMForCTR  # noqa: E402
from modeling.processing_ccf_llm import CCFLLMProcessor, Request  # noqa: E402
from modeling.ranking_ccf_llm import rank, score  # noqa: E402

BACKBONE = ROOT / "build" / "backbone"
PART = 60_000_000  # bytes
WORDS = ("Night", "City", "Love", "War", "River", "Stone", "Last", "First", "Lost", "Red", "House")
# A backbone's layers, width, heads, key-value heads and feed-forward width.
SHAPES = {"135M": (30, 576, 9, 3, 1536), "1.5B": (28, 1536, 12, 2, 8960)}
DRY = {"135M": (2, 64, 4, 2, 128), "1.5B": (3, 64, 4, 2, 128)}


@dataclass
class Size:
    """What is measured: on a GPU, or dry."""

    device: torch.device
    shapes: dict[str, tuple[int, ...]]
    users: int
    items: int
    tokens: int  # of a batch
    repeats: int
    gemm: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def read_tokenizer() -> Any:
    """That of the carried backbone, or one made of the titles' words."""
    if (BACKBONE / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(BACKBONE)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" Yes No", *WORDS] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<pad>")


def title(item: int) -> str:
    count = len(WORDS)
    parts = (WORDS[item % count], WORDS[item // count % count], str(item))
    return f"The {' '.join(parts)} ({1950 + item % 70})"


def make_processor(size: Size, wording: str = "shared_prefix") -> CCFLLMProcessor:
    items = [f"i{item}" for item in range(size.items)]
    users = [f"u{user}" for user in range(size.users)]
    titles = [title(item) for item in range(size.items)]
    return CCFLLMProcessor(
        read_tokenizer(), items, titles, users, wording=wording, candidate_format="title_slot"
    )


def make_requests(size: Size, candidates: int, users: int) -> list[Request]:
    """Users with 20 liked items, each candidate at a time of its own."""
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> list[str]:
        return [f"i{item}" for item in torch.randint(size.items, (count,), generator=draw).tolist()]

    return [
        Request(
            f"u{user % size.users}",
            some(20),
            some(candidates),
            sorted(torch.randint(21, (candidates,), generator=draw).tolist()),
            torch.randint(2, (candidates,), generator=draw).tolist(),
        )
        for user in range(users)
    ]


class Lora(nn.Module):
    """LoRA of rank 8 on a frozen layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        out, into = base_layer.weight.shape
        self.lora_A = nn.Parameter(torch.randn(8, into) / into**0.5)
        self.lora_B = nn.Parameter(torch.randn(out, 8) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        added = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return self.base_layer(x) + 2 * added.to(x.dtype)


def build(
    shape: tuple[int, ...],
    processor: CCFLLMProcessor,
    device: torch.device,
    dtype: torch.dtype,
    carried: bool = False,
) -> CCFLLMForCTR:
    """A gate over random CF vectors, LoRA on queries and values; `dtype` is that of the frozen
    backbone, carried or random."""
    layers, width, heads, kv_heads, wide = shape
    yes, no = processor.answer_token_ids()
    config = CCFLLMConfig(
        text_config=LlamaConfig(
            vocab_size=max(len(processor.tokenizer), 600),
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=8192,
        ),
        num_users=len(processor.user_ids),
        num_items=len(processor.item_ids),
        cf_dim=32,
        cf_logit=True,
        slot_scale=0.02,
        yes_token_id=yes,
        no_token_id=no,
        item_slot_token_id=processor.item_slot_token_id,
        user_slot_token_id=processor.user_slot_token_id,
        checkpoint_form="full",
    )
    torch.manual_seed(0)
    model = CCFLLMForCTR(config)
    if carried:
        model.attach_backbone(AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32))
    else:
        nn.init.normal_(model.answer_weight)
    model.set_texts(processor)
    for name in ("user_vectors", "item_vectors"):
        getattr(model.cf, name).normal_()
        getattr(model.cf, name.replace("vectors", "known")).fill_(True)
    model.requires_grad_(False)
    for layer in model.language_model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    model.to(device)
    learning = [model.answer_scale, model.cf_logit_scale]
    learning += [weight for _, weight in model.fusion_parameters() + model.lora_parameters()]
    for weight in learning:
        weight.requires_grad_(True)
    for weight in model.language_model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return model.eval()


def on(device: torch.device, batch: Any) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def differ(left: Tensor, right: Tensor) -> float:
    return float((left.float().cpu() - right.float().cpu()).abs().max())


def check_attention(size: Size) -> dict[str, Any]:
    """Each way of attending to a packed row against a dense mask, in both precisions."""
    processor = make_processor(size)
    batch = processor.pack(make_requests(size, 8, max(2, size.tokens // 200)))
    names = ("sequence_ids", "block_ids", "history_depths", "position_ids")
    layout = Layout(*(batch[name][0].to(size.device) for name in names))
    length, found = len(layout.block_ids), {}
    for dtype in (torch.float32, torch.bfloat16):
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, length, 64, generator=draw).to(size.device, dtype)
            for heads in (4, 2, 2)
        )
        exact = scaled_dot_product_attention(
            *(part.float() for part in (query, key, value)),
            attn_mask=block_mask(layout),
            enable_gqa=True,
        ).transpose(1, 2)
        ways: dict[str, Callable[[], Tensor]] = {
            "dense sdpa": lambda q=query, k=key, v=value: scaled_dot_product_attention(
                q, k, v, attn_mask=block_mask(layout), enable_gqa=True
            ).transpose(1, 2),
            "tiles": lambda q=query, k=key, v=value: packed_attention(
                nn.Identity(), q, k, v, None, packed=make_tiles(layout)
            )[0],
            "flex": lambda q=query, k=key, v=value: packed_attention(
                nn.Identity(), q, k, v, None, packed=BlockMasks(layout)
            )[0],
            "varlen": lambda q=query, k=key, v=value: varlen(layout, q, k, v),
        }
        for name, attend in ways.items():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            if name == "varlen" and size.is_gpu and dtype == torch.float32:
                continue  # flash attention is for half precision
            most = 1e-4 if dtype == torch.float32 else 3e-2
            found[label] = attempt(lambda a=attend, e=exact, m=most: holds(differ(a(), e), m))
    return {"tokens": length, **found}


def varlen(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `packed_attention`, each block of tokens as a sequence of its own behind a copy of what it
    sees. The kernel lets the last query see all keys."""
    columns = torch.arange(len(layout.block_ids), device=query.device)
    shared = layout.sequence_ids == SHARED
    asked, seen = [], []
    for sequence in layout.sequence_ids.unique().tolist():
        for block in layout.block_ids[layout.sequence_ids == sequence].unique().tolist():
            own = (layout.sequence_ids == sequence) & (layout.block_ids == block)
            depth = layout.history_depths[own].max()
            before = (layout.sequence_ids == sequence) & (layout.block_ids == 0)
            before &= layout.history_depths <= depth
            asked.append(columns[own])
            seen.append(columns[own | before | shared])
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    answers = torch.empty_like(q)
    if query.device.type == "cpu":
        parts = []
        for ask, see in zip(asked, seen, strict=True):
            late = torch.ones(len(ask), len(see), dtype=torch.bool).tril(len(see) - len(ask))
            one = scaled_dot_product_attention(
                *(states.transpose(0, 1) for states in (q[ask], k[see], v[see])),
                attn_mask=late,
                enable_gqa=True,
            )
            parts.append(one.transpose(0, 1))
        answers[torch.cat(asked)] = torch.cat(parts)
        return answers[None]
    from torch.nn.attention.varlen import varlen_attn

    def ends(parts: list[Tensor]) -> Tensor:
        lengths = torch.tensor([0, *map(len, parts)], device=query.device)
        return lengths.cumsum(0).to(torch.int32)

    answers[torch.cat(asked)] = varlen_attn(
        q[torch.cat(asked)],
        k[torch.cat(seen)],
        v[torch.cat(seen)],
        ends(asked),
        ends(seen),
        max(map(len, asked)),
        max(map(len, seen)),
        window_size=(-1, 0),
        enable_gqa=True,
    )
    return answers[None]


def check_packing(size: Size) -> dict[str, Any]:
    """A packed row scores as each of its samples alone, and as on the CPU in float32."""
    found: dict[str, Any] = {}
    shape = (4, 256, 4, 2, 512) if size.is_gpu else size.shapes["135M"]
    for wording in ("shared_prefix", "question_last"):
        processor = make_processor(size, wording)
        requests = make_requests(size, 3, 2)
        exact = build(shape, processor, torch.device("cpu"), torch.float32)
        exact.language_model.set_attn_implementation("eager")
        truth = logits_of(exact, processor, requests)
        for dtype in (torch.float32, torch.bfloat16):
            model = build(shape, processor, size.device, dtype)
            most = 1e-4 if dtype == torch.float32 else 0.1 * float(truth.std())
            for name in ("eager", "sdpa", TILED_ATTENTION, FLEX_ATTENTION):
                model.language_model.set_attn_implementation(name)
                label = f"{wording} {name} {str(dtype).removeprefix('torch.')}"
                worst = attempt(partial(packing_error, model, processor, requests, truth))
                found[label] = worst if isinstance(worst, dict) else holds(worst, most)
    return found


def logits_of(model: CCFLLMForCTR, processor: CCFLLMProcessor, requests: list[Request]) -> Tensor:
    with torch.no_grad():
        return model(**on(model.device, processor.pack(requests))).logits


def packing_error(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, requests: list[Request], truth: Tensor
) -> float:
    """How far logits of packed requests are from `truth`, and from those of each sample alone."""
    packed = logits_of(model, processor, requests)
    worst = differ(packed, truth)
    for row, one in zip(packed, requests, strict=True):
        samples = zip(one.candidates, one.history_lengths or [], strict=True)
        for place, (item, length) in enumerate(samples):
            alone = Request(one.user, one.history[:length], [item], [length])
            worst = max(worst, differ(row[place], logits_of(model, processor, [alone])[0, 0]))
    return worst


def check_step(size: Size) -> dict[str, Any]:
    """One step of training gives the weights that it gives on the CPU."""
    processor = make_processor(size)
    batch = processor.pack(make_requests(size, 8, 4))
    shape = (4, 256, 4, 2, 512) if size.is_gpu else size.shapes["135M"]
    trained = []
    for device in (torch.device("cpu"), size.device):
        model = build(shape, processor, device, torch.float32)
        # Not AdamW, whose first step takes the sign of a gradient for the gradient.
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
        model(**on(device, batch)).loss.backward()
        optimizer.step()
        learned = (item for item in model.named_parameters() if item[1].requires_grad)
        trained.append({name: weight.detach().cpu() for name, weight in learned})
    worst = max(differ(weight, trained[1][name]) for name, weight in trained[0].items())
    return holds(worst, 1e-4)


def measure_gemm(size: Size) -> float:
    """TFLOP/s of a large matrix product in bfloat16; dry: a small one in float32."""
    dtype = torch.bfloat16 if size.is_gpu else torch.float32
    left = torch.randn(size.gemm, size.gemm, device=size.device, dtype=dtype)
    seconds = timed(size, lambda: left @ left)
    return 2 * size.gemm**3 / seconds / 1e12


def timed(size: Size, call: Callable[[], Any], warm: int = 3) -> float:
    """Median seconds of a call."""
    taken = []
    for number in range(warm + size.repeats):
        size.wait()
        started = time.perf_counter()
        call()
        size.wait()
        if number >= warm:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure_model(size: Size, name: str, gemm: float) -> dict[str, Any]:
    """Training, ranking and scoring of one backbone."""
    processor = make_processor(size)
    carried = name == "135M" and (BACKBONE / "model.safetensors").is_file() and size.is_gpu
    if size.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if size.is_gpu else torch.float32
    model = build(size.shapes[name], processor, size.device, dtype, carried)
    weights = sum(w.numel() for w in model.language_model.layers.parameters())
    found: dict[str, Any] = {"weights": "carried" if carried else "random", "layers": weights}

    requests = make_requests(size, 32, size.users)
    tokens = processor.count_tokens(requests[0])
    requests = (requests * 100)[: max(1, size.tokens // tokens)]
    batch = on(size.device, processor.pack(requests))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def train() -> dict[str, Any]:
        model.train()
        seconds, length = timed(size, step), batch["input_ids"].shape[1]
        # Frozen weights: forward, and backward for the states alone.
        flops = 4 * weights * length / seconds / 1e12
        return {
            "tokens": length,
            "labels_per_second": round(len(requests) * 32 / seconds, 1),
            "tokens_per_second": round(length / seconds, 1),
            "tflops": round(flops, 3),
            "share_of_gemm": round(flops / gemm, 4),
        }

    def rank_hundred() -> dict[str, Any]:
        one = make_requests(size, 100, 1)[0]
        request = [Request(one.user, one.history, one.candidates)]
        model.eval()
        seconds = timed(size, lambda: rank(model, processor, request))
        return {"candidates": 100, "p50_ms": round(1000 * seconds, 2)}

    def score_rows() -> dict[str, Any]:
        rows = [Request(r.user, r.history, r.candidates) for r in requests]
        seconds = timed(size, lambda: score(model, processor, rows, tokens_per_batch=size.tokens))
        return {"rows_per_second": round(len(rows) * 32 / seconds, 1)}

    for part, run in (("training", train), ("ranking", rank_hundred), ("scoring", score_rows)):
        found[part] = attempt(run)
    if size.is_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"peak_memory_gb": round(peak / 1e9, 3)}


def holds(worst: float, most: float) -> dict[str, Any]:
    return {"difference": worst, "at_most": most, "holds": worst <= most}


def attempt(run: Callable[[], Any]) -> Any:
    """What a part found, or what stopped it."""
    try:
        return run()
    except Exception as problem:  # whatever a kernel, a compiler or a lack of memory says
        traceback.print_exc()
        return {"failed": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}


def failures(found: Any) -> int:
    """How many invariants did not hold, or could not be looked at."""
    if not isinstance(found, dict):
        return 0
    return ("failed" in found or found.get("holds") is False) + sum(map(failures, found.values()))


def describe() -> dict[str, Any]:
    found = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
        "device": "cpu",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    return found


def pack(folder: Path) -> None:
    """A backbone in half precision, in parts that are carried one by one."""
    BACKBONE.mkdir(parents=True, exist_ok=True)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(BACKBONE)
    AutoTokenizer.from_pretrained(folder).save_pretrained(BACKBONE)
    file = BACKBONE / "model.safetensors"
    with file.open("rb") as opened:
        for number, part in enumerate(iter(lambda: opened.read(PART), b"")):
            (BACKBONE / f"{file.name}.part-{number:02d}").write_bytes(part)
    file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--pack", type=Path, help="folder of a backbone, to be carried along")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "speed" / "gpu.json")
    arguments = parser.parse_args()
    if arguments.pack:
        shutil.rmtree(BACKBONE, ignore_errors=True)
        pack(arguments.pack)
        return 0
    if arguments.dry:
        size = Size(torch.device("cpu"), DRY, 4, 100, 200, 1, 128)
    elif torch.cuda.is_available():
        size = Size(torch.device("cuda"), SHAPES, 64, 2000, 16_384, 10, 8192)
    else:
        print("error: no CUDA device here: run with --dry", file=sys.stderr)
        return 2
    started = time.perf_counter()
    found: dict[str, Any] = {"dry": arguments.dry, **describe(), "invariants": {}, "speed": {}}
    gemm = measure_gemm(size)
    found["gemm_tflops"] = round(gemm, 3)
    parts: list[tuple[str, str, Callable[[], Any]]] = [
        ("invariants", "attention", lambda: check_attention(size)),
        ("invariants", "packed is alone", lambda: check_packing(size)),
        ("invariants", "a step is the CPU's", lambda: check_step(size)),
        *(("speed", name, lambda n=name: measure_model(size, n, gemm)) for name in size.shapes),
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for section, name, run in parts:
        found[section][name] = attempt(run)
        found["seconds"] = round(time.perf_counter() - started, 1)
        # After each part: what ends the run early loses that part alone.
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{found['seconds']:7.1f} s  {name}", file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 1 if failures(found["invariants"]) else 0


if __name__ == "__main__":
    sys.exit(main())

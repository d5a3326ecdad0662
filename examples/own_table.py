"""From a table of ratings to a ranked list: prepare, fit CF, train, rank.

    python examples/own_table.py ratings.csv runs/own

The columns of ratings.csv: user_id, item_id, title, rating (4 and more is liked) and timestamp
(Unix seconds or ISO dates). Without arguments a small table of invented readers and books is made,
in runs/own_table; that takes a few minutes on a laptop. `ccf-llm prepare table --help` lists how
other columns, label columns and splits are named.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed

from ccf_llm_hf import (
    CCFLLMForCTR,
    CCFLLMProcessor,
    CTRRanker,
    CTRTrainer,
    CTRTrainingArguments,
)
from ccf_llm_hf.cf import MFConfig, fit_cf
from ccf_llm_hf.data import PrepareConfig, load_backbone_path, load_prepared, prepare

WORDS = {"crime": ("Murder", "The Detective"), "garden": ("Roses", "The Gardener")}
PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Kyoto", "Sofia", "Tunis", "Riga")


def invent_table(path: Path, users: int = 60) -> Path:
    """Write ratings of readers who like either crime or gardens, and now and then the other."""
    draw = np.random.default_rng(0)
    books = [
        (kind, f"{word} of {place}") for kind in WORDS for word in WORDS[kind] for place in PLACES
    ]
    rows = []
    for user in range(users):
        taste = ("crime", "garden")[user % 2]
        for item in draw.permutation(len(books))[:24]:
            kind, title = books[item]
            liked = (kind == taste) != (draw.random() < 0.1)
            rating, time = (5 if liked else 2), int(draw.integers(1_600_000_000, 1_700_000_000))
            rows.append((f"reader {user}", f"book {item}", title, rating, time))
    columns = ["user_id", "item_id", "title", "rating", "timestamp"]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def build(table: Path, out: Path, backbone: str = "smollm2-135m-instruct") -> CTRRanker:
    """A ranker trained on a table of ratings; its checkpoint lies in `out/checkpoint`."""
    prepare(
        PrepareConfig(
            source="table", interactions=str(table), rating_column="rating", out=str(out / "data")
        )
    )
    data = load_prepared(out / "data")
    cf = fit_cf("mf", out / "data", out / "cf", MFConfig())

    folder, revision = load_backbone_path(backbone)
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    processor = CCFLLMProcessor(tokenizer, cf.item_ids, cf.item_titles, cf.user_ids)
    set_seed(0)
    model = CCFLLMForCTR.from_backbone(
        folder,
        processor,
        revision=revision,
        backbone_name=backbone,
        cf=cf,
        cf_logit=True,
    )
    args = CTRTrainingArguments(
        output_dir=str(out / "checkpoint"),
        labels_per_step=64,
        num_train_epochs=2,
        learning_rate=1e-2,
    )
    trainer = CTRTrainer(
        model,
        args,
        data.splits["train"],
        data.splits["validation"],
        processor,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        cf=cf,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.predict(data.splits["test"]).metrics or {}
    print(f"test AUC {metrics['test_auc']:.3f}, UAUC {metrics['test_uauc']:.3f}")
    return CTRRanker(model, processor)


def main() -> None:
    """Build a ranker and rank the catalog for one user of the table and for a new one."""
    out = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/own_table")
    table = Path(sys.argv[1]) if len(sys.argv) > 1 else invent_table(out / "ratings.csv")
    ranker = build(table, out)
    likes = ranker.processor.item_titles[:2]
    print(f"for a new user who likes {' and '.join(likes)}:")
    for place, item in enumerate(ranker.rank(history=likes, top_k=5), start=1):
        print(f"{place:>2}. {item.probability:.3f}  {item.title}")


if __name__ == "__main__":
    main()

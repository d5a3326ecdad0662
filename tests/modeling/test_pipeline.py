"""`pipeline("ctr-ranking")`, beside the package and without it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BuildModel
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, Pipeline, pipeline

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CTRRanker
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES
from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline
from ccf_llm_hf.modeling.ranking_ccf_llm import rank

INPUTS: list[dict[str, Any]] = [
    {
        "user": "u0",
        "history": ["i1", "i2", "Alien (1979)"],
        "candidates": ["i0", "i3", "A new film (2024)"],
    },
    {"history": ["i0"], "candidates": ["Another new film", {"id": "i4"}, "i7"], "top_k": 2},
    {"user": "nobody", "candidates": [{"id": "x", "title": "A new film (2024)"}, "Se7en (1995)"]},
    {"user": "u1", "history": ["i3", "A new film (2024)"]},
]
LONG = 130  # candidates; their tokens do not fit a forward pass of 64
KEYS = ["item_id", "title", "probability", "logit", "text_share", "cf_share", "known"]


@pytest.fixture
def ranker(build: BuildModel) -> Pipeline:
    model, processor = build(cf_logit=True)
    model.config.logit_temperature = 1.7
    return pipeline("ctr-ranking", model=model, processor=processor)


def expected(ranker: Pipeline, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The list that `CTRRanker` gives."""
    found = CTRRanker(ranker.model, ranker.processor).rank(
        user=inputs.get("user"),
        history=inputs.get("history"),
        candidates=inputs.get("candidates"),
        top_k=inputs.get("top_k", 10),
    )
    return [asdict(item) for item in found]


def assert_same_lists(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [item["title"] for item in found] == [item["title"] for item in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def by_title(found: list[dict[str, Any]]) -> dict[str, float]:
    return {item["title"]: item["logit"] for item in found}


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_list_is_that_of_the_ranker(ranker: Pipeline, inputs: dict[str, Any]) -> None:
    found = ranker(inputs)
    assert [list(item) for item in found] == [KEYS] * len(found)
    assert_same_lists(found, expected(ranker, inputs))


def test_logits_are_those_of_the_model(ranker: Pipeline) -> None:
    inputs = INPUTS[0]
    with torch.no_grad():
        logits = ranker.model(**ranker.processor(**inputs)).logits[0]
    titles = [ranker.processor.resolve_item(item)[1] for item in inputs["candidates"]]
    wanted = dict(zip(titles, logits.tolist(), strict=True))
    for item in ranker(inputs):
        assert item["logit"] == pytest.approx(wanted[item["title"]], abs=1e-5)
        assert item["probability"] == pytest.approx(
            torch.sigmoid(torch.tensor(item["logit"]) / 1.7).item(), abs=1e-6
        )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_users_share_a_forward_pass(
    ranker: Pipeline, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = ranker.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["candidate_users"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(ranker.model, "forward", counting)
    found = ranker(INPUTS, batch_size=batch_size)
    assert sizes == [len(INPUTS[n : n + batch_size]) for n in range(0, len(INPUTS), batch_size)]
    for one, inputs in zip(found, INPUTS, strict=True):
        assert_same_lists(one, expected(ranker, inputs))


def test_long_lists_share_one_reading_of_the_history(
    ranker: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = [f"Sequel {number}" for number in range(LONG)]
    inputs = {"history": ["i0", "i1"], "candidates": titles, "top_k": 1000}
    wanted = expected(ranker, inputs)
    lengths: list[int] = []
    forward = ranker.model.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(ranker.model.model, "forward", counting)
    monkeypatch.setitem(rank.__kwdefaults__, "tokens_per_batch", 64)
    alone = by_title(ranker(inputs))
    row = ranker.processor(history=["i0", "i1"], candidates=titles)["input_ids"]
    assert len(lengths) > 2 and sum(lengths) == row.shape[1], "every token goes through once"
    # By title: titles of the same tokens in another order tie, up to rounding.
    assert alone == pytest.approx(by_title(wanted), abs=1e-5) and len(alone) == len(titles)
    both = ranker([INPUTS[0], inputs, INPUTS[1]], batch_size=3)
    assert by_title(both[1]) == pytest.approx(alone, abs=1e-5)
    assert_same_lists(both[0], expected(ranker, INPUTS[0]))
    assert_same_lists(both[2], expected(ranker, INPUTS[1]))


@pytest.mark.parametrize(
    "prompt", [{"wording": "question_last"}, {"templates": {"prefix": ""}}], ids=str
)
def test_long_lists_work_in_every_prompt(
    build: BuildModel, prompt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rank.__kwdefaults__, "tokens_per_batch", 64)
    model, processor = build()
    settings = {name: getattr(processor, name) for name in ("history_format", "candidate_format")}
    catalog = (processor.item_ids, processor.item_titles, processor.user_ids)
    processor = CCFLLMProcessor(processor.tokenizer, *catalog, **settings, **prompt)
    ranker = pipeline("ctr-ranking", model=model, processor=processor)
    titles = [f"Sequel {number}" for number in range(LONG)]
    found = by_title(ranker({"candidates": titles, "top_k": 1000}))
    for title in (titles[0], titles[-1]):
        (alone,) = ranker({"candidates": [title]})
        assert found[title] == pytest.approx(alone["logit"], abs=1e-4)


def test_top_k_and_preselect_are_parameters_of_pipeline_and_call(ranker: Pipeline) -> None:
    assert [len(found) for found in ranker(INPUTS, top_k=1)] == [1, 2, 1, 1]
    assert len(ranker({"user": "u1"}, preselect=3)) == 3
    short = pipeline("ctr-ranking", model=ranker.model, processor=ranker.processor, top_k=2)
    assert len(short(INPUTS[0])) == 2
    assert ranker([]) == []


def test_a_list_varies_where_asked_to(build: BuildModel) -> None:
    fields = [{"author": "one"}] * 4 + [{}] * 4
    model, processor = build(prompt={"evidence_fields": ["author"], "item_fields": fields})
    inputs = {"candidates": [f"i{row}" for row in range(8)]}
    ranker = pipeline("ctr-ranking", model=model, processor=processor, max_per_topic=2)
    assert [len(found) for found in ranker([inputs, inputs])] == [6, 6]
    assert len(ranker(inputs, max_per_topic=1)) == 5
    with pytest.raises(ValueError, match="max_per_topic=0 must"):
        ranker(inputs, max_per_topic=0)


def test_reasons_are_those_of_the_ranker(ranker: Pipeline) -> None:
    explain: Any = ranker.explain  # type: ignore[attr-defined]
    found = explain(INPUTS[0])
    asked = CTRRanker(ranker.model, ranker.processor)
    for item, reasons in zip(INPUTS[0]["candidates"], found, strict=True):
        wanted = asdict(asked.explain("u0", INPUTS[0]["history"], item=item))
        for name in ("start", "words", "behavior", "cf", "history"):
            assert reasons[name] == pytest.approx(wanted[name], abs=1e-4), name
        assert [line["title"] for line in reasons["lines"]] == [
            line["title"] for line in wanted["lines"]
        ]


def test_generators_stream(ranker: Pipeline) -> None:
    asked: list[int] = []

    def users() -> Any:
        for number, inputs in enumerate(INPUTS):
            asked.append(number)
            yield inputs

    found = ranker(users(), batch_size=2)
    assert_same_lists(next(iter(found)), expected(ranker, INPUTS[0]))
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("Heat (1995)", "takes a dict with the keys user, history"),
        ({"users": "u0"}, r"not \['users'\]"),
        ({"user": ["u0"], "candidates": ["i0"]}, "is no id"),
        ({"history": "i0", "candidates": ["i1"]}, "history is 'i0': give a list"),
        ({"history": ["i0"], "candidates": "i1"}, "candidates is 'i1': give a list"),
        ({"history": [" "], "candidates": ["i1"]}, "history: item 0"),
        ({"candidates": ["i1", None]}, "candidates: item 1"),
        ({"candidates": [{"name": "i1"}]}, "candidates: item 0"),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": ["i0"], "top_k": 0}, "top_k=0"),
        ({"candidates": ["i0"], "top_k": "5"}, "top_k='5'"),
        ({"user": "u0", "history": [f"i{row}" for row in range(8)]}, "holds every item"),
    ],
)
def test_bad_input_is_named_in_one_sentence(ranker: Pipeline, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as alone:
        ranker(inputs)
    assert "\n" not in str(alone.value)
    with pytest.raises(ValueError, match=f"input 1: .*{message}"):
        ranker([INPUTS[0], inputs], batch_size=2)


def test_unknown_parameters_are_refused(ranker: Pipeline) -> None:
    with pytest.raises(ValueError, match="no parameter 'k'"):
        ranker(INPUTS[0], k=3)


def test_no_candidates_can_be_chosen_without_cf(build: BuildModel) -> None:
    model, processor = build("text_only")
    model.cf.item_known.zero_()
    with pytest.raises(ValueError, match="no CF vectors to choose items by"):
        pipeline("ctr-ranking", model=model, processor=processor)({"user": "u0"})


def test_a_saved_pipeline_is_a_checkpoint(ranker: Pipeline, tmp_path: Path) -> None:
    ranker.save_pretrained(tmp_path)
    assert {*CODE_FILES, "item_catalog.jsonl", "tokenizer.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    model = AutoModel.from_pretrained(tmp_path)
    again = CTRRankingPipeline(model, processor=AutoProcessor.from_pretrained(tmp_path))
    assert_same_lists(again(INPUTS[0]), ranker(INPUTS[0]))


CLEAN = """
import json, sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
sys.modules["peft"] = None
from transformers import AutoModel, AutoProcessor, pipeline
folder, inputs, kwargs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
try:
    pipeline("ctr-ranking", model=folder, trust_remote_code=False, model_kwargs=kwargs)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
ranker = pipeline("ctr-ranking", model=folder, trust_remote_code=True, model_kwargs=kwargs)
found = ranker(inputs, batch_size=3)
print(ranker.model.config, file=sys.stderr)
ranker.save_pretrained(sys.argv[4])
again = pipeline("ctr-ranking", model=sys.argv[4], trust_remote_code=True, model_kwargs=kwargs)
assert again(inputs, batch_size=3) == found
# The code goes along where only the model was loaded, too.
model = AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)
model.save_pretrained(sys.argv[5])
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(sys.argv[5])
once_more = pipeline("ctr-ranking", model=sys.argv[5], trust_remote_code=True, model_kwargs=kwargs)
assert once_more(inputs, batch_size=3) == found
print("FOUND", json.dumps([found, str(model.dtype)]))
"""


@pytest.mark.parametrize("form", ["full", "slim"])
def test_runs_where_the_package_is_not_installed(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True, cf_logit=True)
    model.save_pretrained(tmp_path / "saved", form=form)
    processor.save_pretrained(tmp_path / "saved")
    backbone = {"backbone": str(backbone_folder())} if form == "slim" else {}
    run = subprocess.run(
        [
            *(sys.executable, "-c", CLEAN, str(tmp_path / "saved"), json.dumps(INPUTS)),
            *(json.dumps(backbone), str(tmp_path / "again"), str(tmp_path / "once_more")),
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found, dtype = json.loads(run.stdout.split("FOUND ")[1])
    assert dtype == "torch.float32"
    here = pipeline("ctr-ranking", model=model, processor=processor)
    for one, inputs in zip(found, INPUTS, strict=True):
        assert_same_lists(one, expected(here, inputs))


def test_dtype_auto_is_the_checkpoints_not_its_backbones(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path / "slim", form="slim")
    processor.save_pretrained(tmp_path / "slim")
    plain = AutoModelForCausalLM.from_pretrained(backbone_folder(), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "bfloat16")
    place = {"backbone": str(tmp_path / "bfloat16")}
    loaded = AutoModel.from_pretrained(tmp_path / "slim", dtype="auto", **place)
    assert loaded.language_model.dtype == torch.float32


def test_the_package_runs_no_code_of_the_checkpoint(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "custom_pipelines" in json.loads((tmp_path / "config.json").read_text())
    for trust in (None, True):
        ranker = pipeline("ctr-ranking", model=str(tmp_path), trust_remote_code=trust)
        assert type(ranker) is CTRRankingPipeline and type(ranker.model) is CCFLLMForCTR
    # Such a model, saved again, still carries the pipeline.
    ranker.model.save_pretrained(tmp_path / "again")
    assert "custom_pipelines" in json.loads((tmp_path / "again" / "config.json").read_text())


def test_ids_and_containers_are_read_as_everywhere(ranker: Pipeline) -> None:
    wanted = ranker({"user": "u0", "history": ["i0"], "candidates": ["i1", "i2"]})
    asked = {"user": b"u0 ", "history": np.array(["i0"]), "candidates": iter(["i1", "i2"])}
    assert_same_lists(ranker(asked), wanted)
    strangers = [ranker({"user": user, "candidates": ["i1"]}) for user in (None, float("nan"), "")]
    for found in strangers:
        assert_same_lists(found, strangers[0])

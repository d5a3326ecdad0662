"""The gate over the catalog, in a card's words."""

import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from ccf_llm_hf.data import load_prepared
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.gate import gate_report


def test_gate_report_is_that_of_the_items(checkpoint, prepared):
    model, processor = load_checkpoint(str(checkpoint))
    report = gate_report(model, processor, prepared)
    gates = model.item_gates(torch.arange(6))
    assert (report["catalog"], report["items"]) == (6, 6)
    assert report["mean"] == pytest.approx(gates.mean().item(), abs=1e-6)
    assert report["std"] == pytest.approx(gates.std(correction=0).item(), abs=1e-6)
    assert report["item_std"] == pytest.approx(gates.mean(1).std(correction=0).item(), abs=1e-6)
    assert report["dimension_std"] == pytest.approx(
        gates.mean(0).std(correction=0).item(), abs=1e-6
    )


@pytest.fixture
def few_rows(checkpoint, monkeypatch):
    """Training rows of four of the six items, the one oftener than the other."""
    model, processor = load_checkpoint(str(checkpoint))
    counts = [3, 0, 12, 1, 0, 2]
    items = [item for item, n in zip(processor.item_ids, counts, strict=True) for _ in range(n)]
    rows = pd.DataFrame({"item_id": items})
    monkeypatch.setattr("ccf_llm_hf.inference.gate.read_rows", lambda *_: rows)
    return model, processor, counts


def test_the_correlation_is_spearmans_over_items(few_rows):
    model, processor, counts = few_rows
    report = gate_report(model, processor, "any")
    shares = model.item_gates(torch.arange(6)).mean(1).tolist()
    assert report["spearman"] == pytest.approx(spearmanr(shares, counts).statistic)
    low, high = report["spearman_ci"]
    assert -1 <= low <= report["spearman"] <= high <= 1
    with torch.no_grad():
        model.model.gate.linear.weight.zero_()
        model.model.gate.evidence_weight.zero_()
    flat = gate_report(model, processor, "any")
    assert (flat["spearman"], flat["spearman_ci"]) == (None, None)


def test_items_without_rows_are_apart_by_what_is_known_of_them(few_rows):
    model, processor, _ = few_rows
    model.cf.item_known[1], model.cf.item_known[4] = True, False
    classes = gate_report(model, processor, "any")["by_popularity"]
    sizes = {part["train_rows"]: part["items"] for part in classes}
    assert sizes == {"0, known by fields": 1, "0": 1, "1 to 9": 3, "10 to 99": 1}
    gates = model.item_gates(torch.tensor([1]))
    assert classes[0]["mean"] == pytest.approx(gates.mean().item(), abs=1e-6)


def test_popularity_classes_hold_every_item_once(checkpoint, prepared):
    model, processor = load_checkpoint(str(checkpoint))
    classes = gate_report(model, processor, prepared)["by_popularity"]
    rows = list(load_prepared(prepared).splits["train"]["item_id"])
    counts = [rows.count(item) for item in processor.item_ids]
    expected = {"0": [], "1 to 9": [], "10 to 99": []}
    for row, count in enumerate(counts):
        expected["0" if count == 0 else "1 to 9" if count < 10 else "10 to 99"].append(row)
    found = {part["train_rows"]: part for part in classes}
    assert set(found) == {name for name, items in expected.items() if items}
    for name, part in found.items():
        gates = model.item_gates(torch.tensor(expected[name]))
        assert part["items"] == len(expected[name])
        assert part["mean"] == pytest.approx(gates.mean().item(), abs=1e-6)


def test_a_large_catalog_is_sampled_evenly(checkpoint, prepared, monkeypatch):
    monkeypatch.setattr("ccf_llm_hf.inference.gate.ITEMS", 2)
    model, processor = load_checkpoint(str(checkpoint))
    report = gate_report(model, processor, prepared)
    assert (report["catalog"], report["items"]) == (6, 2)
    ends = model.item_gates(torch.tensor([0, 5]))
    assert report["mean"] == pytest.approx(ends.mean().item(), abs=1e-6)


def test_an_arm_without_a_gate_has_no_report(text_only_checkpoint, prepared):
    model, processor = load_checkpoint(str(text_only_checkpoint))
    assert gate_report(model, processor, prepared) is None

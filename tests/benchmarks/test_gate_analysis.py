"""The gate against popularity: invariants on synthetic gates, and on a tiny random model."""

import json
from pathlib import Path

import gate_analysis as module
import numpy as np
import pytest
import torch
from gate_analysis import (
    gate_analysis,
    item_statistics,
    plot_gate_analysis,
    verdict,
)
from prepared_folder import make_rows, write_prepared
from scipy.stats import spearmanr
from tiny import TITLES

from ccf_llm_hf import CTRRanker


def synthetic(slope: float = -0.02, jump: float = 0.1, items: int = 600, noise: float = 0.02):
    """Mean gates that follow popularity among known items, and jump for unknown ones."""
    draw = np.random.default_rng(0)
    popularity = np.floor(np.exp(draw.normal(1.5, 1.6, items))).astype(np.int64)
    popularity[: items // 5] = 0
    known = popularity > 0
    means = 0.5 + slope * np.log1p(popularity) + jump * ~known + noise * draw.normal(size=items)
    return means, popularity, known


def statistics(means, popularity, known):
    return item_statistics(means, popularity, known, resamples=200)


@pytest.fixture
def ranker(build) -> CTRRanker:
    return CTRRanker(*build())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings of the tiny catalog's items, the first of which occurs in test alone."""
    rows = make_rows()
    ids = [f"i{number}" for number in range(len(TITLES))]
    rows = rows[rows["item_id"].isin(ids)].reset_index(drop=True)
    return write_prepared(tmp_path_factory.mktemp("data"), rows)


def test_bins_hold_every_item_once():
    means, popularity, known = synthetic()
    popularity[-8:] = [0, 1, 2, 3, 4, 31, 32, 10_000]
    bins = statistics(means, popularity, known)["by_popularity"]
    names = ["0", "1", "2-3", "4-7", "8-15", "16-31", "32+"]
    assert [part["train_rows"] for part in bins] == names
    ranges = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, np.inf)]
    for part, (low, high) in zip(bins, ranges, strict=True):
        inside = means[(popularity >= low) & (popularity <= high)]
        assert part["items"] == len(inside)
        assert part["mean"] == pytest.approx(inside.mean())
        assert part["quartiles"] == pytest.approx(np.percentile(inside, [25, 75]))
    assert sum(part["items"] for part in bins) == len(means)


def test_spearman_is_scipys_and_inside_its_interval():
    means, popularity, known = synthetic()
    found = statistics(means, popularity, known)["spearman"]
    assert found["all"]["value"] == pytest.approx(spearmanr(means, popularity)[0])
    assert found["known"]["value"] == pytest.approx(spearmanr(means[known], popularity[known])[0])
    for part in found.values():
        assert part["ci"][0] < part["value"] < part["ci"][1]


def test_groups_are_told_apart_by_the_table_not_by_popularity():
    means, popularity, known = synthetic()
    known[np.flatnonzero(popularity == 1)[:15]] = False  # rated, but without a vector
    known[np.flatnonzero(popularity == 0)[:15]] = True
    result = statistics(means, popularity, known)
    assert result["cold"]["items"] == (~known).sum()
    assert result["cold"]["mean"] == pytest.approx(means[~known].mean())
    expected = means[~known].mean() - means[known].mean()
    assert result["cold_minus_warm"]["value"] == pytest.approx(expected)
    top = known & (popularity >= 32)
    assert result["popular"]["items"] == top.sum()
    expected = means[~known].mean() - means[top].mean()
    assert result["cold_minus_popular"]["value"] == pytest.approx(expected)


def test_the_verdict_follows_the_numbers_and_flips_with_the_gates():
    means, popularity, known = synthetic()
    result, flipped = (statistics(m, popularity, known) for m in (means, 1 - means))
    text, opposite = verdict(result), verdict(flipped)
    assert text.startswith("yes: ")
    assert opposite.startswith("no, less text for them: ")
    assert "the rarer, the more text" in text
    assert "the more popular, the more text" in opposite
    difference = result["cold_minus_popular"]
    assert flipped["cold_minus_popular"]["value"] == pytest.approx(-difference["value"])
    assert f"{result['cold']['mean']:.3f} for the {(~known).sum()} items" in text
    assert f"{result['popular']['mean']:.3f} for the {result['popular']['items']} most" in text
    low, high = difference["ci"]
    assert f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    for name in ("all", "known"):
        value = result["spearman"][name]["value"]
        assert flipped["spearman"][name]["value"] == pytest.approx(-value)


def test_an_untrained_gate_earns_no_verdict():
    # Each of 32 dimensions moves somewhere for the cold vector: sure over items, luck over them.
    draw = np.random.default_rng(1)
    _, popularity, known = synthetic()
    moves = draw.normal(0, 0.05, 32)
    moves += 0.01 - moves.mean()
    means = 0.5 + 0.01 * ~known + 0.001 * draw.normal(size=len(known))
    profiles = {"cold": 0.5 + moves, "warm": np.full(32, 0.5), "popular": np.full(32, 0.5)}
    options = {"resamples": 400}
    assert verdict(item_statistics(means, popularity, known, **options)).startswith("yes")
    result = item_statistics(means, popularity, known, profiles=profiles, **options)
    assert verdict(result).startswith("no clear difference")
    low, high = result["cold_minus_popular"]["ci"]
    assert high - low == pytest.approx(2 * 1.96 * moves.std() / 32**0.5, rel=0.15)
    assert low < result["cold_minus_popular"]["value"] < high
    profiles["cold"] = 0.5 + moves + 0.1
    sure = item_statistics(means + 0.1 * ~known, popularity, known, profiles=profiles, **options)
    assert verdict(sure).startswith("yes")


def test_no_difference_is_called_none():
    text = verdict(statistics(*synthetic(slope=0.0, jump=0.0)))
    assert text.startswith("no clear difference: ")
    assert "no trend" in text


def test_a_verdict_needs_enough_items():
    means, popularity, known = synthetic()
    assert verdict(statistics(means, popularity, known | True)).startswith("cannot tell: 0 items")
    popularity = np.minimum(popularity, 31)
    popularity[-3:] = 100  # three stars alone are no group
    known[-3:] = True
    result = statistics(means, popularity, known)
    assert result["popular"]["train_rows"] == "16-31"
    none = statistics(means, popularity, known & False)
    assert none["popular"]["items"] == 0
    assert "no trend is defined" in verdict(none)
    json.dumps(none, allow_nan=False)


def test_the_catalogs_gates_are_the_models(ranker, data_dir, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "HEAT_BINS", 3)
    result = gate_analysis(ranker, data_dir, resamples=20)
    gates = ranker.model.item_gates(torch.arange(len(TITLES))).double().numpy()
    counts = popularity_of(ranker, data_dir)
    assert result["catalog"] == len(TITLES)
    assert result["mean"] == pytest.approx(gates.mean())
    assert result["cold"] == {
        "items": 1,
        "mean": pytest.approx(gates[-1].mean()),
        "quartiles": [pytest.approx(gates[-1].mean())] * 2,
    }
    np.testing.assert_allclose(result["dimensions"]["mean"], gates.mean(0), atol=1e-5)
    expected = [np.corrcoef(gate, np.log1p(counts))[0, 1] for gate in gates.T]
    np.testing.assert_allclose(result["dimensions"]["correlation"], expected, atol=1e-4)
    heat = result["heat_map"]
    order = np.argsort(counts, kind="stable")
    columns = np.argsort(gates.mean(0), kind="stable")
    for part, size, train_rows, values in zip(
        np.array_split(order, 3), heat["items"], heat["train_rows"], heat["gates"], strict=True
    ):
        assert size == len(part)
        assert train_rows == pytest.approx(counts[part].mean(), abs=0.01)
        np.testing.assert_allclose(values, gates[part].mean(0)[columns], atol=1e-4)
    assert result["verdict"] == verdict(result)


def test_profiles_are_the_groups_means(ranker, data_dir, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "FEWEST", 2)
    counts = popularity_of(ranker, data_dir)
    known = np.arange(len(TITLES)) % 2 == 0
    gates = ranker.model.item_gates(torch.arange(len(TITLES))).double().numpy()
    *_, profiles = module._pass_over_catalog(ranker.model, counts, known)
    groups, _ = module._groups(counts, known)
    assert groups["popular"].sum() >= 2
    assert not (groups["popular"] & ~known).any()
    for name, inside in groups.items():
        np.testing.assert_allclose(profiles[name], gates[inside].mean(0), atol=1e-6)


def test_negated_gates_turn_every_number_around(build, data_dir, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 1)
    model, processor = build()
    width = model.config.text_config.hidden_size
    weight = model.model.gate.linear.weight.data.zero_()
    weight[:, width:] = model.model.cold_item.data.sign()  # opens for the cold vector
    before = gate_analysis(CTRRanker(model, processor), data_dir, resamples=20)
    for weight in model.model.gate.linear.parameters():
        weight.data.neg_()
    after = gate_analysis(CTRRanker(model, processor), data_dir, resamples=20)
    assert after["mean"] == pytest.approx(1 - before["mean"])
    first, second = before["cold_minus_popular"]["value"], after["cold_minus_popular"]["value"]
    assert second == pytest.approx(-first, abs=1e-6)
    assert before["verdict"].startswith("yes: ")
    assert after["verdict"].startswith("no, less text for them: ")


def test_a_folder_gives_json_and_a_plot(ranker, data_dir, tmp_path):
    ranker.save_pretrained(tmp_path / "checkpoint", form="full")
    result = gate_analysis(tmp_path / "checkpoint", data_dir, resamples=20)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    plot_gate_analysis(result, tmp_path / "plots" / "gate.png")
    assert (tmp_path / "plots" / "gate.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["gate.png"]


def test_a_scalar_gate_and_a_constant_one_are_described_too(build, data_dir, tmp_path):
    model, processor = build(fusion="scalar_gate")
    for weight in model.model.gate.linear.parameters():
        weight.data.zero_()
    result = gate_analysis(CTRRanker(model, processor), data_dir, resamples=20)
    assert result["mean"] == 0.5
    assert set(result["dimensions"]["correlation"]) == {None}
    assert result["spearman"]["all"]["value"] is None
    json.dumps(result, allow_nan=False)
    plot_gate_analysis(result, tmp_path / "gate.png")


def test_an_arm_without_a_gate_has_no_analysis(build, data_dir):
    assert gate_analysis(CTRRanker(*build(fusion="sum")), data_dir) is None


def popularity_of(ranker, data_dir) -> np.ndarray:
    import pandas as pd

    train = pd.read_parquet(data_dir / "data" / "train.parquet")["item_id"].tolist()
    return np.array([train.count(item) for item in ranker.processor.item_ids])

"""Blanking and new users, on a tiny random model."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from cold_start import (
    SHARES,
    blanked,
    blanked_scores,
    draw_blanks,
    new_user_curve,
    plot_blanked,
    plot_new_user_curve,
    scores_with_likes,
)
from tiny import TITLES

from ccf_llm_hf import CTRRanker
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, uauc
from ccf_llm_hf.inference.scoring import score_split

KNOWN_ITEMS, KNOWN_USERS = 7, 4  # of the `cf` fixture
FAST = {"resamples": 30, "progress": False}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six users, the last two unknown to the model, who rate its eight items again and again."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rows = ["user_id,item_id,title,rating,timestamp"]
    for number in range(240):
        user, item = draw.integers(6), draw.integers(len(TITLES))
        rating = 5 if draw.random() < 0.6 else 1
        rows.append(f"u{user if user < 4 else user + 5},i{item},Film {item},{rating},{number}")
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    config = PrepareConfig(
        source="table",
        out=str(folder / "prepared"),
        interactions=str(folder / "ratings.csv"),
        rating_column="rating",
        ratios=[0.4, 0.3, 0.3],
    )
    return prepare(config, summary=False)


@pytest.fixture
def ranker(build) -> CTRRanker:
    model, processor = build(cf_logit=True)
    processor.history_window = (5, 3)
    return CTRRanker(model, processor)


@pytest.fixture
def rows(data_dir):
    return load_prepared(data_dir).splits["test"]


def plain_scores(ranker, rows):
    window = ranker.processor.history_window
    return score_split(ranker.model, ranker.processor, rows, history_window=window, progress=False)


def test_nothing_blanked_is_the_plain_score(ranker, rows):
    scores = blanked_scores(ranker, rows, draw_blanks(ranker, "both", 0.0, 0), progress=False)
    np.testing.assert_array_equal(scores, plain_scores(ranker, rows))


@pytest.mark.parametrize("side", ["item", "user", "both"])
def test_everything_blanked_is_a_table_that_knows_nothing(ranker, rows, side):
    whole = plain_scores(ranker, rows)
    scores = blanked_scores(ranker, rows, draw_blanks(ranker, side, 1.0, 0), progress=False)
    np.testing.assert_array_equal(plain_scores(ranker, rows), whole)  # the model is as before
    table = ranker.model.model.cf
    if side in ("item", "both"):
        table.item_known.fill_(False)
    if side in ("user", "both"):
        table.user_known.fill_(False)
    np.testing.assert_array_equal(scores, plain_scores(ranker, rows))
    assert np.abs(scores - whole).max() > 1e-3


def test_the_table_comes_back_after_an_error(ranker, rows, monkeypatch):
    table = ranker.model.model.cf
    before = table.item_known.clone()

    def fail(*_, **__):
        assert not table.item_known.any()
        raise RuntimeError("no memory")

    monkeypatch.setattr("cold_start.score_split", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        blanked_scores(ranker, rows, draw_blanks(ranker, "item", 1.0, 0))
    assert table.item_known.equal(before)


def test_a_larger_share_holds_the_smaller_one(ranker):
    for side, kinds in (("item", ["item"]), ("user", ["user"]), ("both", ["item", "user"])):
        draws = [draw_blanks(ranker, side, share, 3) for share in SHARES]
        for kind, known in (("item", KNOWN_ITEMS), ("user", KNOWN_USERS)):
            sets = [set(draw[kind].tolist()) for draw in draws]
            assert all(small <= large for small, large in itertools.pairwise(sets))
            sizes = [round(share * known) if kind in kinds else 0 for share in SHARES]
            assert [len(rows) for rows in sets] == sizes
    assert 7 not in draw_blanks(ranker, "item", 1.0, 3)["item"]  # unknown from the beginning


def test_a_draw_is_by_id_and_seed(ranker):
    ids = ranker.processor.item_ids
    drawn = {ids[row] for row in draw_blanks(ranker, "item", 0.5, 0)["item"]}
    seeds = {tuple(sorted(draw_blanks(ranker, "item", 0.5, seed)["item"])) for seed in range(10)}
    assert len(seeds) > 3
    known = ranker.model.model.cf.item_known
    ranker.processor.item_ids = ids[::-1]
    ranker.model.model.cf.item_known = known.flip(1)
    assert {ids[::-1][row] for row in draw_blanks(ranker, "item", 0.5, 0)["item"]} == drawn


def test_blanked_compares_methods_on_the_same_rows(ranker, build, rows, data_dir, tmp_path):
    text = CTRRanker(*build(fusion="text_only"))
    text.model.model.cf.item_known.fill_(False)
    text.model.model.cf.user_known.fill_(False)
    methods = {"fusion": ranker, "text": text}
    result = blanked(methods, data_dir, shares=(1.0, 0.0), **FAST)
    keys = [(entry["method"], entry["side"], entry["share"]) for entry in result]
    sides = ("item", "user", "both")
    assert keys == [(m, side, share) for m in methods for side in sides for share in (1.0, 0.0)]
    assert {entry["rows"] for entry in result} == {len(rows)}
    whole = plain_scores(ranker, rows)
    for entry in result[:6]:
        if entry["share"] == 0:
            assert entry["auc"] == auc(rows["label"], whole)
            assert entry["uauc"] == uauc(rows["label"], whole, rows["user_id"])
            assert entry["auc_change"] == entry["uauc_change"] == entry["blanked_rows"] == 0
            assert entry["auc_change_ci"] == [0, 0]
        else:
            assert entry["auc_change"] == entry["auc"] - auc(rows["label"], whole)
            assert entry["auc_ci"][0] <= entry["auc"] <= entry["auc_ci"][1]
    assert len({entry["auc"] for entry in result[:6]}) == 4  # nothing, items, users, both
    assert len({entry["auc"] for entry in result[6:]}) == 1  # there is nothing to blank
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    plot_blanked(result, tmp_path / "plots" / "blanked.png")
    assert (tmp_path / "plots" / "blanked.png").read_bytes().startswith(b"\x89PNG")


def test_blanked_rows_are_those_of_blanked_ids(ranker, rows, data_dir):
    (entry,) = blanked(ranker, data_dir, sides=["both"], shares=[1.0], **FAST)
    assert (entry["blanked_items"], entry["blanked_users"]) == (KNOWN_ITEMS, KNOWN_USERS)
    unknown = [
        item == "i7" and user in ("u9", "u10")
        for item, user in zip(rows["item_id"], rows["user_id"], strict=True)
    ]
    assert entry["blanked_rows"] == len(rows) - sum(unknown)


def test_a_checkpoint_folder_does_as_well(ranker, data_dir, tmp_path):
    ranker.save_pretrained(tmp_path, form="full")
    options = {"sides": ["item"], "shares": [0.5], "max_rows": 20} | FAST
    (loaded,) = blanked(tmp_path, data_dir, **options)
    (given,) = blanked(ranker, data_dir, **options)
    assert loaded["auc"] == pytest.approx(given["auc"], abs=1e-6)
    assert loaded["rows"] == given["rows"] < 72


def test_all_likes_are_the_score_of_an_unknown_user(ranker, rows):
    longest = max(map(len, rows["history"]))
    scores = scores_with_likes(ranker, rows, longest, progress=False)
    known = plain_scores(ranker, rows)
    ranker.model.model.cf.user_known.fill_(False)
    np.testing.assert_allclose(scores, plain_scores(ranker, rows), atol=1e-4)
    assert np.abs(scores - known).max() > 1e-3


def test_few_likes_are_the_latest_ones_of_each_row(ranker, rows):
    for likes in (0, 2):
        scores = scores_with_likes(ranker, rows, likes, progress=False)
        for row, score in zip(rows, scores, strict=True):
            past = row["history"][len(row["history"]) - min(likes, len(row["history"])) :]
            pair = {"user": "nobody", "history": past, "item": row["item_id"]}
            assert score == pytest.approx(ranker.pair_logits([pair])[0], abs=1e-4)


def test_an_id_that_the_catalog_has_is_no_new_user(ranker, rows):
    before = scores_with_likes(ranker, rows, 1, progress=False)
    ranker.processor.user_index = {"new user": 0, **ranker.processor.user_index}
    np.testing.assert_array_equal(scores_with_likes(ranker, rows, 1, progress=False), before)


def test_every_number_of_likes_is_measured_on_the_same_rows(ranker, rows, data_dir, tmp_path):
    lengths = [len(past) for past in rows["history"]]
    most = sorted(lengths)[len(rows) // 2]
    result = new_user_curve(ranker, data_dir, likes=(most, 0, 1), **FAST)
    assert [entry["likes"] for entry in result] == [most, 0, 1]
    assert {entry["rows"] for entry in result} == {sum(length >= most for length in lengths)}
    assert 0 < result[0]["rows"] < len(rows)
    long = rows.select([row for row, length in enumerate(lengths) if length >= most])
    assert {entry["users"] for entry in result} == {len(set(long["user_id"]))}
    scores = {n: scores_with_likes(ranker, long, n, progress=False) for n in (most, 0)}
    assert result[0]["auc"] == auc(long["label"], scores[most])
    expected = auc(long["label"], scores[most]) - auc(long["label"], scores[0])
    assert result[0]["auc_change"] == pytest.approx(expected)
    assert result[1]["auc_change"] == 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    plot_new_user_curve(result, tmp_path / "likes.png")
    assert (tmp_path / "likes.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_keeps_whole_users(ranker, rows, data_dir):
    (entry,) = new_user_curve(ranker, data_dir, likes=[0], max_rows=1, **FAST)
    counts = {list(rows["user_id"]).count(user) for user in rows["user_id"]}
    assert entry["users"] == 1
    assert entry["rows"] in counts


def test_what_is_undefined_is_none(ranker, data_dir, monkeypatch, tmp_path):
    def one_class(data_dir, split):
        rows = load_prepared(data_dir).splits[split]
        return rows.select([row for row, label in enumerate(rows["label"]) if label])

    monkeypatch.setattr("cold_start._load_split", one_class)
    result = blanked(ranker, data_dir, sides=["item"], shares=[0.5], **FAST)
    assert result[0]["auc"] is result[0]["uauc_change"] is None
    assert result[0]["auc_ci"] == [None, None]
    json.dumps(result, allow_nan=False)
    plot_blanked(result, tmp_path / "empty.png")


def test_bad_input_is_named(ranker, data_dir, tmp_path):
    with pytest.raises(InputError, match="'films'"):
        blanked(ranker, data_dir, sides=["films"])
    with pytest.raises(InputError, match=r"1\.5"):
        blanked(ranker, data_dir, shares=[1.5])
    with pytest.raises(InputError, match="'tests'"):
        blanked(ranker, data_dir, split="tests")
    with pytest.raises(InputError, match="1000 likes"):
        new_user_curve(ranker, data_dir, likes=[0, 1000])
    with pytest.raises(InputError, match="likes="):
        new_user_curve(ranker, data_dir, likes=[-1])
    result = blanked(ranker, data_dir, sides=["item"], shares=[0.0], **FAST)
    with pytest.raises(InputError, match=r"a\.nothing"):
        plot_blanked(result, tmp_path / "a.nothing")
    assert not list(tmp_path.iterdir())

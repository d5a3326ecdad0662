from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccf_llm_hf.data import protocol
from ccf_llm_hf.data.protocol import (
    SPLITS,
    Samples,
    TimeSplit,
    build_samples,
    describe_splits,
    split_at_random,
    split_by_ratio,
)
from ccf_llm_hf.errors import InputError


def frame(rows: list[tuple[str, str, int, int]], split: TimeSplit) -> pd.DataFrame:
    """Interactions from (user, item, time, label)."""
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "label"])
    table["split"] = split.assign(table["timestamp"].to_numpy())
    return table


def as_rows(samples: Samples, split: str) -> list[dict]:
    return [row for table in samples.tables(split) for row in table.to_pylist()]


def expected_rows(rows: list[tuple[str, str, int, int]], split: TimeSplit) -> dict[str, list[dict]]:
    """The definition of the protocol, row by row."""
    items = list(dict.fromkeys(item for _, item, _, _ in rows))
    result: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for user in dict.fromkeys(user for user, *_ in rows):
        mine = [row for row in rows if row[0] == user]
        history: list[str] = []
        for _, item, time, label in sorted(mine, key=lambda row: (row[2], items.index(row[1]))):
            code = split.assign(np.array([time]))[0]
            if code < 0:
                continue
            position = sum(row["user_id"] == user for row in result[SPLITS[code]])
            result[SPLITS[code]].append(
                {
                    "user_id": user,
                    "item_id": item,
                    "label": label,
                    "timestamp": time,
                    "history": list(history),
                    "split_position": position,
                }
            )
            if label:
                history.append(item)
    users = {row["user_id"] for row in result["train"]}
    seen = {row["item_id"] for row in result["train"]}
    for row in (row for name in SPLITS for row in result[name]):
        row["not_cold"] = row["user_id"] in users and row["item_id"] in seen
    return result


interaction = st.tuples(
    st.sampled_from("uvw"), st.sampled_from("abcdef"), st.integers(0, 12), st.integers(0, 1)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(interaction, unique_by=lambda row: row[:3], max_size=30))
def test_samples_equal_the_definition(rows: list[tuple[str, str, int, int]]) -> None:
    split = TimeSplit(valid_start=6, test_start=9, train_start=2, end=12)
    samples = build_samples(frame(rows, split))
    expected = expected_rows(rows, split)
    for name in SPLITS:
        assert as_rows(samples, name) == expected[name]


def test_ties_in_time_are_ordered_by_first_appearance_of_the_item() -> None:
    split = TimeSplit(valid_start=10, test_start=20)
    # "b" appears in the file before "a" (through another user), so it comes first at time 5.
    rows = [("x", "b", 1, 1), ("y", "a", 5, 1), ("y", "b", 5, 1), ("y", "c", 6, 0)]
    found = [
        (row["item_id"], row["history"])
        for row in as_rows(build_samples(frame(rows, split)), "train")
    ]
    assert found == [("b", []), ("b", []), ("a", ["b"]), ("c", ["b", "a"])]


def test_history_skips_dislikes_and_rows_outside_the_splits_and_crosses_splits() -> None:
    split = TimeSplit(valid_start=10, test_start=20, train_start=5, end=30)
    rows = [
        ("u", "before", 1, 1),
        ("u", "liked", 6, 1),
        ("u", "disliked", 7, 0),
        ("u", "valid", 11, 1),
        ("u", "test", 21, 0),
        ("u", "after", 31, 1),
    ]
    samples = build_samples(frame(rows, split))
    assert [row["history"] for row in as_rows(samples, "train")] == [[], ["liked"]]
    assert [row["history"] for row in as_rows(samples, "test")] == [["liked", "valid"]]


def test_max_history_keeps_the_latest() -> None:
    rows = [("u", item, time, 1) for time, item in enumerate("abcdef")]
    samples = build_samples(frame(rows, TimeSplit(4, 5)), max_history=2)
    assert as_rows(samples, "test")[0]["history"] == ["d", "e"]
    assert as_rows(samples, "train")[1]["history"] == ["a"]


def test_long_splits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CHUNK_ROWS", 3)
    rows = [(f"u{n % 2}", f"i{n}", n, 1) for n in range(10)]
    samples = build_samples(frame(rows, TimeSplit(8, 9)))
    assert [table.num_rows for table in samples.tables("train")] == [3, 3, 2]
    assert as_rows(samples, "train") == expected_rows(rows, TimeSplit(8, 9))["train"]


def test_time_split_boundaries_belong_to_the_later_part() -> None:
    split = TimeSplit(valid_start=10, test_start=20, train_start=5, end=30)
    times = np.array([4, 5, 9, 10, 19, 20, 29, 30])
    assert split.assign(times).tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]


def test_ratio_split_keeps_equal_times_together() -> None:
    times = np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
    split = split_by_ratio(times, [0.7, 0.2, 0.1])
    # Row 9 would start test, but it is equal in time to rows 7 and 8.
    assert (split.valid_start, split.test_start) == (8, 8)
    split = split_by_ratio(np.arange(100)[::-1], [0.8, 0.1, 0.1])
    assert (split.valid_start, split.test_start) == (80, 90)


@pytest.mark.parametrize("ratios", [[0.5, 0.5], [0.8, 0.1, 0.2], [1.0, 0.0, 0.0], []])
def test_bad_ratios(ratios: list[float]) -> None:
    with pytest.raises(InputError, match="--ratios must be three positive numbers"):
        split_by_ratio(np.arange(10), ratios)


def test_statistics() -> None:
    rows = [
        ("u", "a", 1, 1),
        ("v", "b", 2, 0),
        ("u", "b", 11, 1),
        ("w", "c", 12, 0),
        ("u", "a", 21, 1),
    ]
    statistics = describe_splits(build_samples(frame(rows, TimeSplit(10, 20))))
    assert statistics["validation"] == {
        "rows": 2,
        "users": 2,
        "items": 2,
        "positive_rate": 0.5,
        "unseen_user_rate": 0.5,
        "unseen_item_rate": 0.5,
        "not_cold_rows": 1,
        "first_timestamp": 11,
        "last_timestamp": 12,
    }
    with pytest.raises(InputError, match="the test split has no rows"):
        describe_splits(build_samples(frame(rows, TimeSplit(10, 30))))


def test_signed_histories_hold_all_that_lies_strictly_earlier_with_its_label() -> None:
    rows = [
        ("u", "a", 1, 0),
        ("u", "b", 5, 1),
        ("v", "a", 5, 1),
        ("u", "c", 5, 0),
        ("u", "d", 9, 1),
    ]
    samples = build_samples(frame(rows, TimeSplit(6, 7, train_start=4)), signed=True)
    train = [(r["item_id"], r["history"], r["history_labels"]) for r in as_rows(samples, "train")]
    # "a" lies before the splits and is known all the same; "b" and "c" were given at once.
    assert train == [("b", ["a"], [0]), ("c", ["a"], [0]), ("a", [], [])]
    (last,) = as_rows(samples, "test")
    assert (last["history"], last["history_labels"]) == (["a", "b", "c"], [0, 1, 0])
    assert last["split_position"] == 0


RATIOS = [0.8, 0.1, 0.1]


def drawn(users: int, items: int, seed: int = 0, backwards: bool = False) -> pd.DataFrame:
    """Every user rates every item; split at random, liked where the numbers add up to an even one.

    Rows come item by item, or the other way round."""
    rows = [(f"u{u}", f"i{i}", (u + i) % 2) for i in range(items) for u in range(users)]
    table = pd.DataFrame(rows[:: -1 if backwards else 1], columns=["user_id", "item_id", "label"])
    table["split"], table["timestamp"] = split_at_random(
        table["user_id"], table["item_id"], RATIOS, seed
    )
    return table


def all_rows(table: pd.DataFrame, **options: Any) -> dict[str, list[dict]]:
    samples = build_samples(table, frozen=True, **options)
    return {name: as_rows(samples, name) for name in SPLITS}


def test_a_random_split_has_the_shares_asked_for() -> None:
    split, _ = split_at_random(["u"] * 20_000, [str(n) for n in range(20_000)], RATIOS, 0)
    assert np.bincount(split) / len(split) == pytest.approx(RATIOS, abs=0.008)
    across, _ = split_at_random([str(n) for n in range(20_000)], ["i"] * 20_000, RATIOS, 0)
    assert np.bincount(across) / len(across) == pytest.approx(RATIOS, abs=0.008)


def test_two_users_are_split_independently_of_each_other() -> None:
    table = drawn(40, 100)
    test = table.pivot(index="user_id", columns="item_id", values="split").to_numpy() == 2
    together = test.astype(float) @ test.T
    counts = test.sum(1)
    # Of two users' some ten test items each, about one is shared.
    expected = np.outer(counts, counts) / 100
    off = ~np.eye(40, dtype=bool)
    assert together[off].mean() == pytest.approx(expected[off].mean(), rel=0.1)
    assert together[off].max() <= 7


def test_a_random_split_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    key = ["user_id", "item_id"]
    first, again, other = (
        drawn(20, 30, **options).sort_values(key, ignore_index=True)
        for options in ({}, {"backwards": True}, {"seed": 1})
    )
    pd.testing.assert_frame_equal(first, again)
    train = first["split"] == 0
    assert not (first["split"] == other["split"]).all()
    # The order among training rows is drawn anew as well.
    both = train & (other["split"] == 0)
    assert not (first["timestamp"] == other["timestamp"])[both].all()


def test_positions_count_a_users_rows_through_the_splits() -> None:
    table = drawn(20, 30).sort_values(["user_id", "timestamp"])
    for _, rows in table.groupby("user_id"):
        assert rows["timestamp"].tolist() == list(range(30))
        assert rows["split"].is_monotonic_increasing


@pytest.mark.parametrize("signed", [False, True])
def test_random_histories_hold_training_rows_before_ones_own(signed: bool) -> None:
    table = drawn(20, 30)
    table["rating"] = 5.0 * table["label"] + table.index / 1000
    found = all_rows(table, signed=signed)
    for user, rows in table.groupby("user_id"):
        train = rows[rows["split"] == 0].sort_values("timestamp")
        shown = train if signed else train[train["label"] == 1]
        for name in ("validation", "test"):
            for row in (row for row in found[name] if row["user_id"] == user):
                assert row["history"] == shown["item_id"].tolist()
        mine = [row for row in found["train"] if row["user_id"] == user]
        assert [row["item_id"] for row in mine] == train["item_id"].tolist()
        for row in mine:
            before = shown["timestamp"] < row["timestamp"]
            assert row["history"] == shown.loc[before, "item_id"].tolist()
            assert row["item_id"] not in row["history"]
            if signed:
                assert row["history_labels"] == shown.loc[before, "label"].tolist()
                ratings = shown.loc[before, "rating"].tolist()
                assert row["history_ratings"] == pytest.approx(ratings, rel=1e-6)


def test_random_histories_are_cut_as_others_are() -> None:
    whole, cut = (all_rows(drawn(6, 30), max_history=most) for most in (None, 4))
    for name in SPLITS:
        for row, short in zip(whole[name], cut[name], strict=True):
            assert short["history"] == row["history"][-4:]
            assert short["history_dropped"] == max(0, len(row["history"]) - 4)


@pytest.mark.parametrize("signed", [False, True])
def test_frozen_histories_of_a_split_by_time_end_with_training(signed: bool) -> None:
    split = TimeSplit(valid_start=10, test_start=20, train_start=5, end=30)
    rows = [
        ("u", "before", 1, 1),
        ("u", "a", 6, 1),
        ("u", "b", 7, 1),
        ("u", "valid", 11, 1),
        ("u", "valid2", 12, 1),
        ("u", "test", 21, 1),
    ]
    found = all_rows(frame(rows, split), signed=signed)
    outside = ["before"] if signed else []
    assert [row["history"] for row in found["train"]] == [outside, [*outside, "a"]]
    for name in ("validation", "test"):
        assert all(row["history"] == [*outside, "a", "b"] for row in found[name])
    growing = as_rows(build_samples(frame(rows, split), signed=signed), "test")
    assert growing[0]["history"] == [*outside, "a", "b", "valid", "valid2"]


def test_statistics_without_times() -> None:
    samples = build_samples(drawn(20, 30), frozen=True)
    assert "first_timestamp" not in describe_splits(samples, has_times=False)["test"]

"""Streams: every row is one line of one stream, as later rows know it."""

import datasets
import pytest

from ccf_llm_hf.data.grouping import frozen_lines, group_split, group_streams
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

MIDPOINT = 3.5


def signed_split(ratings: bool, stored: int | None = None) -> datasets.Dataset:
    """Two users' rows: u's at times 1 2 2 3 4 4 after one row outside the split, v's at 1 2."""
    rated = {"u": [("z", 5), ("a", 2), ("b", 4), ("c", 1), ("a", 5), ("d", 4), ("e", 3)]}
    rated["v"] = [("b", 1), ("a", 4)]
    earlier = {"u": [0, 1, 2, 2, 4, 5, 5], "v": [0, 1]}
    rows = []
    for user in ("v", "u"):
        for place, (item, rating) in enumerate(rated[user]):
            past = rated[user][: earlier[user][place]]
            kept = past[-stored:] if stored else past
            row = {"user_id": user, "item_id": item, "label": int(rating > MIDPOINT)}
            row |= {"history": [item for item, _ in kept], "history_dropped": len(past) - len(kept)}
            row["history_labels"] = [int(rating > MIDPOINT) for _, rating in kept]
            if ratings:
                row["history_ratings"] = [float(rating) for _, rating in kept]
            if item != "z":
                rows.append(row)
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("lines", [1, 2, 4, 48])
def test_every_row_is_a_line_of_one_stream(lines: int) -> None:
    split = signed_split(ratings=False)
    streams = group_streams(split, lines)
    assert sorted(row for stream in streams for row in stream.rows) == list(range(len(split)))
    assert [stream.user for stream in streams] == ["v"] * -(-2 // lines) + ["u"] * -(-6 // lines)
    for stream in streams:
        assert stream.stream and not stream.candidates
        assert len(stream.history) <= lines
        for line, label, row in zip(stream.history, stream.labels, stream.rows, strict=True):
            assert line == {"id": split[row]["item_id"], "liked": split[row]["label"]}
            assert label == split[row]["label"]


def test_lines_carry_the_ratings_that_later_rows_know() -> None:
    _, stream = group_streams(signed_split(ratings=True))
    rated = [{"id": i, "rating": r} for i, r in zip("abca", (2.0, 4.0, 1.0, 5.0), strict=True)]
    assert stream.history == [*rated, {"id": "d", "liked": 1}, {"id": "e", "liked": 0}]
    # Of what no later row stores, the label is known, and no other line of the same item's rating.
    _, stream = group_streams(signed_split(ratings=True, stored=2))
    labeled = [{"id": "a", "liked": 0}, {"id": "b", "liked": 1}]
    assert stream.history == [*labeled, *rated[2:], *[{"id": "d", "liked": 1}], stream.history[-1]]


def test_what_a_stream_folds_in_comes_before_its_first_line() -> None:
    split = signed_split(ratings=True)
    of_u = [one for one in group_streams(split, lines=3, fold_in_items=2) if one.user == "u"]
    assert [one.earlier for one in of_u] == [
        [{"id": "z", "rating": 5.0}],
        [{"id": "b", "rating": 4.0}, {"id": "c", "rating": 1.0}],
    ]
    assert all(not one.earlier for one in group_streams(split, lines=3))


def test_a_stream_sees_the_fit_of_its_rows_or_the_last() -> None:
    split = signed_split(ratings=False)
    by_user = [3 if user == "u" else 1 for user in split["user_id"]]
    assert [one.fit for one in group_streams(split, cf_fits=by_user)] == [1, 3]
    with pytest.warns(UserWarning, match="1 of 2 streams have rows of several CF fits"):
        mixed = group_streams(split, cf_fits=[*by_user[:-1], 0])
    assert [one.fit for one in mixed] == [1, -1]


@pytest.mark.parametrize("lines", [1, 2, 48])
def test_lines_of_a_topic_stand_together(lines: int) -> None:
    split = signed_split(ratings=True)
    topics = [{"b": "x", "d": "x"}.get(item, item) for item in split["item_id"]]
    streams = group_streams(split, lines, topics=topics, fold_in_items=3)
    assert sorted(row for stream in streams for row in stream.rows) == list(range(len(split)))
    of_u = [[line["id"] for line in one.history] for one in streams if one.user == "u"]
    together = ["a", "a", "b", "d", "c", "e"]
    assert sorted(of_u) == sorted(together[i : i + lines] for i in range(0, 6, lines))
    for stream in streams:
        assert stream.labels == [split[row]["label"] for row in stream.rows]
        assert [line["liked"] for line in stream.history] == stream.labels
    before = [[line["id"] for line in one.earlier] for one in streams if one.user == "u"]
    expected = {i: together[max(0, i - 3) : i] for i in range(0, 6, lines)}
    assert sorted(before) == sorted(expected.values())


def test_evidence_of_a_split_is_in_its_histories_or_in_the_frozen_lines(tokenizer) -> None:
    split = signed_split(ratings=False, stored=2)
    ids = ["a", "b", "c", "d", "e", "z"]
    fields = [{"author": "one" if item in "az" else "two"} for item in ids]
    processor = CCFLLMProcessor(
        *(tokenizer, ids, ids),
        wording="answered",
        histories="signed",
        history_window=(1, 1),
        fold_in_items=9,
        item_fields=fields,
        evidence_fields=["author"],
    )
    found = {}
    for group in group_split(split, processor):
        found |= dict(zip(group.rows, group.evidence or [], strict=True))
    places = {(row["user_id"], row["item_id"]): place for place, row in enumerate(split)}
    # Only the two latest items are stored, c and a, and the window shows a.
    assert found[places["u", "e"]] == [{"id": "c", "liked": 0}]
    assert found[places["u", "a"]] == []
    lines = frozen_lines(split)
    assert [line["id"] for line in lines["u"]] == ["a", "b", "c", "a", "d", "e"]
    for group in group_split(split, processor, lines=lines):
        before = lines[str(group.user)][: -len(group.history) or None]
        for item, evidence in zip(group.candidates, group.evidence or [], strict=True):
            assert evidence == processor.evidence(before, [item])[0]
            assert len(evidence) == sum((line["id"] in "az") == (item in "az") for line in before)

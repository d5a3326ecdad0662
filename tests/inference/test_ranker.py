import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.ranker import CTRRanker


@pytest.fixture(scope="module")
def ranker(checkpoint):
    return CTRRanker.from_pretrained(str(checkpoint))


def direct_probability(ranker, user, history, item):
    batch = ranker.processor(user=user, history=history, candidates=[item])
    with torch.inference_mode():
        return float(torch.sigmoid(ranker.model(**batch).logits[0, 0]))


def test_predict_keeps_the_order_of_mixed_pairs(ranker):
    pairs = [
        {"user": "a", "history": ["2"], "item": "3"},
        ("b", "1"),
        {"user": "a", "history": ["Jumanji (1995)"], "item": "Sabrina (1995)"},
        {"item": "A brand new film (2030)", "history": ["1", "2", "3", "4", "5"]},
        ("b", 5),
    ]
    expected = [
        direct_probability(ranker, "a", ["2"], "3"),
        direct_probability(ranker, "b", [], "1"),
        direct_probability(ranker, "a", ["2"], "4"),
        direct_probability(ranker, None, ["1", "2", "3", "4", "5"], "A brand new film (2030)"),
        direct_probability(ranker, "b", [], "5"),
    ]
    np.testing.assert_allclose(ranker.predict(pairs), expected, atol=1e-4)


def test_predict_of_nothing_is_empty(ranker):
    assert ranker.predict([]).shape == (0,)


@pytest.mark.parametrize("pair", ["ab", ("a", "1", "2"), {"user": "a"}, {"item": "1", "usr": "a"}])
def test_a_malformed_pair_is_named(ranker, pair):
    with pytest.raises(InputError, match="pair 1"):
        ranker.predict([("a", "1"), pair])


def test_rank_sorts_given_candidates_as_predict_scores_them(ranker):
    candidates = ["5", "Toy Story (1995)", "3", "Unheard of (2031)"]
    ranked = ranker.rank(user="a", history=["2"], candidates=candidates, top_k=3)
    scores = ranker.predict([{"user": "a", "history": ["2"], "item": c} for c in candidates])
    order = np.argsort(-scores)[:3]
    titles = ["GoldenEye (1995)", "Toy Story (1995)", "Heat (1995)", "Unheard of (2031)"]
    assert [item.title for item in ranked] == [titles[index] for index in order]
    np.testing.assert_allclose([item.probability for item in ranked], scores[order], atol=1e-4)
    for item in ranked:
        assert item.probability == pytest.approx(1 / (1 + np.exp(-item.logit)), abs=1e-5)
        assert item.text_share + item.cf_share == pytest.approx(1.0)
        assert 0 < item.text_share < 1


def test_new_and_unfitted_items_are_not_known(ranker):
    ranked = ranker.rank(history=["2"], candidates=["1", "6", "Unheard of (2031)"])
    by_title = {item.title: item for item in ranked}
    assert by_title["Toy Story (1995)"].known
    assert not by_title["Never rated (1995)"].known
    assert by_title["Never rated (1995)"].item_id == "6"
    assert by_title["Unheard of (2031)"].item_id is None


def test_catalog_is_preselected_by_item_bias_for_a_new_user(ranker):
    # Biases: film 2 has 2.0, film 3 has 1.0, film 1 has .5.
    assert [item.item_id for item in ranker.rank(preselect=1)] == ["2"]
    assert {item.item_id for item in ranker.rank(preselect=3)} == {"2", "3", "1"}
    # Film 2 was seen; words of what was liked have the second turn.
    assert [i.item_id for i in ranker.rank(history=["Jumanji (1995)"], preselect=1)] == ["3"]


def test_without_item_biases_a_new_user_needs_likes_or_candidates(ranker, monkeypatch):
    table = ranker.model.cf
    monkeypatch.setitem(table._buffers, "default_user", torch.zeros_like(table.default_user))
    with pytest.raises(InputError, match="no item biases"):
        ranker.rank()
    assert "1" not in {item.item_id for item in ranker.rank(history=["1"])}  # by words alone


def test_catalog_is_preselected_by_the_users_own_vector(ranker):
    table = ranker.model.cf
    above = table.user_vectors[1] - table.default_user  # what an unknown user has not
    scores = (above * table.item_vectors[:5]).sum(-1)  # the last has no vector
    best = {str(int(row) + 1) for row in scores.topk(3).indices}
    assert {item.item_id for item in ranker.rank(user="b", preselect=3)} == best
    assert "6" in {item.item_id for item in ranker.rank(user="b", preselect=6)}


def test_a_batch_equals_single_calls(ranker):
    batch = ranker.rank_many(["a", None], [["2"], ["1", "3"]], top_k=2)
    single = [
        ranker.rank(user="a", history=["2"], top_k=2),
        ranker.rank(history=["1", "3"], top_k=2),
    ]
    for ours, theirs in zip(batch, single, strict=True):
        assert [item.item_id for item in ours] == [item.item_id for item in theirs]
        np.testing.assert_allclose(
            [item.logit for item in ours], [item.logit for item in theirs], atol=1e-4
        )


def test_batch_lists_of_unequal_length_are_refused(ranker):
    with pytest.raises(InputError, match="2 users, 1 histories"):
        ranker.rank_many(["a", "b"], [["1"]])
    with pytest.raises(InputError, match="got nothing"):
        ranker.rank_many()
    with pytest.raises(InputError, match=r"user 0 is \{'user': 'a'.*give ids in users"):
        ranker.rank_many([{"user": "a", "history": ["1"]}])


@pytest.mark.parametrize("call", [{"user": ["a", "b"]}, {"history": [["1"], ["2"]]}])
def test_several_users_are_sent_to_rank_many(ranker, call):
    with pytest.raises(InputError, match="rank_many"):
        ranker.rank(**call)


def test_rank_many_takes_candidates_for_each_user_and_users_without_history(ranker):
    first, second = ranker.rank_many(["a", "b"], candidates=[["1", "3"], ["4"]])
    assert {item.item_id for item in first} == {"1", "3"}
    assert [item.item_id for item in second] == ["4"]


def test_many_candidates_are_cut_without_changing_scores(ranker, checkpoint):
    candidates = ["1", "3", "4", {"title": "A new one"}, "6"]
    theirs = ranker.rank(user="a", history=["2"], candidates=candidates)
    for budget in (1, 2, 40):
        small = CTRRanker(ranker.model, ranker.processor, tokens_per_batch=budget)
        ours = small.rank(user="a", history=["2"], candidates=candidates)
        assert [item.title for item in ours] == [item.title for item in theirs]
        np.testing.assert_allclose(
            [item.logit for item in ours], [item.logit for item in theirs], atol=1e-4
        )


def test_a_title_that_is_also_an_id_can_be_meant_as_a_title(ranker):
    ranked = ranker.rank(history=["2"], candidates=[{"title": "3"}, "3"])
    assert {(item.item_id, item.title) for item in ranked} == {(None, "3"), ("3", "Heat (1995)")}


def test_temperature_shapes_probabilities_only(ranker):
    before = ranker.rank(user="a", candidates=["1"])[0]
    ranker.model.config.logit_temperature = 2.0
    try:
        after = ranker.rank(user="a", candidates=["1"])[0]
    finally:
        ranker.model.config.logit_temperature = 1.0
    assert after.logit == pytest.approx(before.logit)
    assert after.probability == pytest.approx(1 / (1 + np.exp(-before.logit / 2)), abs=1e-5)


def test_explain_tells_the_prompt_and_the_lines_that_moved_the_score(ranker):
    history = ["1", "2", "3", "4", "5"]
    explanation = ranker.explain(user="a", history=history, item="Unheard of (2031)")
    # Window (3, 2): with five earlier items it starts at the third.
    assert {line.item_id for line in explanation.lines} == {"3", "4", "5"}
    assert "[user: a]" in explanation.prompt
    assert "liked:[item: Heat (1995)][item: Sabrina (1995)]" in explanation.prompt
    assert "Unheard of (2031)[item: Unheard of (2031)]" in explanation.prompt
    assert explanation.user_known
    assert not explanation.known
    (ranked,) = ranker.rank(user="a", history=history, candidates=["Unheard of (2031)"])
    assert explanation.logit == pytest.approx(ranked.logit, abs=1e-5)
    assert explanation.probability == pytest.approx(
        direct_probability(ranker, "a", history, "Unheard of (2031)"), abs=1e-4
    )
    found = json.loads(json.dumps(dataclasses.asdict(explanation)))
    assert found["item_id"] is None and len(found["lines"]) == 3
    best = explanation.lines[0]
    assert f"{best.effect:+.3f}  liked     {best.title}" in explanation.as_text()
    assert f"{explanation.words:+.3f}  the words" in explanation.as_text()


def test_explained_cf_logit_of_a_new_user_is_bias_and_offset(ranker):
    explanation = ranker.explain(history=["2"], item="3")
    assert explanation.cf_logit == pytest.approx(1.0 + 0.25)
    assert not explanation.user_known
    assert "[user: new]" in explanation.prompt


def test_text_only_ranks_given_candidates_and_asks_for_them(text_only_checkpoint):
    ranker = CTRRanker.from_pretrained(str(text_only_checkpoint))
    ranked = ranker.rank(history=["1"], candidates=["2", "Unheard of (2031)"])
    assert {item.text_share for item in ranked} == {1.0}
    with pytest.raises(InputError, match="give candidates"):
        ranker.rank(history=["1"])
    explanation = ranker.explain(history=["1"], item="2")
    assert (explanation.behavior, explanation.cf) == (0.0, 0.0)
    assert explanation.start + explanation.words == pytest.approx(explanation.logit, abs=1e-5)


def test_nothing_need_be_known_of_a_user(ranker):
    assert [item.item_id for item in ranker.rank(preselect=1)] == ["2"]
    assert ranker.explain(item="2").lines == []


def test_a_missing_checkpoint_is_one_clear_sentence(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a folder, .*ccf-llm train") as caught:
        CTRRanker.from_pretrained(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"checkpoint {tmp_path} cannot be loaded") as caught:
        CTRRanker.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_run_is_told_from_its_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoint-slim").mkdir(parents=True)
    with pytest.raises(InputError, match=r"training run: name its .*run/checkpoint-slim"):
        CTRRanker.from_pretrained(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"history": "Toy Story (1995)"}, "history is 'Toy Story .1995.': give a list of items"),
        ({"history": ["Heat (1995)", " "]}, "history: item 1 is ' ': give an id"),
        ({"history": [None]}, "history: item 0 is None"),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": [""]}, "candidates: item 0 is ''"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": "3"}, "top_k='3' must be at least 1, and an integer"),
        ({"max_per_topic": 0}, "max_per_topic=0 must be at least 1"),
    ],
)
def test_blank_items_and_bare_strings_are_refused(ranker, call, message):
    with pytest.raises(InputError, match=message):
        ranker.rank(**call)


def test_pairs_of_any_container_and_spelling_are_the_same(ranker):
    wanted = ranker.predict([("a", "1"), ("b", "5")])
    users, items = ["a", b"b"], pd.Series([1.0, 5])
    table = pd.DataFrame({"user": ["a", "b"], "item": [1, 5]})
    for pairs in (
        zip(users, items, strict=True),
        table.itertuples(index=False),
        np.array([["a", "1"], [" b", "5.0"]]),
        ({"user": user, "item": np.int64(item)} for user, item in [("a", 1), ("b", 5)]),
    ):
        np.testing.assert_allclose(ranker.predict(pairs), wanted, atol=1e-4)
    with pytest.raises(InputError, match="pair 0 is 'user'"):
        ranker.predict(table)
    with pytest.raises(InputError, match=r"pair 1: .* is no id"):
        ranker.predict([("a", "1"), {"user": users, "item": "1"}])


def test_several_users_may_come_as_a_series(ranker):
    users, histories = pd.Series(["a", "b"], index=[7, 9]), np.array([["1"], ["2"]])
    found = ranker.rank_many(users, histories, top_k=2)
    assert found == ranker.rank_many(["a", "b"], [["1"], ["2"]], top_k=2)
    with pytest.raises(InputError, match="give several to rank_many"):
        ranker.rank(user=users)
    with pytest.raises(InputError, match="users is 'ab': give a list"):
        ranker.rank_many("ab")


def test_unknown_users_and_items_are_counted(ranker, caplog):
    ranker.predict([("a", "1"), ("x", "1"), ("y", "999"), (None, "2")])
    said = caplog.records[-1].getMessage()
    assert "2 users unknown to the model, such as 'x' (its own look like 'a')" in said
    assert "1 item unknown to the model, such as '999' (its own look like '1')" in said
    ranker.rank(user="stranger", history=["1"])
    assert "1 user unknown" in caplog.records[-1].getMessage()
    told = len(caplog.records)
    ranker.predict([("a", "1"), (None, "2")])
    ranker.rank(user="b")
    assert len(caplog.records) == told, "where all are known there is nothing to tell"


def test_a_user_who_comes_back_pays_for_candidates_alone(ranker):
    ranker.prefixes.clear()
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["inputs_embeds"].shape[1])

    ask = {"user": "a", "history": ["2", "3"], "candidates": ["1", "4", "5"]}
    handle = ranker.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    first, again, grown = (
        ranker.rank(**ask | {"history": history})
        for history in (ask["history"], ask["history"], ["2", "3", "6"])
    )
    handle.remove()
    row = ranker.processor(**ask | {"history": ["2", "3", "6"]})
    candidates, line = (row["block_ids"] > 0).sum(), (row["history_depths"][0] == 3).sum()
    line -= candidates
    assert read == [row["input_ids"].shape[1] - line, candidates, candidates + line]
    assert [item.item_id for item in first] == [item.item_id for item in again]
    none = CTRRanker(ranker.model, ranker.processor, prefix_bytes=0)
    for item, expected in zip(grown, none.rank(**ask | {"history": ["2", "3", "6"]}), strict=True):
        assert item.item_id == expected.item_id
        assert item.logit == pytest.approx(expected.logit, abs=1e-4)
    assert none.prefixes.used_bytes == 0 < ranker.prefixes.used_bytes


def test_threads_share_a_ranker(checkpoint):
    alone, shared = (CTRRanker.from_pretrained(str(checkpoint)) for _ in "12")
    asked = [  # titles that nobody has read yet
        {"user": "ab"[n % 2], "history": ["2", f"Film {n}"], "candidates": ["1", f"New {n}", "5"]}
        for n in range(12)
    ]
    expected = [alone.rank(**one) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: shared.rank(**one), asked))
    for one, other in zip(found, expected, strict=True):
        assert [item.title for item in one] == [item.title for item in other]
        np.testing.assert_allclose(
            [item.logit for item in one], [item.logit for item in other], atol=1e-4
        )


def test_a_shortlist_is_no_shorter_than_the_list(ranker):
    candidates = ["1", "3", "4", "5"]
    short = ranker.rank("a", ["2"], candidates, top_k=2, shortlist=2)
    assert len(short) == 2 and len(ranker.rank("a", ["2"], top_k=1, shortlist=1)) == 1
    with pytest.raises(InputError, match="top_k=10 of shortlist=2 items: raise the shortlist"):
        ranker.rank("a", ["2"], candidates, shortlist=2)
    with pytest.raises(InputError, match="shortlist=0 must be at least 1"):
        ranker.rank("a", ["2"], candidates, shortlist=0)

"""The plan: which cells there are, what they are called, and in which order they are computed."""

import re

import pytest
from cells import (
    BUDGETS,
    SMOLLM,
    TRACKS,
    Cell,
    name_of,
    open_rows,
    plan,
    protocol_rows,
)
from workspace import TABLES

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.recipe import StageConfig

EVERYTHING = plan(list(TRACKS), "full", 3, "ml-1m")


def test_names_are_unique_and_safe_for_files():
    names = [cell.name for cell in EVERYTHING]
    assert len({name.lower() for name in names}) == len(names) > 80
    assert [name for name in names if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,120}", name)] == []


def test_rows_are_told_apart_by_what_the_table_groups_them_by():
    keys = [
        (cell.track, cell.arm, cell.cf, cell.training, cell.backbone)
        for cell in (*protocol_rows(), *open_rows())
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("tracks", [["protocol"], ["open"], ["protocol", "open"]])
def test_controls_come_first_then_seed_after_seed(tracks, budget):
    cells = plan(tracks, budget, 3, "ml-1m")
    order = [cell.seed if cell.seeded else -1 for cell in cells]
    assert order == sorted(order)
    assert order[0] == -1 and order[-1] == 2
    assert {cell.track for cell in cells} == set(tracks)
    seeds = [{cell.row for cell in cells if cell.seeded and cell.seed == n} for n in range(3)]
    assert seeds[0] == seeds[1] == seeds[2]


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-100k"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_a_cell_builds_on_is_planned_before_it(budget, dataset):
    cells = plan(list(TRACKS), budget, 2, dataset)
    done: set[str] = set()
    for cell in cells:
        for row in filter(None, [cell.starts_from, cell.recent_likes_of, *cell.average_of]):
            assert f"{row}-seed{cell.seed}" in done or row in done, cell.name
        done.add(cell.name)
    assert any(cell.average_of for cell in cells)
    assert any(cell.starts_from for cell in cells) == (budget == "full" and dataset == "ml-1m")


def test_two_stage_cells_freeze_the_lora_of_the_text_only_row():
    (text_only,) = [row for row in protocol_rows() if row.arm == "text_only"]
    staged = [row for row in protocol_rows() if row.starts_from]
    assert {row.starts_from for row in staged} == {text_only.row}
    assert {row.backbone for row in staged} == {text_only.backbone}
    assert all(row.stage is not None and row.stage["train"] == ["fusion"] for row in staged)


def test_the_quick_budget_and_other_data_sets_have_the_main_rows():
    quick = plan(["protocol"], "quick", 1, "ml-1m")
    assert [cell.name for cell in plan(["protocol"], "full", 1, "ml-100k")] == [
        cell.name for cell in quick
    ]
    arms = {cell.arm for cell in quick}
    assert arms >= {"item mean", "item + user mean", "CF", "text_only", "gate", "cf_only"}
    assert len(quick) < len(plan(["protocol"], "full", 1, "ml-1m"))
    assert all(cell.quick for cell in protocol_rows() if cell.analyzed)


def test_arms_to_compare_differ_in_what_their_names_say_only():
    smollm = [row for row in protocol_rows() if row.stage and row.backbone == SMOLLM]
    stages = {(row.arm, row.cf, row.training): row.stage for row in smollm}

    def differing(first, second):
        pair = [stages[arm, "mf", "joint"].items() for arm in (first, second)]
        return {key for key, _ in pair[0] ^ pair[1]}

    assert differing("gate", "gate, question last") == {"wording"}
    assert differing("gate, title candidates", "concat") == {"fusion"}
    titled = {"candidate_format", "title_years"}
    assert differing("gate", "gate, title candidates") == titled
    assert differing("gate", "gate, ranking loss") == {"pairwise_share"}
    for arm in ("gate", "cf_only"):
        assert differing(arm, f"{arm}, CF target") == {"cf_target_share"}


def test_every_cf_table_and_setting_exists():
    settings = set(StageConfig.__dataclass_fields__)
    for cell in EVERYTHING:
        assert not cell.cf or cell.cf in TABLES[cell.track], cell.name
        assert set(cell.stage or {}) <= settings, cell.name
        assert (cell.backbone != "") == cell.seeded, cell.name


def test_a_cell_without_a_seed_is_named_by_its_row():
    assert Cell("protocol", "item + user mean").name == "protocol-item_and_user_mean"
    assert Cell("open", "gate", "mf", stage={}, seed=2).name == "open-gate-mf-seed2"


@pytest.mark.parametrize(
    ("tracks", "budget", "seeds", "message"),
    [
        (["protocol"], "small", 1, "--budget .* not 'small'"),
        (["protocol", "closed"], "quick", 1, "--tracks .* not 'closed'"),
        ([], "quick", 1, "--tracks is empty"),
        (["open"], "full", 0, "--seeds .* not 0"),
    ],
)
def test_bad_choices_are_named(tracks, budget, seeds, message):
    with pytest.raises(InputError, match=message):
        plan(tracks, budget, seeds, "ml-1m")


def test_the_usual_backbone_goes_without_saying():
    row = {"arm": "gate", "cf": "mf", "training": "joint", "backbone": "smollm2-135m-instruct"}
    assert name_of(row) == "gate (MF, joint)"
    assert name_of(row | {"cf": "", "training": "", "backbone": ""}) == "gate"

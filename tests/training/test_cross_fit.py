"""A training row reads the CF vectors of its own fit, in every place where the model reads any."""

import warnings
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tiny import TITLES, BuildModel

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.data.rows import Rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CF_TENSORS
from ccf_llm_hf.training.arguments import CTRTrainingArguments
from ccf_llm_hf.training.collator import PackingCollator
from ccf_llm_hf.training.cross_fit import (
    STRIDE,
    check_folded,
    check_known,
    decode_rows,
    encode_rows,
    install_cross_fit,
)
from ccf_llm_hf.training.trainer import CTRTrainer

PRECISION = {"user_precision": "[2.0, 1.0, 3.0, 1.0, 1.0, 0.0]"}
FOLD_IN = {"cf_logit": True, "cf_fold_in": True}


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    """Four fits that differ in every tensor, with a prior over users."""
    draw = torch.Generator().manual_seed(4)

    def four(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            known = torch.rand(4, *tensor.shape[1:], generator=draw) > 0.3
            known[:, 0] = True
            return known
        return torch.randn(4, *tensor.shape[1:], generator=draw) * 2

    tensors = {name: four(getattr(cf, name)) for name in CF_TENSORS}
    times = torch.tensor([0, 100, 200, 300])
    return replace(cf, **tensors, snapshot_times=times, metadata=PRECISION)


def of_fit(cf: CFVectors, fit: int) -> CFVectors:
    """The vectors of one fit alone."""
    at = range(4)[fit]
    tensors = {name: getattr(cf, name)[at : at + 1] for name in CF_TENSORS}
    return replace(cf, **tensors, snapshot_times=cf.snapshot_times[at : at + 1])


def groups(signed: bool) -> list[Group]:
    """Users known and unknown, histories empty and long, of all fits."""

    def history(*items: int) -> list:
        ids = [f"i{item}" for item in items]
        return [{"id": i, "liked": i != "i1"} for i in ids] if signed else ids

    return [
        Group("u0", history(0, 1, 2), ["i3", "i4"], [2, 3], [0, 1], fit=0),
        Group("u1", history(), ["i5", "i6", "i7"], [0, 0, 0], [1, 1, 0], fit=1),
        Group("u0", history(2, 5), ["i3"], [2], [1], fit=2),
        Group("a stranger", history(3), ["i0", "i2"], [1, 0], [1, 0], fit=-1),
        Group("u4", history(1, 6, 0, 4), ["i2"], [4], [0], history(7), fit=1),
    ]


def streams() -> list[Group]:
    """The histories of these groups, as streams of answered lines."""
    return [
        replace(
            group,
            candidates=[],
            history_lengths=None,
            labels=[1] * len(group.history),
            rows=list(range(len(group.history))),
            stream=True,
        )
        for group in groups(signed=True)
        if group.history
    ]


def test_rows_and_padding_carry_their_fit() -> None:
    rows = torch.tensor([[0, 7, -1], [STRIDE - 1, 3, -1]])
    fits, plain = decode_rows(encode_rows(rows, torch.tensor([[0], [3]])))
    assert fits.tolist() == [[0] * 3, [3] * 3]
    assert torch.equal(plain, rows)
    assert torch.equal(encode_rows(rows, torch.tensor(0)), rows), "plain rows mean the last fit"


@pytest.mark.parametrize(
    ("fusion", "settings", "wording", "cross_fit"),
    [
        ("gate", {"cf_logit": True}, "shared_prefix", "folds"),
        ("gate", FOLD_IN, "shared_prefix", "folds"),
        ("gate", FOLD_IN, "answered", "folds"),
        ("scalar_gate", {}, "shared_prefix", "snapshots"),
        ("sum", {"cf_logit": True}, "shared_prefix", "snapshots"),
        ("cf_only", {}, "shared_prefix", "snapshots"),
        ("gate", FOLD_IN, "shared_prefix", "users"),
        ("gate", FOLD_IN, "answered", "users"),
    ],
)
def test_a_packed_batch_equals_plain_models_of_each_fit(
    build: BuildModel, cf: CFVectors, fusion: str, settings: dict, wording: str, cross_fit: str
) -> None:
    alone = cf
    if cross_fit == "users":  # then nobody has a vector of his own, in training as in serving
        alone = replace(cf, user_known=torch.zeros_like(cf.user_known))
    cf = replace(cf, cross_fit=cross_fit)
    signed = settings == FOLD_IN
    prompt = {"histories": "signed", "fold_in_items": 4} if signed else {}
    model, processor = build(fusion, wording, prompt=prompt, **settings)
    samples = streams() if wording == "answered" else groups(signed)
    plain = {}
    for fit in (-1, 0, 1, 2):
        model.cf.fill(of_fit(alone, fit))
        plain[fit] = []
        for group in samples:
            with torch.no_grad():
                plain[fit].append(model(**processor.pack([group])).logits[0])
    model.cf.fill(cf)
    install_cross_fit(model, cf)
    batch = PackingCollator(processor)(samples)
    with torch.no_grad():
        packed = model(**batch).logits
    for row, group in enumerate(samples):
        expected = plain[group.fit][row]
        count = len(group.scored)
        torch.testing.assert_close(packed[row, :count], expected, rtol=0, atol=1e-4)
        others = [plain[s][row] for s in plain if s != group.fit]
        assert not any(torch.allclose(other, expected, atol=1e-3) for other in others)


def test_evaluation_and_the_checkpoint_hold_the_last_fit(
    build: BuildModel, cf: CFVectors, tmp_path
) -> None:
    model, processor = build("gate", cf_logit=True)
    model.cf.fill(cf)
    names = model.state_dict().keys()
    request = {"user": "u1", "history": ["i2"], "candidates": ["i3", "A new film", "Another"]}
    batch = processor(**request)
    items = torch.arange(len(TITLES))
    with torch.no_grad():
        expected, gates = model(**batch).logits, model.item_gates(items)
        install_cross_fit(model, cf)
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.item_gates(items), gates)
        assert model.state_dict().keys() == names
        model.save_pretrained(tmp_path / "saved", form="full")
        loaded = type(model).from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded(**batch).logits, expected)
    assert loaded.cf.item_vectors.shape == cf.item_vectors.shape[1:]


def test_an_answer_moves_no_logit_up_to_its_own_line(build: BuildModel, cf: CFVectors) -> None:
    cf = replace(cf, cross_fit="users")
    model, processor = build("gate", "answered", prompt={"histories": "signed"}, **FOLD_IN)
    install_cross_fit(model, cf)
    stream = max(streams(), key=lambda group: len(group.history))
    collate = PackingCollator(processor)
    with torch.no_grad():
        before = model(**collate([stream])).logits[0]
        for place, line in enumerate(stream.history):
            flipped = list(stream.history)
            flipped[place] = line | {"liked": not line["liked"]}
            after = model(**collate([replace(stream, history=flipped)])).logits[0]
            assert torch.equal(after[: place + 1], before[: place + 1]), place
            assert ((after - before)[place + 1 :].abs() > 1e-5).all(), place


def test_folds_of_users_serve_every_user_as_a_stranger(build: BuildModel, cf: CFVectors) -> None:
    cf = replace(cf, cross_fit="users")
    model, processor = build(prompt={"histories": "signed"}, **FOLD_IN)
    model.cf.fill(cf)
    history = [{"id": "i1", "liked": False}, "i2"]
    known, stranger = (
        model(**processor(user=user, history=history, candidates=["i3", "i4"])).logits
        for user in ("u0", "nobody")
    )
    assert torch.equal(known, stranger)
    install_cross_fit(model, cf)
    trained = model(**processor(user="u0", history=history, candidates=["i3", "i4"])).logits
    torch.testing.assert_close(trained, known)


def test_a_cf_logit_of_users_that_no_fit_knows_is_refused(build: BuildModel, cf: CFVectors) -> None:
    users = replace(cf, cross_fit="users")
    model, processor = build(cf_logit=True)
    with pytest.raises(InputError, match=r"cross-fit by users.*set cf_fold_in: true"):
        CTRTrainer(model, processing_class=processor, cf=users)
    slots, processor = build()
    taught = CTRTrainingArguments(output_dir="unused", cf_distillation=0.5)
    with pytest.raises(InputError, match="cross-fit by users"):
        CTRTrainer(slots, taught, processing_class=processor, cf=users)
    check_folded(slots, users, reads_logit=False)
    check_folded(build(**FOLD_IN)[0], users, reads_logit=True)


def test_vectors_of_another_catalog_are_refused(build: BuildModel, cf: CFVectors) -> None:
    model, _ = build("gate")
    other = replace(cf, user_ids=[f"v{row}" for row in range(len(cf.user_ids))])
    with pytest.raises(InputError, match="other users or items than the model"):
        install_cross_fit(model, other)


def rows_of(users: list[str], items: list[str]) -> Rows:
    pairs = [{"user_id": user, "item_id": item} for user in users for item in items]
    return Rows.of(Dataset.from_list([pair | {"label": 1, "history": []} for pair in pairs]))


def test_vectors_of_other_spellings_are_refused_and_cold_ones_counted(
    build: BuildModel, cf: CFVectors
) -> None:
    model, _ = build()
    known = [["u0", "u1", "u2"], ["i0", "i1"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_known(model, cf, rows_of(*known))
    with pytest.raises(InputError, match=r"3 of the 3 users .* such as '0'; theirs look like 'u0'"):
        check_known(model, cf, rows_of(["0", "1", "2"], known[1]))
    with pytest.raises(InputError, match=r"2 of the 2 items .* such as '0'; theirs look like 'i0'"):
        check_known(model, cf, rows_of(known[0], ["0", "1"]))
    with pytest.warns(UserWarning, match="1 of the 4 users of the training rows, such as 'new'"):
        check_known(model, cf, rows_of([*known[0], "new"], known[1]))
    folded, _ = build(prompt={"histories": "signed"}, **FOLD_IN)
    check_known(folded, cf, rows_of(["0", "1"], known[1]))

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.cf import SASRecConfig, SASRecFit, fit_cf, fit_sasrec, score_cf, score_sasrec
from ccf_llm_hf.cf import sasrec as sasrec_module
from ccf_llm_hf.cf.sasrec_encoder import ENCODER_FILE, SASRecEncoder
from ccf_llm_hf.cf.training_data import load_training_data, plan_snapshots
from ccf_llm_hf.data import read_rows
from ccf_llm_hf.data.prepared import read_history_column
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc

SETTINGS = {"dim": 8, "blocks": 1, "max_history": 6, "learning_rate": 0.01, "snapshots": 3}
CONFIG = SASRecConfig(**SETTINGS, dropout=0.1, l2=1e-4, item_bias=True, max_epochs=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared"), make_rows())


@pytest.fixture(scope="module")
def fitted(folder: Path) -> SASRecFit:
    return fit_sasrec(folder, CONFIG)


@pytest.fixture
def encoder() -> SASRecEncoder:
    torch.manual_seed(0)
    encoder = SASRecEncoder(20, 8, 2, 2, 6, 0.3, True)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    encoder.known.fill_(True)
    encoder.known[19] = False
    return encoder


def test_a_state_depends_on_the_last_likes_alone(encoder: SASRecEncoder) -> None:
    likes = np.arange(12) % 7
    alone = encoder.states([likes[-6:]])
    torch.testing.assert_close(encoder.states([likes]), alone)
    # Beside a longer history it is padded; padding must not be read.
    short = encoder.states([likes[:2]])
    torch.testing.assert_close(encoder.states([likes, likes[:2]])[1:], short)
    assert not torch.allclose(short, encoder.states([likes[1::-1]]), atol=0.01)  # order counts
    assert encoder.training and torch.equal(encoder.states([likes]), encoder.states([likes]))


def test_unknown_likes_are_left_out(encoder: SASRecEncoder) -> None:
    known = encoder.states([np.array([3, 5])])
    torch.testing.assert_close(encoder.states([np.array([3, -1, 5, 19])]), known)
    empty, nothing_known = encoder.states([np.array([], dtype=int), np.array([-1, 19])])
    torch.testing.assert_close(empty, nothing_known)


def test_training_reads_the_rows_own_histories(folder: Path, encoder: SASRecEncoder) -> None:
    data = load_training_data(folder)
    encoder = SASRecEncoder(len(data.items), 8, 1, 1, 6, 0.0, False)
    encoder.known.fill_(True)
    found = sasrec_module._Sequences.of_rows(data.train, encoder)
    states = encoder(found.tokens)[found.sequence, found.position]
    table = read_rows(folder, "train").assign(history=read_history_column(folder, "train"))
    table = table.sort_values("timestamp", kind="stable", ignore_index=True)
    place = {item: row for row, item in enumerate(data.items["item_id"])}
    tails = []
    for row, history in enumerate(table["history"]):
        length = int(found.position[row])
        assert length == len(history) if len(history) <= 6 else 4 <= length <= 6
        tails.append(np.array([place[item] for item in history[len(history) - length :]], int))
        read = found.tokens[found.sequence[row], 1 : length + 1]
        assert read.tolist() == tails[-1].tolist()
    torch.testing.assert_close(states, encoder.states(tails))
    assert len(found.tokens) < len(table) / 4  # rows share passes


def test_the_table_holds_the_states_of_each_time(fitted: SASRecFit, folder: Path) -> None:
    table, encoder = fitted.vectors, fitted.encoder
    assert table.num_fits == 4
    assert not table.user_known[0].any()
    train = read_rows(folder, "train").sort_values("timestamp", kind="stable")
    place = {item: row for row, item in enumerate(table.item_ids)}
    likes = train[train["label"] > 0].groupby("user_id")["item_id"]
    histories = {user: np.array([place[item] for item in items]) for user, items in likes}
    empty = np.array([], dtype=int)
    states = encoder.states([histories.get(user, empty) for user in table.user_ids])
    torch.testing.assert_close(table.user_vectors[-1], encoder.as_users(states))
    torch.testing.assert_close(table.default_user[-1], encoder.as_users(encoder.states([empty]))[0])
    assert (table.user_vectors[1:, :, -1] == 1).all()
    torch.testing.assert_close(
        table.item_vectors[-1, :, -1][table.item_known[-1]],
        encoder.biases.detach()[table.item_known[-1]],
    )


def test_a_snapshot_never_sees_its_own_rows(folder: Path, tmp_path: Path) -> None:
    chosen = sasrec_module._Chosen(l2=1e-4, dropout=0.1, item_bias=True)

    def tables(prepared: Path) -> list:
        data = load_training_data(prepared)
        histories = sasrec_module.read_histories(prepared, "validation", data.items["item_id"], 6)
        plan = plan_snapshots(data, 3, 9)
        bar = type("Bar", (), {"update": lambda self: None})()
        return sasrec_module._fit(data, histories, CONFIG, chosen, plan, bar).snapshots

    before, rows = tables(folder), make_rows()
    later = rows["timestamp"] >= int(plan_snapshots(load_training_data(folder), 3, 9).times[2])
    changed = rows.assign(label=np.where(later, 1 - rows["label"], rows["label"]))
    after = tables(write_prepared(tmp_path, changed))
    for name in ("user_vectors", "item_vectors", "default_user", "offset"):
        for snapshot in (1, 2):
            assert torch.equal(getattr(before[snapshot], name), getattr(after[snapshot], name))
        assert not torch.equal(getattr(before[3], name), getattr(after[3], name))


def test_scores_follow_each_rows_own_history(
    fitted: SASRecFit, folder: Path, tmp_path: Path
) -> None:
    fitted.save(tmp_path)
    scores, rows = score_sasrec(tmp_path, folder, "test"), read_rows(folder, "test")
    assert list(scores.columns) == ["user_id", "item_id", "label", "score", "prob"]
    table, encoder = fitted.vectors, fitted.encoder
    place = {item: row for row, item in enumerate(table.item_ids)}
    histories = read_history_column(folder, "test")
    for row in (0, 50, len(rows) - 1):
        likes = np.array([place[item] for item in histories[row]], dtype=int)
        user = encoder.as_users(encoder.states([likes]))[0]
        item = table.item_vectors[-1, place[rows["item_id"][row]]]
        logit = float(user @ item + encoder.offset.detach())
        assert scores["score"][row] == pytest.approx(logit, abs=1e-5)
    # The table's states end with train, so they differ.
    assert (table.score(rows)["score"] - scores["score"]).abs().max() > 0.01
    compared = score_cf(tmp_path, folder, "test")
    np.testing.assert_array_equal(compared["score"], scores["score"])
    validation = score_sasrec(tmp_path, folder, "validation")
    found = auc(validation["label"], validation["score"])
    assert table.metadata["validation_auc"] == f"{found:.4f}"
    assert found > 0.6


def test_the_encoder_must_be_that_of_the_table(
    fitted: SASRecFit, folder: Path, tmp_path: Path
) -> None:
    fitted.save(tmp_path)
    content = (tmp_path / ENCODER_FILE).read_bytes()
    (tmp_path / ENCODER_FILE).write_bytes(SASRecEncoder(30, 8, 1, 1, 6, 0.1, True).to_bytes())
    with pytest.raises(InputError, match=r"sasrec\.safetensors is not the encoder"):
        score_sasrec(tmp_path, folder)
    (tmp_path / ENCODER_FILE).write_bytes(content[:100])
    with pytest.raises(InputError, match=r"sasrec\.safetensors is missing or no"):
        score_sasrec(tmp_path, folder)
    (tmp_path / ENCODER_FILE).unlink()
    with pytest.raises(InputError, match=r"sasrec\.safetensors is missing or no"):
        score_cf(tmp_path, folder)
    assert not list(tmp_path.glob("*partial*"))


def test_another_model_in_the_folder_is_scored_by_its_table(
    fitted: SASRecFit, folder: Path, tmp_path: Path
) -> None:
    fitted.save(tmp_path)
    table = fitted.vectors.last()
    table.model_name = "mf"
    table.save(tmp_path)
    scores = score_cf(tmp_path, folder)
    np.testing.assert_array_equal(scores["score"], table.score(read_rows(folder, "test"))["score"])


def test_settings_are_chosen_and_the_callers_generator_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    config = SASRecConfig(**(SETTINGS | {"snapshots": 1}), l2=1e-4, dropout=0.0, max_epochs=3)
    fitted = fit_cf("sasrec", folder, tmp_path / "cf", config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert fitted.num_fits == 2
    assert fitted.dim == 8 + (fitted.metadata["item_bias"] == "true")
    assert "validation_auc: 0." in capsys.readouterr().out
    again = fit_sasrec(folder, config)
    assert torch.equal(again.vectors.user_vectors, fitted.user_vectors)


def test_bad_settings_are_refused() -> None:
    bad = {"heads": 3, "dropout": 1.0, "l2": -1.0, "max_history": 0, "learning_rate": 0.0}
    for name, value in bad.items():
        with pytest.raises(InputError, match=f"{name}="):
            SASRecConfig(**{name: value})

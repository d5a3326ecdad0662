import json

from ccf_llm_hf.training.plots import plot_curves, write_history

HISTORY = [
    {"step": 1, "loss": 0.7},
    {"step": 2, "loss": 0.6},
    {"step": 2, "eval_loss": 0.65, "eval_auc": 0.6, "eval_uauc": 0.55}
    | {"eval_gate_mean": 0.4, "eval_gate_std": 0.1},
    {"step": 4, "eval_loss": 0.6, "eval_auc": 0.7, "eval_uauc": 0.6}
    | {"eval_gate_mean": 0.3, "eval_gate_std": 0.2},
]


def test_history_is_written_as_json_and_picture(tmp_path):
    write_history(HISTORY, tmp_path, "stage")
    assert json.loads((tmp_path / "log.json").read_text()) == HISTORY
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"log.json", "curves.png"}


def test_curves_show_each_series_over_its_own_steps():
    loss, ranking, gate = plot_curves(HISTORY, "stage").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert drawn == {"train": [[1, 0.7], [2, 0.6]], "validation": [[2, 0.65], [4, 0.6]]}
    assert [line.get_label() for line in ranking.lines] == ["AUC", "UAUC"]
    assert gate.lines[0].get_xydata().tolist() == [[2, 0.4], [4, 0.3]]


def test_a_stage_without_gate_has_an_empty_panel():
    history = [{"step": 1, "loss": 0.7}]
    assert plot_curves(history, "text").axes[2].lines[0].get_xydata().size == 0

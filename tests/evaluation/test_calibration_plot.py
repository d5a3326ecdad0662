from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import plot_calibration


def test_plot_calibration_writes_an_image(tmp_path: Path) -> None:
    probs = np.linspace(0, 1, 100)
    scores = pd.DataFrame({"prob": probs, "label": (probs > 0.4).astype(int)})
    plot_calibration(scores, tmp_path / "plots" / "calibration.png")
    content = (tmp_path / "plots" / "calibration.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["calibration.png"]


def test_plot_calibration_names_what_is_wrong(tmp_path: Path) -> None:
    scores = pd.DataFrame({"prob": [0.1], "label": [0]})
    with pytest.raises(InputError, match="'prob'"):
        plot_calibration(scores.drop(columns="prob"), tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.nothing"):
        plot_calibration(scores, tmp_path / "a.nothing")
    assert not list(tmp_path.iterdir())

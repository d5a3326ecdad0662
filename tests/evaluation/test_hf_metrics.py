import socket

import evaluate
import numpy as np
import pytest

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, metric_path, uauc, wuauc

LABELS = [0, 1, 1, 0, 1, 0]
SCORES = [0.1, 0.4, 0.4, 0.4, 0.2, 0.9]
USERS = ["a", "a", "a", "b", "b", "c"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_load_and_compute() -> None:
    loaded = evaluate.load(metric_path("auc"))
    assert loaded.compute(predictions=SCORES, references=LABELS) == {"auc": auc(LABELS, SCORES)}


def test_uauc_takes_users_in_batches() -> None:
    loaded = evaluate.load(metric_path("uauc"))
    for half in (slice(0, 3), slice(3, 6)):
        loaded.add_batch(predictions=SCORES[half], references=LABELS[half], users=USERS[half])
    assert loaded.compute() == {
        "uauc": uauc(LABELS, SCORES, USERS),
        "wuauc": wuauc(LABELS, SCORES, USERS),
    }


@pytest.mark.parametrize("batched", [False, True])
def test_combine(batched: bool) -> None:
    combined = evaluate.combine([metric_path("auc"), metric_path("uauc")])
    inputs = {"predictions": np.array(SCORES), "references": np.array(LABELS), "users": USERS}
    if batched:
        combined.add_batch(**inputs)
        result = combined.compute()
    else:
        result = combined.compute(**inputs)
    assert result == {
        "auc": auc(LABELS, SCORES),
        "uauc": uauc(LABELS, SCORES, USERS),
        "wuauc": wuauc(LABELS, SCORES, USERS),
    }


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="'mae' is unknown"):
        metric_path("mae")

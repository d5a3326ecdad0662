"""A Ray cluster of two nodes on this machine writes what one process does."""

import signal

import hypothesis.internal.observability  # noqa: F401  # see below
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ccf_llm_hf.cli.main import main
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference import ray_engine
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.ray_engine import RayPairScorer
from ccf_llm_hf.inference.score_pairs import PairScorer, checkpoint_identity

# pytest imports that of Hypothesis when a session ends; after Ray has run, Python 3.11 cannot parse
# it any more ("AST constructor recursion depth mismatch").
ray = pytest.importorskip("ray", reason="needs the extra ray")
ROWS, SHARD = 1200, 40
HISTORIES = {"a": ["2", "5"], "b": ["1"]}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else the last to run beside other tests
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def scorer(checkpoint):
    ranker = CTRRanker.from_pretrained(str(checkpoint), device="cpu")
    identity = checkpoint_identity(str(checkpoint), ranker.model)
    return RayPairScorer(ranker, identity, HISTORIES, SHARD, str(checkpoint))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "p.parquet"
    draw = np.random.default_rng(0)
    users, items = draw.choice(["a", "b", "new"], ROWS), draw.choice(list("123456"), ROWS)
    history = [[["2"], None, ["1", "4"]][row % 3] for row in range(ROWS)]
    pq.write_table(pa.table({"user_id": users, "item_id": items, "history": history}), path)
    return path


def read(folder):
    return {file.name: pq.read_table(file) for file in sorted(folder.glob("part-*.parquet"))}


def workers() -> list[psutil.Process]:
    """Processes of this test's cluster that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::MapWorker") or "_Worker" in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def test_two_nodes_write_what_one_process_does_though_a_worker_is_killed(
    cluster, scorer, pairs, tmp_path, monkeypatch
):
    killed: list[int] = []
    score_shards = RayPairScorer.score_shards

    def kill_one(self, shards):
        for shard in score_shards(self, shards):
            yield shard
            if not killed:
                victim = workers()[0]
                killed.append(victim.pid)
                victim.send_signal(signal.SIGKILL)

    monkeypatch.setattr(RayPairScorer, "score_shards", kill_one)
    manifest = scorer.run(pairs, tmp_path / "ray")
    assert killed and not psutil.pid_exists(killed[0])
    assert (manifest["rows"], manifest["new_rows"]) == (ROWS, ROWS)
    local = PairScorer(scorer.ranker, scorer.identity, HISTORIES, SHARD)
    assert local.run(pairs, tmp_path / "local")["finished"]
    ours, theirs = read(tmp_path / "ray"), read(tmp_path / "local")
    assert list(ours) == list(theirs)
    for name, table in ours.items():
        assert table.schema == theirs[name].schema
        for column in ("user_id", "item_id"):
            assert table[column] == theirs[name][column]
        for column in ("logit", "probability"):
            np.testing.assert_allclose(table[column], theirs[name][column], atol=1e-5)
    # Either engine goes on with what the other began.
    (tmp_path / "local" / "part-00003.parquet").unlink()
    assert scorer.run(pairs, tmp_path / "local")["new_rows"] == SHARD
    assert local.run(pairs, tmp_path / "ray")["new_rows"] == 0


def test_what_a_worker_refuses_is_said_in_a_sentence(cluster, scorer, tmp_path, pairs):
    other = RayPairScorer(scorer.ranker, "another", HISTORIES, SHARD, scorer.checkpoint)
    with pytest.raises(InputError, match=r"on the machine .*: .* is another checkpoint"):
        other.run(pairs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))


def test_the_command_scores_by_ray(cluster, checkpoint, pairs, tmp_path, capsys):
    call = ["score", str(checkpoint), "--pairs", str(pairs), "--out", str(tmp_path / "out")]
    assert main([*call, "--engine", "ray"]) == 0
    assert f"scored {ROWS:,} pairs" in capsys.readouterr().out


def test_a_worker_has_a_gpu_or_a_machine(monkeypatch):
    def workers_of(*resources):
        monkeypatch.setattr(
            ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in resources]
        )
        chosen = ray_engine._workers(ray)
        return chosen.pop("compute").max_size, chosen

    assert workers_of({"CPU": 8.0}, {"CPU": 4.0}) == (2, {"num_cpus": 4})
    assert workers_of({"CPU": 8.0, "GPU": 4.0}, {"CPU": 4.0}) == (4, {"num_gpus": 1})

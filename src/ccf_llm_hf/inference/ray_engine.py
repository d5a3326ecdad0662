"""Score pairs on the machines of a Ray cluster; what is written is as of one machine."""

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.score_pairs import PairScorer, Shard, checkpoint_identity

PLACE = ("_number", "_first")  # columns that carry a shard's


@dataclass
class RayPairScorer(PairScorer):
    """A [`PairScorer`] whose shards are scored by Ray Data: one worker a GPU, or a machine where
    there are none, each with the model in memory. This process reads the pairs and writes the
    shards; Ray keeps what waits in its object store, and on disk when that is full.

    A worker that dies is started again, and its shard scored again.

    Args:
        checkpoint: folder, at the same place on every machine, or Hub repository.
        backbone: as in `CTRRanker.from_pretrained`.
    """

    checkpoint: str = ""
    backbone: str | None = None

    def score_shards(self, shards: Iterable[Shard]) -> Iterator[tuple[int, pa.Table]]:
        """As of `PairScorer`, in the order in which they are done.

        Raises:
            InputError: Ray is not installed, or a machine holds another checkpoint.
        """
        ray = import_ray()
        waiting = [ray.put(_with_place(shard)) for shard in shards]
        if not waiting:
            return
        # Else what a worker refused would be lost behind an error of Ray's.
        ray.data.DataContext.get_current().raise_original_map_exception = True
        scored = ray.data.from_arrow_refs(waiting).map_batches(
            _Worker,
            fn_constructor_args=(ray.put(self.histories),),
            fn_constructor_kwargs={
                "checkpoint": self.checkpoint,
                "backbone": self.backbone,
                "identity": self.identity,
            },
            batch_size=None,  # a shard is a block
            batch_format="pyarrow",
            scheduling_strategy="SPREAD",
            **_workers(ray),
        )
        try:
            for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield table[PLACE[0]][0].as_py(), table.drop_columns(list(PLACE))
        except ray.exceptions.RayError as error:
            raise _input_error(error) or error from error


class _Worker:
    """Holds the model; Ray Data calls it with shards."""

    def __init__(
        self, histories: Any, *, checkpoint: str, backbone: str | None, identity: str
    ) -> None:
        self.problem: InputError | None = None
        try:
            ranker = CTRRanker.from_pretrained(checkpoint, backbone=backbone)
            if checkpoint_identity(checkpoint, ranker.model) != identity:
                raise InputError(f"{checkpoint} is another checkpoint than here: copy this one")
            self.scorer = PairScorer(ranker, identity, import_ray().get(histories))
        except (
            InputError
        ) as problem:  # Ray would start a worker that does not start again and again
            self.problem = InputError(f"on the machine {platform.node()}: {problem}")

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.problem:
            raise self.problem
        number, first = (table[name][0].as_py() for name in PLACE)
        scores = self.scorer.score(Shard(number, first, table.drop_columns(list(PLACE))))
        return _with_place(Shard(number, first, scores))


def import_ray() -> Any:
    """Ray, connected to the cluster that it finds, or to one of this machine alone.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            "--engine ray needs the extra ray: pip install 'ccf-llm-hf[ray]' on every machine"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray


def _with_place(shard: Shard) -> pa.Table:
    table = shard.pairs
    for name, value in zip(PLACE, (shard.number, shard.first), strict=True):
        table = table.append_column(name, pa.array([value] * len(table)))
    return table


def _workers(ray: Any) -> dict[str, Any]:
    """How many workers, and what each has of a machine."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in machines))
    if gpus:
        return {"compute": ray.data.ActorPoolStrategy(size=gpus), "num_gpus": 1}
    cpus = [int(resources["CPU"]) for resources in machines if resources.get("CPU", 0) >= 1]
    # Ray gives a worker as many threads as CPUs.
    return {"compute": ray.data.ActorPoolStrategy(size=len(cpus)), "num_cpus": min(cpus)}


def _input_error(error: BaseException | None) -> InputError | None:
    """What a worker refused, out of what Ray wraps it in."""
    while error is not None:
        if isinstance(error, InputError):
            return InputError(*error.args)
        error = getattr(error, "cause", None) or error.__cause__
    return None

"""The graph on Ray Data: sources -> ingest -> describe -> write, streaming and back-pressured.

Every setting of Ray Data that differs from its default stands here, with its reason. Steps never raise for the sake of a clip:
an exception in Ray Data ends the whole job, and its option to tolerate errors loses rows in silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

# Read while Ray is imported: its own default, which it warns about unless it is said aloud; and silence below errors that
# end a process, for its C++ core reports every restarted worker as an error.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from videofactory.shards.schema import CORE_SOURCE_FIELDS, clip_schema, table_of

from .plan import Plan, rows_of
from .recipe import ExecutionSettings
from .sink import ShardSink

_WRITE_CPUS = 0.25
_DESCRIBE_CPUS = 0.5
"""Unlike the ingest step's 1 on purpose: Ray Data fuses neighbours of equal needs, and the few describers would do all the work."""

_SMALLEST_CPUS = 3
"""CPUs declared to Ray at the least. They are logical: on two cores two sources, a describer and a write still need their places."""


class GraphError(Exception):
    """The graph cannot run, or a step of it failed; the message names the step, the cause and the way out."""


@dataclass(frozen=True)
class Resources:
    """What the graph will use.

    Attributes:
        cpus: CPUs declared to Ray.
        gpus: GPUs declared to Ray.
        ingest_tasks: sources worked on at once.
        describers: actors that hold the models.
        object_store: memory for rows on their way, in bytes.
        bundle: bytes gathered for one shard.
    """

    cpus: int
    gpus: float
    ingest_tasks: int
    describers: int
    object_store: int
    bundle: int


@contextlib.contextmanager
def cluster(settings: ExecutionSettings) -> Iterator[None]:
    """Ray on this machine for the time of a build; its warnings stay, its chatter goes."""
    cores = settings.cpus or os.cpu_count() or 1
    # Without an address Ray would join any cluster that RAY_ADDRESS names or that happens to run here.
    with _quiet():
        ray.init(
            address="local",
            num_cpus=max(_SMALLEST_CPUS, cores),
            num_gpus=settings.gpus,
            object_store_memory=settings.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Ray's C++ core writes straight to standard error while it starts; shown after all when that fails."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            file.seek(0)
            os.write(kept, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def resources(plan: Plan) -> Resources:
    """What the running cluster gives this plan.

    Raises:
        GraphError: the steps cannot all hold their places at once; Ray Data would wait for ever, without a word.
    """
    settings, found = plan.recipe.execution, ray.cluster_resources()
    cpus, gpus, store = int(found.get("CPU", 0)), found.get("GPU", 0.0), int(found["object_store_memory"])
    describers = settings.describers if plan.describes else 0
    # A bundle waits in the object store until it is full: larger ones than a quarter of it hang Ray Data.
    planned = Resources(
        cpus=cpus,
        gpus=gpus,
        ingest_tasks=max(1, min(settings.cpus or os.cpu_count() or 1, int(cpus - describers * _DESCRIBE_CPUS - _WRITE_CPUS))),
        describers=describers,
        object_store=store,
        bundle=min(settings.shard_bytes, store // 4),
    )
    check_fits(planned)
    return planned


def check_fits(planned: Resources) -> None:
    """Prove that the actor pools leave room for the largest task: the condition under which Ray Data does not hang for ever.

    Raises:
        GraphError: they do not.
    """
    needed = planned.describers * _DESCRIBE_CPUS + 1
    if needed > planned.cpus:
        raise GraphError(
            f"{planned.describers} describers and one task need {needed:g} CPUs, and there are {planned.cpus}; "
            f"lower execution.describers or raise execution.cpus"
        )
    if planned.gpus and planned.describers > planned.gpus:
        raise GraphError(
            f"{planned.describers} describers need a GPU each, and there are {planned.gpus:g}; "
            f"lower execution.describers or raise execution.gpus"
        )


def run_graph(plan: Plan, planned: Resources, todo: Sequence[dict[str, Any]]) -> None:
    """Run one round: everything that comes of `todo` is committed when this returns.

    Args:
        plan: what to do.
        planned: with what.
        todo: rows of `sources`, with `candidates` where a record exists.

    Raises:
        GraphError: a step failed or nothing moved for `execution.no_progress_seconds`.
    """
    settings = plan.recipe.execution
    context = DataContext.get_current()
    # With reservation Ray Data gives each operator a fixed share: on small machines the heavy step ran one task at a time, and
    # bundles that could not grow within their share hung for ever.
    context.op_resource_reservation_enabled = False
    context.override_object_store_memory_limit_fraction = 0.8
    # Blocks of 16 MiB let the next step begin before a source is finished, and a bundle close near its size.
    context.target_max_block_size = min(16 << 20, max(1 << 16, planned.bundle // 4))
    context.execution_no_progress_timeout_s = settings.no_progress_seconds or settings.decode_seconds + 1800
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says is in the exception, too

    schema = pa.schema([*CORE_SOURCE_FIELDS, pa.field("candidates", pa.list_(pa.struct(list(clip_schema(plan.signals)))))])
    # One table, hence one block and one task, per source.
    dataset = ray.data.from_arrow([table_of([row], schema) for row in todo])
    dataset = dataset.map_batches(
        ingest,
        fn_args=(plan,),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(min(planned.ingest_tasks, len(todo))),
        num_cpus=1,
    )
    if planned.describers:
        dataset = dataset.map_batches(
            Describe,
            fn_constructor_args=(plan,),
            batch_size=settings.describe_batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=planned.describers),
            num_cpus=_DESCRIBE_CPUS,
            num_gpus=1 if planned.gpus else 0,
        )
    try:
        sink = ShardSink(plan, planned.bundle)
        _interruptible(lambda: dataset.write_datasink(sink, ray_remote_args={"num_cpus": _WRITE_CPUS}))
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise GraphError(_explain(error, context.execution_no_progress_timeout_s)) from error


def _interruptible(work: Callable[[], object]) -> None:
    """Do `work` on a thread of its own, so that Ctrl-C always reaches this one: inside Ray it may be swallowed."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failures:
        raise failures[0]


def ingest(batch: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Step 1 as Ray Data calls it: a table of one source in, a table per clip out."""
    yield plan.schema.empty_table()
    step = plan.ingest()
    for source in batch.to_pylist():
        for row in step(source):
            yield plan.table([row])


class Describe:
    """Step 2 as Ray Data calls it, the models loaded once per actor."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._step = plan.describer()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The same rows in the same order, described."""
        return self._plan.table(self._step(list(rows_of(batch, self._plan.schema))))


def _explain(error: BaseException, timeout: float) -> str:
    name = type(error).__name__
    cause = getattr(error, "cause", None)
    text = " ".join((f"{type(cause).__name__}: {cause}" if cause else str(error)).split())
    if "Timeout" in name:
        return f"nothing moved for {timeout:g} s, so the build was stopped: {text}"
    return f"a step failed ({name}): {text[-1500:]}"

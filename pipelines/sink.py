"""The Ray Data sink: each write task turns one bundle of rows into one committed shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.data import Datasink

from videofactory.shards.schema import PAYLOAD_FIELDS
from videofactory.shards.writer import ShardSummary, read_summary

from .plan import Plan, rows_of


class ShardSink(Datasink[ShardSummary]):
    """Writes shards of about `bundle_bytes`.

    A write task that was killed is started again with the same number and the same rows, perhaps after it had committed: so
    the first thing it does is to look. Nothing here depends on the callbacks of the driver, which a kill leaves out.
    """

    def __init__(self, plan: Plan, bundle_bytes: int) -> None:
        self._plan = plan
        self._bundle_bytes = bundle_bytes

    @property
    def min_bytes_per_write(self) -> int:
        """Rows are gathered until they reach this size; it also keeps the write an operator of its own."""
        return self._bundle_bytes

    def write(self, blocks: Iterable[Any], ctx: Any) -> ShardSummary:
        """Write and commit one bundle."""
        done = read_summary(self._plan.storage, self._plan.part(ctx.task_idx))
        if done is not None:
            return done
        writer = self._plan.writer(ctx.task_idx)
        try:
            schema = self._plan.schema.remove(self._plan.schema.get_field_index(_MIDDLE_FRAME))
            for block in blocks:
                for row in rows_of(block, schema):
                    writer.add(row)
            return writer.commit()
        except BaseException:
            writer.abort()
            raise


_MIDDLE_FRAME = PAYLOAD_FIELDS[1].name

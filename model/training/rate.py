"""How fast training is, and how much memory it takes: clips per second, waiting for data, the rate of computation against the peak."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from videofactory.model.benchmark.measure import forward_flops, matmul_rate

from .options import FACTOR, Bucket
from .processes import Processes

_MATRIX_SIDE = 8192
_TEXT_TOKENS = 77


class Rate:
    """Counts what is computed between `begin` and `end`.

    Args:
        unet: whose operations are counted, once for each bucket, on shapes alone.
        processes: all of which do the same.
        precision: of the computation.
        accumulate: batches per step.
    """

    def __init__(self, unet: Any, processes: Processes, precision: torch.dtype, accumulate: int) -> None:
        self._config, self._processes, self._accumulate = dict(unet.config), processes, accumulate
        self._type: Any = next(base for base in type(unet).__mro__ if base.__name__ == "SwapUNet")
        self._flops: dict[Bucket, int] = {}
        # A processor's peak depends on too much to be worth a figure.
        on_gpu = processes.device.type == "cuda"
        self._peak = matmul_rate(processes.device, precision, _MATRIX_SIDE, seconds=0.5) * 1e12 if on_gpu else None
        self._began = self._waited = 0.0
        self._clips = self._operations = 0

    def begin(self, waited: float) -> None:
        """From now on. `waited`: seconds that the loader has waited so far."""
        self._began, self._waited, self._clips, self._operations = time.perf_counter(), waited, 0, 0

    def add(self, bucket: Bucket) -> None:
        """A batch of this bucket, in every process."""
        clips = bucket.batch * self._processes.world
        self._clips += clips
        if self._peak is not None:
            # The backward pass takes twice the operations of the forward pass; what checkpointing repeats does not count.
            self._operations += 3 * clips * self._forward(bucket)

    def end(self, steps: int, waited: float) -> dict[str, float]:
        """`clips_per_second`, `seconds_per_step`, `data_share` (waiting for data, of the time), `share_of_peak` on a GPU.

        The last one is the rate of operations by that of a large matrix product, measured when the run began.
        """
        seconds = time.perf_counter() - self._began
        found = {
            "clips_per_second": self._clips / seconds,
            "seconds_per_step": seconds / steps,
            "data_share": (waited - self._waited) / seconds,
        }
        if self._peak is not None:
            found["share_of_peak"] = self._operations / seconds / self._peak / self._processes.world
        return found

    def _forward(self, bucket: Bucket) -> int:
        if bucket not in self._flops:
            with torch.device("meta"):
                unet = self._type.from_config(self._config)
                sample = torch.zeros(1, unet.config.in_channels, bucket.frames, bucket.height // FACTOR, bucket.width // FACTOR)
                text = torch.zeros(1, _TEXT_TOKENS, unet.config.cross_attention_dim)
                self._flops[bucket] = forward_flops(unet, sample, torch.zeros(1, dtype=torch.int64), text)
        return self._flops[bucket]


def most_memory(device: torch.device) -> float:
    """Most memory in use so far, in bytes: of the device, or of this process where that is a processor."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most) * (1 if sys.platform == "darwin" else 1024)

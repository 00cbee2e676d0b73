"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from videofactory.model.pipeline import TextToVideoSwapPipeline


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads on tensors as small as those of the tests wait for each other more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared_pipe() -> TextToVideoSwapPipeline:
    from .model_pipelines import small_pipeline

    return small_pipeline()


@pytest.fixture
def pipe(shared_pipe: TextToVideoSwapPipeline) -> Iterator[TextToVideoSwapPipeline]:
    """A small pipeline, whose scheduler a test may exchange."""
    scheduler = shared_pipe.scheduler
    yield shared_pipe
    shared_pipe.scheduler = scheduler

"""Training in several processes, where one may have images while another has videos."""

import time
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from .tiny_unets import greatest_difference, inputs, noise, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 120
FRAMES = (3, 1)  # of what each of the two processes has: a video, an image


def loss_of(model, frames):
    sample, text = inputs(frames=frames)
    return functional.mse_loss(model(sample, torch.tensor([3, 700]), text).sample, noise(*sample.shape, seed=5))


def train(rank, folder, checkpointing):
    """Two steps in one of the processes; leaves behind the gradients of the second, and the losses."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=LIMIT / 2), world_size=len(FRAMES), rank=rank)
    unet = tiny_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    model = DistributedDataParallel(unet, find_unused_parameters=True)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, FRAMES[rank])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters()}
    torch.save({"losses": losses, "gradients": gradients}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def in_processes(function, *arguments):
    """Run `function(rank, *arguments)` in two processes, and raise what either raises; neither outlives the time limit."""
    context = multiprocessing.spawn(function, arguments, nprocs=len(FRAMES), join=False)
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"The processes did not end in {LIMIT} seconds.")
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_images_in_one_process_and_videos_in_another_train_as_in_a_single_one(tmp_path, checkpointing):
    in_processes(train, tmp_path, checkpointing)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(FRAMES))]

    unet = tiny_unet().train()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        losses = [loss_of(unet, frames) for frames in FRAMES]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        for rank, loss in enumerate(losses):
            assert abs(found[rank]["losses"][step] - loss.item()) <= 1e-5
    for name, parameter in unet.named_parameters():
        for process in found:
            assert greatest_difference(process["gradients"][name], parameter.grad) <= 5e-5, name
        assert parameter.grad.any(), name


def refuse(rank, folder):
    """What happens without `find_unused_parameters`: the second step on images is an error of PyTorch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", timedelta(seconds=LIMIT / 2), world_size=2, rank=rank)
    model = DistributedDataParallel(tiny_unet().train())
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        loss_of(model, 1)
    (folder / f"refused-{rank}").touch()
    distributed.destroy_process_group()


def test_images_alone_need_the_option_that_the_documents_name(tmp_path):
    in_processes(refuse, tmp_path)
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}

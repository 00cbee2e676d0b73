"""What is trained and how fast: weights or adapters, groups of parameters, the learning rate, gradient clipping, a moving average.

    choose_trained(unet, config.model, config.seed)
    optimizer = build_optimizer(unet, config.optimiser, config.model.spatial)
    average = moving_average(unet, config.ema)

Everything here takes the U-Net itself, not what wraps it for several processes: names are then the same with one process, with
`DistributedDataParallel` around it, and with `fully_shard` (FSDP2) applied to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from videofactory.model.inflation import NEW_IN_UNET2D, NEW_IN_UNET3D
from videofactory.model.settings import nearest

from .settings import EmaSettings, LoraSettings, ModelSettings, OptimiserSettings

ADAPTER = "default"
"""Name of the adapter that is trained, as peft and diffusers call one that was given no name."""

Kind = Literal["spatial", "temporal", "swap"]


def kind_of(name: str) -> Kind:
    """Of which kind the parameter or module of this name is: `spatial`, as an image model has it, `temporal`, or `swap` attention."""
    inside = f".{name}"
    if any(part in inside for part in NEW_IN_UNET3D):
        return "swap"
    over_time = any(part in inside or name.startswith(part) for part in NEW_IN_UNET2D)
    return "temporal" if over_time else "spatial"


def choose_trained(unet: Any, settings: ModelSettings, seed: int = 0) -> None:
    """Leave gradients on for what is to be trained, and add adapters where these are.

    Args:
        unet: a `SwapUNet`, before it is wrapped or sharded; changed in place.
        settings: `train`, `lora` and `spatial`.
        seed: of the adapters' weights; the global random state is left alone.

    Raises:
        ValueError: a target of the adapters is no layer of the U-Net.
    """
    unet.requires_grad_(settings.train == "full")
    if settings.lora is not None:
        _add_adapters(unet, settings.lora, seed)
    if settings.spatial == "frozen":
        for name, parameter in unet.named_parameters():
            if kind_of(name) == "spatial":
                parameter.requires_grad_(False)


def _add_adapters(unet: Any, settings: LoraSettings, seed: int) -> None:
    from peft import LoraConfig

    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
    for target in settings.targets:
        # peft says nothing about a target that no layer has, as long as another one has some.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last_parts = {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 3)}
            near = nearest(target, last_parts)
            raise ValueError(f"model.lora.targets holds {target!r}, which is no layer of the U-Net; the nearest is {near!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets))
        unet.add_adapter(config, ADAPTER)


def trained(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the order of the model."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def check_images(unet: nn.Module) -> None:
    """Whether images can teach this model anything: they pass through spatial layers alone.

    Raises:
        ValueError: no spatial layer is trained.
    """
    if not any(kind_of(name) == "spatial" for name in trained(unet)):
        raise ValueError(
            "data.image_share is above 0, and no spatial layer is trained, so images would teach nothing; set data.image_share to 0, "
            "or add spatial layers to model.lora.targets, for example attn2.to_q"
        )


def shard(unet: Any) -> None:
    """Give every process a part of the weights (FSDP2), block by block; in place, after `choose_trained`, before the optimiser.

    Needs torch.distributed's process group. FSDP2 knows no parameter in another order than the usual one, so the convolutions lose
    `channels_last`, and are reordered at every call.
    """
    unet.to(memory_format=torch.contiguous_format)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block)
    # The root would keep its weights whole after a pass without gradients, and they could not be exchanged for the average's.
    fully_shard(unet, reshard_after_forward=True)


@dataclass(frozen=True)
class Count:
    """Numbers of parameters of one kind, for a table: those that are trained, and those that are frozen."""

    kind: str
    trained: int
    frozen: int


def count(unet: nn.Module) -> list[Count]:
    """Numbers of parameters by kind, adapters apart; the last line is the sum. Frozen weights of adapted layers count as frozen."""
    found: dict[str, list[int]] = {}
    for name, parameter in unet.named_parameters():
        kind = kind_of(name) + (" adapters" if ".lora_" in name else "")
        numbers = found.setdefault(kind, [0, 0])
        numbers[not parameter.requires_grad] += parameter.numel()
    counts = [Count(kind, *numbers) for kind, numbers in sorted(found.items())]
    return [*counts, Count("all", sum(line.trained for line in counts), sum(line.frozen for line in counts))]


def count_table(counts: Iterable[Count]) -> str:
    """The counts as aligned text, one line per kind."""
    rows = [("parameters", "trained", "frozen"), *((line.kind, f"{line.trained:,}", f"{line.frozen:,}") for line in counts)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)


def parameter_groups(
    unet: nn.Module, settings: OptimiserSettings, spatial: Literal["trained", "frozen"] | float = "trained"
) -> list[dict[str, Any]]:
    """The trained parameters in groups: spatial or new, and with or without weight decay.

    Weights of one dimension, which are those of norms, and biases have none. Each group has a `name`, its `params`,
    `weight_decay`, and the rate `lr`, which `initial_lr` repeats: that of `settings`, times `spatial` for spatial layers where it
    is a number.

    Raises:
        ValueError: nothing is trained.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained(unet).items():
        kind = "spatial" if kind_of(name) == "spatial" else "new"
        decays = parameter.ndim > 1
        rate = settings.learning_rate * (spatial if kind == "spatial" and not isinstance(spatial, str) else 1)
        fresh = {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": settings.weight_decay if decays else 0.0}
        group = groups.setdefault(kind if decays else f"{kind}, no decay", fresh)
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the U-Net is trained; call choose_trained first")
    return [{"name": name, **group} for name, group in groups.items()]


def build_optimizer(
    unet: nn.Module, settings: OptimiserSettings, spatial: Literal["trained", "frozen"] | float = "trained"
) -> torch.optim.AdamW:
    """AdamW over the `parameter_groups`; one kernel for all parameters where they are on a GPU. After moving and sharding the U-Net."""
    groups = parameter_groups(unet, settings, spatial)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=on_gpu or None)


def learning_rate_share(step: int, settings: OptimiserSettings, steps: int) -> float:
    """The share of the learning rate at a step, 0 to 1: a line up to the end of the warm-up, then the schedule.

    A function of the step alone, so a run that goes on needs to know nothing else.

    Args:
        step: from 0; after the last of `steps` the share stays what it was there.
        settings: `warmup_steps`, `schedule`, `final_share`.
        steps: of the whole run.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps))
    left = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return settings.final_share + (1 - settings.final_share) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> dict[str, float]:
    """Give every group its `initial_lr` times `share`; returns the rates by the group's name, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scale all gradients down so that their norm over all parameters and processes is at most `limit`; once per step, before it.

    Returns:
        The norm before that, a tensor of no dimension on the gradients' device: reading it waits for the device. Under FSDP2 every
        process must call this, for each has a part of the norm.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in learning if parameter.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(learning, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def moving_average(unet: nn.Module, settings: EmaSettings) -> EMAModel:
    """The average of the trained parameters, beginning at what they are; `average.step(trained(unet).values())` after every step.

    At its step n, from 0, the share that stays is min(decay, 1 - (1 + n)^-power) (the warm-up of K. Crowson's k-diffusion). It holds
    a copy of the trained parameters in memory, on their device and sharded as they are.
    """
    parameters = trained(unet).values()
    return EMAModel(parameters, decay=settings.decay, use_ema_warmup=True, power=settings.warmup_power, foreach=True)


@contextmanager
def averaged(unet: nn.Module, average: EMAModel | None) -> Iterator[None]:
    """Inside, the U-Net has the averaged weights; afterwards its own again, bit by bit. With `None`, nothing happens.

    Weights and average change places one tensor at a time, so it takes no memory to speak of; the average is not to be used inside.

    Raises:
        ValueError: the average is of other parameters.
    """
    _swap(unet, average)
    try:
        yield
    finally:
        _swap(unet, average)


@torch.no_grad()
def _swap(unet: nn.Module, average: EMAModel | None) -> None:
    if average is None:
        return
    parameters = list(trained(unet).values())
    if [parameter.shape for parameter in parameters] != [shadow.shape for shadow in average.shadow_params]:
        raise ValueError(
            f"the average has {len(average.shadow_params)} tensors, and {len(parameters)} parameters are trained; "
            "it must be made after choose_trained, of the same U-Net"
        )
    for parameter, shadow in zip(parameters, average.shadow_params, strict=True):
        kept = parameter.detach().clone()
        parameter.copy_(shadow)
        shadow.copy_(kept)

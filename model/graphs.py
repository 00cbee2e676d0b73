"""The U-Net recorded as a CUDA graph: thousands of short kernels, launched by one call.

A step of few clips is over on the card long before Python has launched its kernels. A graph holds all of them; replayed with new
inputs it computes the same, bit by bit, several times as fast (docs/performance.md).
"""

from typing import Any

import torch

_WARM_UPS = 2  # kernels are compiled and chosen in the first passes, which a recording must not see


class RecordedUNet:
    """Calls a U-Net without gradients, recording each shape of inputs when it first comes.

    A recording keeps the addresses of the weights: make another object when they have moved or changed their type. It holds the
    memory of all activations of a pass.

    Args:
        unet: on a GPU, in evaluation mode, with no hooks that move its weights.

    Raises:
        ValueError: the U-Net is not on a GPU.
    """

    def __init__(self, unet: Any) -> None:
        if unet.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs the U-Net on an NVIDIA GPU, and it is on {unet.device}")
        self._unet = unet
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The prediction (B, out_channels, F, H, W); arguments as of `SwapUNet.forward`, the time step as a tensor."""
        inputs = (sample, timestep.to(sample.device).reshape(-1), text)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._recordings:
            self._recordings[key] = _Recording(self._unet, inputs)
        return self._recordings[key](inputs)


class _Recording:
    @torch.no_grad()
    def __init__(self, unet: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                unet(*self._inputs, return_dict=False)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output: torch.Tensor = unet(*self._inputs, return_dict=False)[0]

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._output.clone()

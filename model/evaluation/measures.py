"""Scores of single videos: agreement of frames with a text, consistency of frames, and how much moves.

Shapes in names: N videos, F frames, C channels, H and W pixels, D features.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

SMALL = 32
"""Height and width at which motion is measured, so that neither noise nor compression counts for much."""
_LEAST_GRADIENT = 1e-3


def text_agreement(images_NFD: Tensor, texts_ND: Tensor) -> Tensor:
    """Mean over the frames of the cosine of a frame's and the text's embedding, (N,), -1 to 1.

    CLIPSIM: Wu et al. 2021, "GODIVA". Neither clamped at 0 nor times 100, as some programs do.
    """
    return functional.cosine_similarity(images_NFD.double(), texts_ND.double()[:, None], dim=-1).mean(1)


def frame_consistency(images_NFD: Tensor) -> Tensor:
    """Mean cosine of the embeddings of consecutive frames, (N,), -1 to 1; a still picture has 1, so look at the motion, too.

    Source: Esser et al. 2023, "Structure and Content-Guided Video Synthesis with Diffusion Models" (with CLIP). A video of one
    frame has 1.
    """
    if images_NFD.shape[1] < 2:
        return images_NFD.new_ones(len(images_NFD)).double()
    images = images_NFD.double()
    return functional.cosine_similarity(images[:, 1:], images[:, :-1], dim=-1).mean(1)


def motion(frames_NFCHW: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, (N,), 0 (a still picture) to 1 (black and white in turn).

    mean over t, y, x of |g(t+1, y, x) - g(t, y, x)|, where g is luma (ITU-R BT.601) of 0 to 1, averaged over areas to 32 x 32.
    """
    grey = _grey(frames_NFCHW)
    if grey.shape[1] < 2:
        return grey.new_zeros(len(grey))
    return grey.diff(dim=1).abs().mean((1, 2, 3))


def displacement(frames_NFCHW: Tensor) -> Tensor:
    """How far brightness moves between consecutive frames, (N,), in widths of the picture; 0 for a still picture.

    sum |dg/dt| / sum |∇g| / 32, over the whole video, with g as for `motion`, differences between consecutive frames and |∇g|
    by central differences of the frame before. It is the length of the flow along the gradient that keeps brightness (Horn and
    Schunck 1981, equation 1), averaged by the gradient; unlike the difference itself it does not grow with contrast. Flicker
    counts, too, and so does what jumps further than the width of an edge, though by less than its way.
    """
    grey = _grey(frames_NFCHW)
    if grey.shape[1] < 2:
        return grey.new_zeros(len(grey))
    inner = grey[:, :-1, 1:-1, 1:-1]
    across = (grey[:, :-1, 1:-1, 2:] - grey[:, :-1, 1:-1, :-2]) / 2
    down = (grey[:, :-1, 2:, 1:-1] - grey[:, :-1, :-2, 1:-1]) / 2
    gradient = (across.square() + down.square()).sqrt().mean((1, 2, 3))
    change = (grey[:, 1:, 1:-1, 1:-1] - inner).abs().mean((1, 2, 3))
    # A picture of one colour has no gradient, and rounding is no motion.
    return change / gradient.clamp_min(_LEAST_GRADIENT) / SMALL


def _grey(frames_NFCHW: Tensor) -> Tensor:
    """Luma of 0 to 1, (N, F, 32, 32), float32."""
    count, frames = frames_NFCHW.shape[:2]
    small = functional.interpolate(frames_NFCHW.flatten(0, 1).float(), (SMALL, SMALL), mode="area")
    weights = small.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return ((small * weights).sum(1) / 255).unflatten(0, (count, frames))

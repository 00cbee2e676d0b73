"""Group norm, with or without SiLU after it, over tokens whose channels lie next to each other: Triton kernels and their gradients.

PyTorch's group norm on a GPU brings `channels_last` memory into the other order and leaves its result there, so that every
convolution after it must turn it back. These kernels take and give (N, S, C) as it is: they read it once for the moments and once
for the result, and twice more for the gradient. Tiles are summed up separately and then joined, in the same order every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton

from .kernels import needs_gradient, parts, plain

CHANNELS = 64  # of one tile: 128 bytes in half precision, a memory transaction
CHUNKS = 32  # tiles that are joined at a time
MOST_SAMPLES = 65_535  # of a launch: CUDA's limit for the last axis of a grid


@triton.jit
def _tile(tokens, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's part of (N, S, C): offsets and mask of its tile, and offsets and mask of its channels in (N, C)."""
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    where = (sample * tokens + row[:, None]) * channels + channel[None, :]
    return where, (row < tokens)[:, None] & inside[None, :], sample * channels + channel, inside


@triton.jit
def _partial(channels, CHANNELS: tl.constexpr):
    """Where this program's sums go in (N, chunks, C)."""
    chunk = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    return chunk * channels + tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _moments_kernel(x, means, squares, tokens, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean, and sum of squared differences from it, of every channel over the rows of a tile."""
    where, inside, _, here = _tile(tokens, channels, ROWS, CHANNELS)
    values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    rows = tl.minimum(tokens - tl.program_id(0) * ROWS, ROWS)
    mean = tl.sum(values, axis=0) / rows
    distance = tl.where(inside, values - mean[None, :], 0.0)
    to = _partial(channels, CHANNELS)
    tl.store(means + to, mean, mask=here)
    tl.store(squares + to, tl.sum(distance * distance, axis=0), mask=here)


@triton.jit
def _normalize_kernel(x, y, scale, shift, tokens, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    where, inside, vector, here = _tile(tokens, channels, ROWS, CHANNELS)
    values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(scale + vector, mask=here, other=0.0)
    b = tl.load(shift + vector, mask=here, other=0.0)
    normed = values * a[None, :] + b[None, :]
    if SILU:
        normed = normed * tl.sigmoid(normed)
    tl.store(y + where, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _before_activation(x, grad, scale, shift, where, inside, vector, here, SILU: tl.constexpr):
    """A tile of x, of the gradient before the activation, and the scale of its channels."""
    values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(scale + vector, mask=here, other=0.0)
    if SILU:
        normed = values * a[None, :] + tl.load(shift + vector, mask=here, other=0.0)[None, :]
        gate = tl.sigmoid(normed)
        grads = grads * gate * (1.0 + normed * (1.0 - gate))
    return values, grads, a


@triton.jit
def _sums_kernel(
    x, grad, scale, shift, mean, sums, products, tokens, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sums over the rows of a tile of the gradient before the activation, and of its product with x minus its mean."""
    where, inside, vector, here = _tile(tokens, channels, ROWS, CHANNELS)
    values, grads, _ = _before_activation(x, grad, scale, shift, where, inside, vector, here, SILU)
    middle = tl.load(mean + vector, mask=here, other=0.0)
    to = _partial(channels, CHANNELS)
    tl.store(sums + to, tl.sum(grads, axis=0), mask=here)
    tl.store(products + to, tl.sum(grads * (values - middle[None, :]), axis=0), mask=here)


@triton.jit
def _gradient_kernel(
    x, grad, out, scale, shift, slope, level, tokens, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    where, inside, vector, here = _tile(tokens, channels, ROWS, CHANNELS)
    values, grads, a = _before_activation(x, grad, scale, shift, where, inside, vector, here, SILU)
    through_variance = tl.load(slope + vector, mask=here, other=0.0)
    through_mean = tl.load(level + vector, mask=here, other=0.0)
    grads = grads * a[None, :] + values * through_variance[None, :] + through_mean[None, :]
    tl.store(out + where, grads.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _chunk(start, tokens, channels, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """Where the sums of CHUNKS tiles over this program's group lie in (N, chunks, C), which exist, and how many rows each tile has."""
    chunk = start + tl.arange(0, CHUNKS)
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * chunks
    where = (first + chunk[:, None]) * channels + tl.program_id(0) * WIDTH + column[None, :]
    rows = tl.minimum(tokens - chunk * ROWS, ROWS).to(tl.float32)
    return where, (chunk < chunks)[:, None] & (column < WIDTH)[None, :], rows[:, None]


@triton.jit
def _join_moments_kernel(
    means, squares, weight, bias, mean_out, deviation_out, scale_out, shift_out, tokens, channels, chunks, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The moments of a group from those of its tiles (Chan et al. 1979), and with them y = scale x + shift for every channel."""
    total = tl.zeros((CHUNKS, COLUMNS), dtype=tl.float32)
    for start in range(0, chunks, CHUNKS):
        where, inside, rows = _chunk(start, tokens, channels, chunks, ROWS, WIDTH, COLUMNS, CHUNKS)
        total += tl.where(inside, tl.load(means + where, mask=inside, other=0.0) * rows, 0.0)
    size = tokens * (WIDTH * 1.0)
    mean = tl.sum(total) / size
    total = tl.zeros((CHUNKS, COLUMNS), dtype=tl.float32)
    for start in range(0, chunks, CHUNKS):
        where, inside, rows = _chunk(start, tokens, channels, chunks, ROWS, WIDTH, COLUMNS, CHUNKS)
        distance = tl.load(means + where, mask=inside, other=0.0) - mean
        total += tl.where(inside, tl.load(squares + where, mask=inside, other=0.0) + rows * distance * distance, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(total) / size + eps)
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean_out + group, mean)
    tl.store(deviation_out + group, reciprocal)
    column = tl.arange(0, COLUMNS)
    channel, here = tl.program_id(0) * WIDTH + column, column < WIDTH
    scale = reciprocal * tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=here, other=0.0).to(tl.float32) - mean * scale
    vector = tl.program_id(1).to(tl.int64) * channels + channel
    tl.store(scale_out + vector, scale, mask=here)
    tl.store(shift_out + vector, shift, mask=here)


@triton.jit
def _join_sums_kernel(
    sums, products, mean_in, deviation_in, scale_in, total_out, product_out, slope_out, level_out, tokens, channels, chunks,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sums of every channel from those of its tiles, and the line in x, slope x + level, that the moments add to the gradient.

    With g the gradient before the activation and xhat the normed x, d loss / d x is
    scale g - mean over the group of (scale g) - xhat mean over the group of (scale g xhat).
    """
    total = tl.zeros((CHUNKS, COLUMNS), dtype=tl.float32)
    product = tl.zeros((CHUNKS, COLUMNS), dtype=tl.float32)
    for start in range(0, chunks, CHUNKS):
        where, inside, _ = _chunk(start, tokens, channels, chunks, ROWS, WIDTH, COLUMNS, CHUNKS)
        total += tl.load(sums + where, mask=inside, other=0.0)
        product += tl.load(products + where, mask=inside, other=0.0)
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    mean, reciprocal = tl.load(mean_in + group), tl.load(deviation_in + group)
    column = tl.arange(0, COLUMNS)
    here = column < WIDTH
    vector = tl.program_id(1).to(tl.int64) * channels + tl.program_id(0) * WIDTH + column
    scale = tl.load(scale_in + vector, mask=here, other=0.0)
    totals, normed = tl.sum(total, axis=0), tl.sum(product, axis=0) * reciprocal
    size = tokens * (WIDTH * 1.0)
    slope = -tl.sum(normed * scale) * reciprocal / size
    level = -tl.sum(totals * scale) / size - slope * mean
    tl.store(total_out + vector, totals, mask=here)
    tl.store(product_out + vector, normed, mask=here)
    tl.store(slope_out + vector, tl.zeros((COLUMNS,), dtype=tl.float32) + slope, mask=here)
    tl.store(level_out + vector, tl.zeros((COLUMNS,), dtype=tl.float32) + level, mask=here)


def _rows(tokens: int) -> int:
    """Rows of a tile: many where there are many, so that few tiles are to be joined."""
    return 128 if tokens >= 4096 else 64 if tokens > 32 else 32 if tokens > 16 else 16


def _tiles(wrap, kernel, x: torch.Tensor, *arguments: torch.Tensor, **constants: bool) -> None:
    samples, tokens, channels = x.shape
    rows = _rows(tokens)
    grid = (parts(tokens, rows), parts(channels, CHANNELS), samples)
    wrap(kernel)[grid](x, *arguments, tokens, channels, **constants, ROWS=rows, CHANNELS=CHANNELS)


def _groups(wrap, kernel, x: torch.Tensor, groups: int, *arguments: torch.Tensor, **numbers: float) -> None:
    samples, tokens, channels = x.shape
    rows, width = _rows(tokens), channels // groups
    wrap(kernel)[(groups, samples)](
        *arguments, tokens, channels, parts(tokens, rows), **numbers,
        ROWS=rows, WIDTH=width, COLUMNS=triton.next_power_of_2(width), CHUNKS=CHUNKS,
    )  # fmt: skip


def _per_tile(x: torch.Tensor) -> torch.Tensor:
    samples, tokens, channels = x.shape
    return x.new_empty((samples, parts(tokens, _rows(tokens)), channels), dtype=torch.float32)


Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(wrap, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool) -> Result:
    """The result, mean and reciprocal deviation of every group (N, groups), and scale and shift of every channel (N, C)."""
    x = x.contiguous()
    samples, _, channels = x.shape
    means, squares = _per_tile(x), _per_tile(x)
    _tiles(wrap, _moments_kernel, x, means, squares)
    mean = x.new_empty((samples, groups), dtype=torch.float32)
    scale = x.new_empty((samples, channels), dtype=torch.float32)
    deviation, shift = torch.empty_like(mean), torch.empty_like(scale)
    _groups(wrap, _join_moments_kernel, x, groups, means, squares, weight, bias, mean, deviation, scale, shift, eps=eps)
    y = torch.empty_like(x)
    _tiles(wrap, _normalize_kernel, x, y, scale, shift, SILU=silu)
    return y, mean, deviation, scale, shift


def _gradients(
    wrap,
    x: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    grad: torch.Tensor,
    silu: bool,
) -> Gradients:
    """The gradients of x, and of weight and bias in float32."""
    x, grad = x.contiguous(), grad.contiguous()
    groups = mean.shape[1]
    middle = mean.repeat_interleave(x.shape[2] // groups, dim=1)  # contiguous, as the kernel reads it
    sums, products = _per_tile(x), _per_tile(x)
    _tiles(wrap, _sums_kernel, x, grad, scale, shift, middle, sums, products, SILU=silu)
    total, product, slope, level = (torch.empty_like(scale) for _ in range(4))
    _groups(wrap, _join_sums_kernel, x, groups, sums, products, mean, deviation, scale, total, product, slope, level)
    out = torch.empty_like(x)
    _tiles(wrap, _gradient_kernel, x, grad, out, scale, shift, slope, level, SILU=silu)
    return out, product.sum(0), total.sum(0)


@triton_op("videofactory::group_norm", mutates_args=())
def _operator(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(wrap_triton, x, weight, bias, groups, eps, silu)


@triton_op("videofactory::group_norm_backward", mutates_args=())
def _backward_operator(
    x: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    grad: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(wrap_triton, x, mean, deviation, scale, shift, grad, silu)


def _save(ctx, inputs: tuple[Any, ...], output: Result) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.save_for_backward(x, *output[1:])


def _of_inputs(ctx, gradients: Gradients) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = gradients
    return grad_x, grad_weight.to(ctx.dtypes[0]), grad_bias.to(ctx.dtypes[1]), None, None, None


_operator.register_autograd(
    lambda ctx, grad, *_: _of_inputs(ctx, _backward_operator(*ctx.saved_tensors, grad, ctx.silu)), setup_context=_save
)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Any) -> torch.Tensor:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device, wherever the tensors are
            result = _forward(plain, *inputs)
        _save(ctx, inputs, result)
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, deviation, scale, shift = ctx.saved_tensors
        with torch.cuda.device_of(x):
            return _of_inputs(ctx, _gradients(plain, x, mean, deviation, scale, shift, grad, ctx.silu))


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool) -> torch.Tensor:
    """`group_norm(x)`, then SiLU where `silu`: x of shape (N, S, C), channels last, in any floating type; moments in float32.

    Equals `torch.nn.functional.group_norm` on (N, C, S).
    """
    inputs = (x, weight, bias, groups, eps, silu)
    if torch.compiler.is_compiling():
        return _operator(*inputs)[0]
    if needs_gradient(x, weight, bias):
        return _GroupNorm.apply(*inputs)
    with torch.cuda.device_of(x):
        return _forward(plain, *inputs)[0]

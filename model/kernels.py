"""Triton kernels for NVIDIA GPUs: attention over few frames, and the gate of the feed-forward layer, both with their gradients.

General attention kernels are made for long sequences. Over 16 frames they compute mostly padding, and want the frames of a
position next to each other, which a video in memory has not: here every program reads the frames of one position and head where
they lie. All are PyTorch operators, seen by `torch.compile`; nothing here is needed where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton

# Beyond this the tile of one position no longer fits the registers of a warp, and general kernels are as good.
MOST_FRAMES = 64
HEAD_DIMS = (16, 32, 64, 128)
# Four tiles of the gradient lie in shared memory, of which GPUs outside of data centres have 99 KiB per program.
MOST_TILE_BYTES = 16 * 1024
BLOCK = 1024


@triton.jit
def _offsets(frames, positions, heads, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where the frames of this program's position and head lie in a contiguous (B, F, P, heads, head_dim), and which exist."""
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    position = (program // heads) % positions
    clip = program // (heads * positions)
    rows = tl.arange(0, ROWS).to(tl.int64)
    first = ((clip * frames * positions + position) * heads + head) * WIDTH
    return first + rows[:, None] * (positions * heads * WIDTH) + tl.arange(0, WIDTH)[None, :], rows[:, None] < frames


@triton.jit
def _probabilities(query, key, frames, scale, ROWS: tl.constexpr):
    """softmax(scale q k^T) over the frames that exist, in float32."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, ROWS)[None, :] < frames, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _attend(q, k, v, out, frames, positions, heads, scale, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    where, exists = _offsets(frames, positions, heads, ROWS, WIDTH)
    query = tl.load(q + where, mask=exists, other=0.0)
    key = tl.load(k + where, mask=exists, other=0.0)
    value = tl.load(v + where, mask=exists, other=0.0)
    weights = _probabilities(query, key, frames, scale, ROWS).to(value.dtype)
    tl.store(out + where, tl.dot(weights, value, input_precision="ieee").to(value.dtype), mask=exists)


@triton.jit
def _attend_backward(
    q, k, v, grad, grad_q, grad_k, grad_v, frames, positions, heads, scale, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    where, exists = _offsets(frames, positions, heads, ROWS, WIDTH)
    query = tl.load(q + where, mask=exists, other=0.0)
    key = tl.load(k + where, mask=exists, other=0.0)
    value = tl.load(v + where, mask=exists, other=0.0)
    grad_out = tl.load(grad + where, mask=exists, other=0.0)
    weights = _probabilities(query, key, frames, scale, ROWS)
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
    grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None]) * scale
    grad_scores = grad_scores.to(query.dtype)
    grad_value = tl.dot(tl.trans(weights.to(query.dtype)), grad_out, input_precision="ieee")
    tl.store(grad_v + where, grad_value.to(value.dtype), mask=exists)
    tl.store(grad_q + where, tl.dot(grad_scores, key, input_precision="ieee").to(query.dtype), mask=exists)
    tl.store(grad_k + where, tl.dot(tl.trans(grad_scores), query, input_precision="ieee").to(key.dtype), mask=exists)


def parts(size: int, length: int) -> int:
    """How many parts of at most `length` make up `size`."""
    # Triton's own cdiv takes longer than launching a kernel.
    return -(-size // length)


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether what is computed from them is to be differentiated; without, autograd's functions only cost time."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def plain(kernel):
    """A kernel as it is, for eager execution. Within an operator, `wrap_triton` takes its place and lets compilers see the kernel."""
    return kernel


def _rows(frames: int) -> int:
    """Rows of a tile: tensor cores take 16 at least, and Triton powers of two."""
    return 16 if frames <= 16 else 32 if frames <= 32 else 64


def fits(query: torch.Tensor) -> bool:
    """Whether `attend_over_time` takes queries of this shape, (B, F, P, heads, head_dim), and type."""
    frames, width = query.shape[1], query.shape[-1]
    small = query.dtype.itemsize <= 4 and _rows(frames) * width * query.dtype.itemsize <= MOST_TILE_BYTES
    return 1 <= frames <= MOST_FRAMES and width in HEAD_DIMS and small


def _launch(wrap, kernel, tensors: list[torch.Tensor]) -> None:
    clips, frames, positions, heads, width = tensors[0].shape
    rows = _rows(frames)
    grid = (clips * positions * heads,)
    wrap(kernel)[grid](*tensors, frames, positions, heads, width**-0.5, ROWS=rows, WIDTH=width, num_warps=1 if rows <= 16 else 4)


def _attend_forward(wrap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    _launch(wrap, _attend, [query, key, value, out])
    return out


def _attend_gradients(wrap, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, grad = (tensor.contiguous() for tensor in tensors)
    grads = torch.empty_like(query), torch.empty_like(query), torch.empty_like(query)
    _launch(wrap, _attend_backward, [query, key, value, grad, *grads])
    return grads


@triton_op("videofactory::attend_over_time", mutates_args=())
def _attend_operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _attend_forward(wrap_triton, query, key, value)


@triton_op("videofactory::attend_over_time_backward", mutates_args=())
def _attend_backward_operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _attend_gradients(wrap_triton, query, key, value, grad)


def _save_inputs(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


_attend_operator.register_autograd(
    lambda ctx, grad: _attend_backward_operator(*ctx.saved_tensors, grad), setup_context=_save_inputs
)


class _AttendOverTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        with torch.cuda.device_of(query):  # Triton launches on the current device, wherever the tensors are
            return _attend_forward(plain, query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.cuda.device_of(grad):
            return _attend_gradients(plain, *ctx.saved_tensors, grad)


def attend_over_time(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention along the second axis, all tensors of one shape (B, F, P, heads, head_dim) and type.

    Raises:
        ValueError: the shapes or types differ, or `fits` refuses them.
    """
    if not (query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype and fits(query)):
        given = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (query, key, value))
        raise ValueError(
            f"Attention over time takes three tensors of one shape and type, 1 to {MOST_FRAMES} frames; given: {given}."
        )
    # Compilers need an operator; calling one costs far more time than these kernels run, so eager execution does without.
    if torch.compiler.is_compiling():
        return _attend_operator(query, key, value)
    if needs_gradient(query, key, value):
        return _AttendOverTime.apply(query, key, value)
    with torch.cuda.device_of(query):
        return _attend_forward(plain, query, key, value)


@triton.jit
def _gelu(x):
    """x times the normal distribution function of x, and that function."""
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * below, below


@triton.jit
def _gate_kernel(projected, out, total, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    where = (index // width) * (2 * width) + index % width
    hidden = tl.load(projected + where, mask=inside).to(tl.float32)
    opened, _ = _gelu(tl.load(projected + where + width, mask=inside).to(tl.float32))
    tl.store(out + index, (hidden * opened).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(projected, grad, grad_projected, total, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    where = (index // width) * (2 * width) + index % width
    hidden = tl.load(projected + where, mask=inside).to(tl.float32)
    gate = tl.load(projected + where + width, mask=inside).to(tl.float32)
    grad_out = tl.load(grad + index, mask=inside).to(tl.float32)
    opened, below = _gelu(gate)
    slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_projected + where, (grad_out * opened).to(grad_projected.dtype.element_ty), mask=inside)
    tl.store(grad_projected + where + width, (grad_out * hidden * slope).to(grad_projected.dtype.element_ty), mask=inside)


def _gate_forward(wrap, projected: torch.Tensor) -> torch.Tensor:
    projected = projected.contiguous()
    width = projected.shape[-1] // 2
    out = projected.new_empty((*projected.shape[:-1], width))
    wrap(_gate_kernel)[(parts(out.numel(), BLOCK),)](projected, out, out.numel(), width, BLOCK=BLOCK)
    return out


def _gate_gradient(wrap, projected: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    projected, grad = projected.contiguous(), grad.contiguous()
    out = torch.empty_like(projected)
    grid = (parts(grad.numel(), BLOCK),)
    wrap(_gate_backward_kernel)[grid](projected, grad, out, grad.numel(), grad.shape[-1], BLOCK=BLOCK)
    return out


@triton_op("videofactory::gate", mutates_args=())
def _gate_operator(projected: torch.Tensor) -> torch.Tensor:
    return _gate_forward(wrap_triton, projected)


@triton_op("videofactory::gate_backward", mutates_args=())
def _gate_backward_operator(projected: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return _gate_gradient(wrap_triton, projected, grad)


_gate_operator.register_autograd(lambda ctx, grad: _gate_backward_operator(*ctx.saved_tensors, grad), setup_context=_save_inputs)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(projected)
        with torch.cuda.device_of(projected):
            return _gate_forward(plain, projected)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (projected,) = ctx.saved_tensors
        with torch.cuda.device_of(grad):
            return _gate_gradient(plain, projected, grad)


def gate(projected: torch.Tensor) -> torch.Tensor:
    """`a * gelu(b)` of the two halves a, b of the last axis: (..., 2W) to (..., W); the exact GELU, in float32 inside."""
    if torch.compiler.is_compiling():
        return _gate_operator(projected)
    if needs_gradient(projected):
        return _Gate.apply(projected)
    with torch.cuda.device_of(projected):
        return _gate_forward(plain, projected)

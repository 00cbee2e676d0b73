"""Run our Triton kernels against float64 references and print the relative errors as JSON; on a GPU, else in Triton's interpreter.

A program of its own, since Triton decides at import whether to interpret: `TRITON_INTERPRET=1 python -m tests.kernel_checks`.
"""

import json
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch.nn import functional

from videofactory.model import group_norm, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Operation = Callable[..., torch.Tensor]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bfphd,bgphd->bphfg", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), value)


def gate(projected: torch.Tensor) -> torch.Tensor:
    opened, by = projected.chunk(2, -1)
    return opened * functional.gelu(by)


def normed(groups: int, silu: bool) -> Operation:
    def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result = functional.group_norm(x.transpose(1, 2), groups, weight, bias, 1e-5).transpose(1, 2)
        return functional.silu(result) if silu else result

    return reference


def errors(ours: Operation, reference: Operation, *inputs: torch.Tensor) -> list[float]:
    """Relative errors of the result and of the gradient with respect to every input."""
    inputs = tuple(tensor.to(DEVICE).requires_grad_() for tensor in inputs)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    found, expected = ours(*inputs), reference(*exact)
    grad = torch.randn_like(expected)
    found_all = [found, *torch.autograd.grad(found, inputs, grad.to(found.dtype))]
    with mock.patch("torch.compiler.is_compiling", return_value=True):  # the operator that compilers see
        as_operator = ours(*inputs)
    for eager, operator in zip(
        found_all, [as_operator, *torch.autograd.grad(as_operator, inputs, grad.to(found.dtype))], strict=True
    ):
        assert torch.equal(eager, operator)
    expected_all = [expected, *torch.autograd.grad(expected, exact, grad)]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(torch.autograd.grad(ours(*inputs).sum(), inputs[0], create_graph=True)[0].sum(), inputs[0])
    with torch.no_grad():
        assert torch.equal(ours(*inputs), found)
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found_all, expected_all, strict=True)]
    return [float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs]  # a single frame has no gradient for its query


def check_parts_of_the_gradient() -> None:
    """A gradient that nobody asked for is left out, and those asked for do not change."""
    x, weight, bias = torch.randn(2, 9, 32, device=DEVICE), *torch.randn(2, 32, device=DEVICE)

    def result(*wanted: bool) -> list[torch.Tensor | None]:
        given = [tensor.clone().requires_grad_(asked) for tensor, asked in zip((x, weight, bias), wanted, strict=True)]
        group_norm.group_norm(*given, 4, 1e-5, True).sum().backward()
        return [tensor.grad for tensor in given]

    whole = result(True, True, True)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        for found, expected, asked in zip(result(*wanted), whole, wanted, strict=True):
            assert torch.equal(found, expected) if asked else found is None


def check_refusals() -> None:
    """What the kernel of attention over time cannot take is refused before it runs."""
    query = torch.randn(1, 4, 3, 2, 16, device=DEVICE)
    too_many = torch.randn(1, 65, 3, 2, 16, device=DEVICE)
    for tensors in ((query, query[:, :3], query), (query, query, query.half()), (too_many,) * 3, (query[..., :7],) * 3):
        with pytest.raises(ValueError, match="1 to 64 frames"):
            kernels.attend_over_time(*tensors)
    assert not kernels.fits(torch.empty(1, 64, 1, 1, 128))  # the gradient's tiles would fill the shared memory of small GPUs
    assert not kernels.fits(query.double())


def main() -> None:
    torch.manual_seed(0)
    check_parts_of_the_gradient()
    check_refusals()
    results: dict[str, list[float]] = {}
    # The interpreter multiplies no matrices of bfloat16.
    for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ()):
        for frames, width in ((1, 16), (2, 16), (5, 32), (16, 64), (16, 128), (21, 16), (40, 16), (64, 64)):
            tensors = [torch.randn(2, frames, 3, 2, width, dtype=dtype) for _ in range(3)]
            results[f"attention {frames} {width} {dtype}"] = errors(kernels.attend_over_time, attention, *tensors)
        scattered = [torch.randn(2, 3, 5, 2, 32, dtype=dtype).transpose(1, 2) for _ in range(3)]
        results[f"attention scattered {dtype}"] = errors(kernels.attend_over_time, attention, *scattered)
        results[f"gate {dtype}"] = errors(kernels.gate, gate, torch.randn(3, 70, 24, dtype=dtype))
        for samples, tokens, channels, groups, silu in (
            (2, 1, 32, 8, True),
            (2, 5, 32, 8, True),
            (3, 70, 96, 8, False),
            (2, 20, 64, 1, True),
            (1, 4200, 64, 32, True),
        ):
            x = torch.randn(samples, tokens, channels, dtype=dtype) * 2 + 3  # a mean that would cancel digits, were it squared
            weights = [torch.randn(channels, dtype=dtype) for _ in range(2)]

            def ours(*inputs: torch.Tensor, groups: int = groups, silu: bool = silu) -> torch.Tensor:
                return group_norm.group_norm(*inputs, groups, 1e-5, silu)

            results[f"norm {tokens} {silu} {dtype}"] = errors(ours, normed(groups, silu), x, *weights)
        x = torch.randn(3, 64, 17, dtype=dtype).transpose(1, 2)
        weights = [torch.randn(64, dtype=torch.float32) for _ in range(2)]  # as under autocast: weights wider than the features
        results[f"norm scattered {dtype}"] = errors(
            lambda *inputs: group_norm.group_norm(*inputs, 8, 1e-5, True), normed(8, True), x, *weights
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()

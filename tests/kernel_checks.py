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
    return [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(found_all, expected_all, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, list[float]] = {}
    # The interpreter multiplies no matrices of bfloat16.
    for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ()):
        for frames, width in ((2, 16), (5, 32), (16, 64), (21, 16), (40, 16)):
            tensors = [torch.randn(2, frames, 3, 2, width, dtype=dtype) for _ in range(3)]
            results[f"attention {frames} {width} {dtype}"] = errors(kernels.attend_over_time, attention, *tensors)
        results[f"gate {dtype}"] = errors(kernels.gate, gate, torch.randn(3, 70, 24, dtype=dtype))
        for samples, tokens, channels, groups, silu in (
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
    print(json.dumps(results))


if __name__ == "__main__":
    main()

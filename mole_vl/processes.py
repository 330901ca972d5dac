"""What several processes of one run must do together."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, with gradient; `x` itself where there is only one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Sum.apply(x)  # pyright: ignore[reportReturnType]
    return x

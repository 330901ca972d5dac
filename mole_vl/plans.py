"""How a mixture of low-rank updates is computed, as pure functions.

Shape legend: r rows, p positions, i in_features, o out_features, R rank summed over experts,
E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dense(x: Tensor, a: Tensor, b: Tensor, rank_weights: Tensor) -> Tensor:
    """All experts at once: `sum_e g_e s_e B_e (A_e x)` in two products.

    Experts are stacked along the rank axis, so weights apply to Delta-W: a weight of expert e
    multiplies e's segment of `A x`, and no tensor of rows x experts x out_features exists.

    Args:
        x: Layer input, (..., i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        rank_weights: `g_e s_e` of the expert that each rank belongs to, (R,) or (..., R).

    Returns:
        The update of the layer's output, (..., o).
    """
    hidden_R = F.linear(x.to(a.dtype), a)
    return F.linear(hidden_R * rank_weights.to(a.dtype), b)


def dense_conv(x: Tensor, a: Tensor, b: Tensor, rank_weights: Tensor, base: nn.Conv2d) -> Tensor:
    """`dense` for a convolution: A convolves as the base does, B maps pixel by pixel.

    Args:
        x: Layer input, (r, i, height, width).
        a: Stacked kernels, (R, i, kernel height, kernel width).
        b: Stacked up projections, (o, R).
        rank_weights: `g_e s_e` of the expert that each rank belongs to, (1 or r, R, 1, 1).
        base: The convolution whose stride, padding and dilation hold.

    Returns:
        The update of the layer's output, (r, o, height', width').
    """
    x = x.to(a.dtype)
    hidden_R = F.conv2d(x, a, None, base.stride, base.padding, base.dilation)
    return F.conv2d(hidden_R * rank_weights.to(a.dtype), b[:, :, None, None])


def align(weights: Tensor, x: Tensor, where: str) -> Tensor:
    """Weights that broadcast against a layer's input along all but the last axis.

    Args:
        weights: (E,), (rows, E) or (rows, positions, E).
        x: The layer's input, (rows, ..., i).
        where: The layer's path, for the message.

    Raises:
        ValueError: The weights vary over rows or positions that the input does not have.
    """
    lead_w, lead_x = weights.shape[:-1], x.shape[:-1]
    if len(lead_w) <= len(lead_x) and tuple(lead_x[: len(lead_w)]) == tuple(lead_w):
        fill = (1,) * (len(lead_x) - len(lead_w))
        return weights.reshape(*lead_w, *fill, weights.shape[-1])
    over = ("nothing", "rows", "rows and positions")[len(lead_w)]
    raise ValueError(
        f"{where}: its gate's weights vary over {over}, {tuple(lead_w)}, but the layer reads "
        f"{tuple(lead_x)}; use a gate over rows for layers that read another sequence "
        "(cross-attention keys and values)"
    )


def in_order(weights: Tensor, places: Tensor | None, experts: int) -> Tensor:
    """Weights (..., K) of chosen experts as weights of all in order, (..., E), zero for the others.

    Args:
        weights: (..., K).
        places: Which expert each is for, (..., K), below 0, with weight 0, for nobody; None where
            all stand in order.
        experts: E.
    """
    if places is None:
        return weights
    every = weights.new_zeros(*weights.shape[:-1], experts)
    # A sum: what is nobody's adds its zero to the first.
    return torch.scatter_add(every, -1, places.clamp_min(0), weights)


def expand(weights: Tensor, segments: Tensor, scales: Tensor) -> Tensor:
    """Expert weights (..., E) to rank weights (..., R): each rank takes its expert's, scaled."""
    return torch.index_select(weights, -1, segments) * scales

"""Arithmetic of low-rank updates through their cores: no layer's full Delta-W is ever built."""

import torch
from torch import Tensor


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of `b @ a`, through the R x R core of its factors.

    Args:
        b: Up projection, (out, R).
        a: Down projection, (R, in).

    Returns:
        u (out, k), s (k,) falling, v (in, k) with `b @ a = u diag(s) v^T`, in fp64; k is the least
        of R, out and in.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, right.Q @ vh.T


def top_input(b: Tensor, a: Tensor) -> Tensor | None:
    """The input direction that `b @ a` amplifies most, its top right singular vector, (in,).

    Of length 1, in fp64; its sign means nothing. None for a product that is zero.
    """
    if not (a.any() and b.any()):
        return None
    _u, s, v = product_svd(b, a)
    return v[:, 0] if s[0] > 0 else None

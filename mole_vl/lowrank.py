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

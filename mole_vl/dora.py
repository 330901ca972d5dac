"""DoRA: a LoRA that also rescales the base's rows (arXiv 2402.09353).

`W' = m * (W + s B A) / norm(W + s B A)`, a norm for each row, so that the layer's output without
its bias is `c * (W x + s B A x)`, `c = m / norm(W + s B A)`. The base is called, never read: it may
be quantised. As in the paper (section 4.3), no gradient goes through the norm.

Shape legend: i in_features, o out_features, R rank summed over experts, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mole_vl.stack import Learning, joined

_STEP = 1024


def unbiased(base: nn.Module, x: Tensor) -> Tensor:
    """`W x` of a linear layer of any kind: (..., i) to (..., o)."""
    y = base(x)
    bias = getattr(base, "bias", None)
    return y if bias is None else y - bias


@torch.no_grad()
def row_norms(base: nn.Module, width: int) -> Tensor:
    """Norm of each row of a linear layer's weight, (o,), in fp32.

    Args:
        base: The layer.
        width: What it reads, i.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    total: Tensor | float = 0.0
    for start in range(0, width, _STEP):
        rows = torch.arange(start, min(start + _STEP, width), device=weight.device)
        units = torch.zeros(len(rows), width, device=weight.device, dtype=dtype)
        units[torch.arange(len(rows)), rows] = 1.0
        total = total + unbiased(base, units).float().square().sum(0)
    return torch.as_tensor(total).sqrt()


@torch.no_grad()
def changed_norms(
    base: nn.Module,
    norms: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    segments: Tensor,
    experts: int,
) -> Tensor:
    """Norm of each row of `W + s_e B_e A_e`, (E, o), in fp32, through cores of R x R.

    Args:
        base: The layer.
        norms: Those of its own rows, (o,).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        scales: Of the expert that each rank belongs to, (R,).
        segments: Which expert that is, (R,).
        experts: E.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    read = a.to(weight.dtype) if weight.is_floating_point() else a
    crossed_oR = unbiased(base, read).float().T
    a, up_oR = a.float(), b.float() * scales
    same = segments[:, None] == segments[None, :]
    core_RR = (a @ a.T) * same
    by_rank_oR = up_oR * (2 * crossed_oR + up_oR @ core_RR)
    found = norms.square().expand(experts, -1).contiguous()
    return found.index_add(0, segments, by_rank_oR.T).clamp_min(0).sqrt()


class Rescaling(nn.Module):
    """What the DoRAs among a layer's experts make of the base's output: `c_e - 1`, row by row.

    Args:
        base: The layer.
        width: What it reads.
        magnitudes: Of each expert, (o,); None for one that is no DoRA.
        learning: How the magnitudes learn; None for frozen ones.
    """

    here: Tensor
    norms: Tensor
    fixed: Tensor

    def __init__(
        self,
        base: nn.Module,
        width: int,
        magnitudes: Sequence[Tensor | None],
        learning: Learning | None,
    ) -> None:
        super().__init__()
        norms = row_norms(base, width)
        here = torch.tensor([m is not None for m in magnitudes], device=norms.device)
        self.register_buffer("here", here, persistent=False)
        self.register_buffer("norms", norms, persistent=False)
        self.learns = learning is not None
        own = {
            team: torch.stack(told).to(norms)
            for team, places in enumerate((learning or Learning()).places(len(magnitudes)))
            if (told := [m for m in map(magnitudes.__getitem__, places) if m is not None])
        }
        if self.learns:
            learn = {str(team): nn.Parameter(one) for team, one in own.items()}
            self.magnitudes = nn.ParameterDict(learn)
        else:
            self.register_buffer("fixed", own[0], persistent=False)
        # Of frozen factors it stays the same: found once, where the layer lies.
        self._found: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rescaling":
        self._found = None
        super()._apply(fn, recurse)
        return self

    @property
    def magnitude(self) -> Tensor:
        """Of each DoRA in order, (D, o)."""
        return joined(self.magnitudes) if self.learns else self.fixed

    def of(self, expert: int) -> Tensor | None:
        """An expert's magnitude, (o,); None of one that is no DoRA."""
        if not bool(self.here[expert]):
            return None
        return self.magnitude[int(self.here[:expert].sum())]

    def forward(
        self, base: nn.Module, a: Tensor, b: Tensor, scales: Tensor, segments: Tensor
    ) -> Tensor:
        """`c - 1` for each expert, (E, o), in fp32; 0 for one that is no DoRA."""
        # Norms are fp32's whoever asks: an expert that learns is what it is when it is saved.
        with torch.autocast(a.device.type, enabled=False):
            if self.learns:
                return self._shift(base, a, b, scales, segments)
            if self._found is None:
                # It is kept: whoever comes first must not decide of gradients.
                with torch.inference_mode(False), torch.no_grad():
                    self._found = self._shift(base, a, b, scales, segments)
            return self._found

    def _shift(
        self, base: nn.Module, a: Tensor, b: Tensor, scales: Tensor, segments: Tensor
    ) -> Tensor:
        norms = changed_norms(base, self.norms.float(), a, b, scales, segments, len(self.here))
        own = norms[self.here].clamp_min(torch.finfo(norms.dtype).tiny)
        places = self.here.nonzero().squeeze(-1)
        return torch.zeros_like(norms).index_copy(0, places, self.magnitude.float() / own - 1)

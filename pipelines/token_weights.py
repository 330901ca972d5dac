"""The weights of an answer, by site, token and expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_vl.bank import spread
from mole_vl.faults import one_of, refuse
from mole_vl.passes import Record
from mole_vl.plans import in_order


@dataclass(frozen=True)
class TokenWeights:
    """An answer, and what each expert weighed where the model read each token.

    A token's weights are those with which the next one is predicted. Gates over rows have the same
    for all tokens of a row.

    Args:
        text: The answer.
        tokens: Texts of the tokens of prompt and answer, the end token included.
        prompt: How many of them are the prompt's.
        sites: Names of the sites, as the model runs them.
        experts: Names of the experts.
        weights: As the layers applied them, strength included, (sites, tokens, experts).
    """

    text: str
    tokens: tuple[str, ...]
    prompt: int
    sites: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Tensor

    def table(self, site: str | None = None) -> str:
        """Weights by token and expert, in Markdown: of one site, or the mean over all.

        Raises:
            ValueError: There is no such site.
        """
        if site is not None:
            refuse("table", [one_of("site", site, self.sites)])
        picked = self.weights.mean(0) if site is None else self.weights[self.sites.index(site)]
        lines = [f"| token | {' | '.join(self.experts)} |", "|---" * (len(self.experts) + 1) + "|"]
        lines += [
            f"| {token!r} | {' | '.join(f'{weight:.3f}' for weight in weights)} |"
            for token, weights in zip(self.tokens, picked.tolist(), strict=True)
        ]
        return "\n".join(lines)


def by_token(records: Sequence[Record], experts: int, rows: int, positions: int) -> Tensor:
    """The weights of one forward, (rows, sites, positions, E), whatever each gate's vary over."""
    found = []
    for record in records:
        weights = in_order(record.output.weights, record.output.experts, experts)
        weights = weights.float() * record.strength
        if weights.dim() > 1:
            weights = spread(weights, rows)
        if weights.dim() == 2:
            weights = weights.unsqueeze(1)
        found.append(weights.expand(rows, positions, experts))
    return torch.stack(found, dim=1).cpu()

"""Routing of positions by a plain loop: what gates by position are held against."""

import torch


def routed(experts, path, x, base, score, top_k, tau=1.0, masked=()):
    """`W x + sum_e w_e Delta-W_e x`, with a softmax over the best `score(expert, position)`."""
    here = [one for one in experts if path in one.layers and one.name not in masked]
    y = base(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        v = x[tuple(place)]
        scored = [(float(score(one, v)), one) for one in here]
        best = sorted(scored, key=lambda pair: -pair[0])[: top_k or len(scored)]
        weights = torch.tensor([score / tau for score, _ in best]).softmax(0)
        for weight, (_score, one) in zip(weights, best, strict=True):
            y[tuple(place)] += weight * (one.layers[path].delta() @ v)
    return y


def seen_by(mixture):
    """Hooks that keep each layer's last input and output, by its path."""
    seen = {}
    for path, layer in mixture.layers.items():
        layer.register_forward_hook(
            lambda _layer, args, y, path=path: seen.update({path: (args[0], y)})
        )
    return seen

"""What a step of MixLoRA costs, beside the package `mixlora` and a plain loop over experts.

    python benchmarks/mixlora_cost.py            # --quick: few repetitions, for a look

SmolLM2-135M-Instruct with 8 and 16 experts of rank 16 on the feed-forward, top 2, and one LoRA on
attention: forward and backward of the loss on 16 rows of 32 tokens, dropout 0 on our side and 1e-9
on theirs, which wants one; in fp32, and with the base's weights in bf16, under autocast. All have
the same experts and routers, and the same loss, which is checked first.

- `mixlora` from PyPI, which computes the base's gate and up projections once, and loops over the
  experts for the rest; it is made for inference, and is asked for gradients here.
- the loop: each expert runs the whole feed-forward over its positions (MoE-PEFT's form for models
  that it knows no quicker way for).

The sides take turns; the unit is one turn. Where page faults are dear, tell glibc to keep what is
freed (MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_, MALLOC_MMAP_MAX_=0): a step's large tensors outweigh
all else otherwise. Beside the whole step stands the feed-forward of one layer alone: attention and
the 49,152 words of the head are the same on all sides.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from costs import in_turns
from mixlora.config import MixLoraConfig
from mixlora.model import inject_adapter_in_model
from torch import Tensor, nn

from mole_vl import Expert, mix
from mole_vl.fresh import Form
from mole_vl.gates import Router, TopK
from mole_vl.mixlora import MixLoRA
from mole_vl.mixture import Mixture
from mole_vl.stack import Learning
from nlp.adapter import blocks
from nlp.models import load_base
from results import ROOT, Measurement, write_results

ROWS, TOKENS, TOP_K, RANK = 16, 32, 2, 16
EXPERTS = (8, 16)
PRECISIONS = {"fp32": (torch.float32, 1e-3), "bf16": (torch.bfloat16, 1e-2)}
"""Of the base's weights, and how far apart, in shares, the sides' losses may be."""
OURS, PACKAGE, LOOP = "mole-vl", "mixlora", "loop"


def base_in(precision: str) -> Any:
    """The base, its weights of a precision."""
    model: Any = load_base(dtype=PRECISIONS[precision][0])[0]
    return model


def mixed(experts: int, precision: str) -> tuple[Any, Mixture]:
    """The base under our mixture, whose B are drawn: at zero nothing would be compared."""
    model = base_in(precision)
    method = MixLoRA(experts=experts, form=Form(rank=RANK, alpha=2 * RANK), dropout=0.0)
    mixture = method.mix(model, blocks=blocks(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixture.parameters_of_experts().items():
            if ".ups." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
    return model, mixture


def in_package(mixture: Mixture, precision: str) -> tuple[Any, list[Tensor]]:
    """The base under the package, with the same experts and routers, and what learns there."""
    model = base_in(precision)
    weights: dict[str, Tensor] = {}
    for place, name in enumerate(mixture.names):
        for path, factors in mixture.experts()[place].layers.items():
            key = f"mixlora.{path.removeprefix('model.')}"
            key = key if name == "shared" else f"{key}.experts.{place}"
            weights |= {f"{key}.lora_A.weight": factors.a, f"{key}.lora_B.weight": factors.b}
    for site in mixture.layout.sites:
        if site.feedforward is not None:
            router = mixture.gate(site.name).get_parameter("weight").detach().clone()
            weights[f"mixlora.{site.name.removeprefix('model.')}.moe_gate.weight"] = router
    config = MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA",
            "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 1e-9, "routing_strategy": "mixlora",
            "num_experts": len(mixture.names) - 1, "top_k": TOP_K, "act_fn": "silu",
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                               "down_proj"],
        }
    )  # fmt: skip
    config.adapter_name_, config.dtype_ = "default", torch.float32
    inject_adapter_in_model(model, config, weights)
    learns: list[Tensor] = []
    for layer in model.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        moe.gate_.requires_grad_()
        loras = [*moe.experts_.values(), *layer.self_attn.children()]
        learns += [
            moe.gate_,
            *(p for lora in loras for n, p in lora.named_parameters() if "lora" in n),
        ]
    for parameter in learns:
        parameter.requires_grad_()
    return model, learns


class Loop(nn.Module):
    """The whole feed-forward of each expert over its own positions, one expert after the other."""

    def __init__(self, mlp: nn.Module, mixture: Mixture, path: str) -> None:
        super().__init__()
        self.mlp: Any = mlp
        self.router = mixture.gate(path).get_parameter("weight")
        self.layers = {n: mixture.layers[f"{path}.{n}_proj"] for n in ("gate", "up", "down")}
        self.experts = len(mixture.names) - 1

    def _changed(self, name: str, expert: int, x: Tensor) -> Tensor:
        layer = self.layers[name]
        own = layer.part(expert)
        assert own is not None
        return getattr(self.mlp, f"{name}_proj").base(x) + 2.0 * F.linear(F.linear(x, own.a), own.b)

    def forward(self, x: Tensor) -> Tensor:
        """As the feed-forward's."""
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = F.linear(rows, self.router).softmax(-1).topk(TOP_K, -1)
        shares = shares / shares.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for expert in range(self.experts):
            places, slots = torch.where(chosen == expert)
            own = rows[places]
            hidden = self.mlp.act_fn(self._changed("gate", expert, own))
            said = self._changed("down", expert, hidden * self._changed("up", expert, own))
            y = y.index_add(0, places, (said * shares[places, slots, None]).to(y.dtype))
        return y.view_as(x)


def told(step: Callable[[], Tensor], precision: str) -> Tensor:
    """A forward's loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return step()


def once(step: Callable[[], Tensor], learns: list[Tensor], precision: str) -> None:
    """A forward and its backward."""
    told(step, precision).backward()
    for tensor in learns:
        tensor.grad = None


class Block(nn.Module):
    """A feed-forward as the whole of a model."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """The feed-forward's output."""
        return self.mlp(x)


class Net(nn.Module):
    """One block, so that a mixture finds its feed-forward."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.block = Block(mlp)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return self.block(x)


def whole(experts: int, precision: str, turns: int) -> list[Measurement]:
    """All sides of a whole step with so many experts."""
    torch.manual_seed(0)
    model, mixture = mixed(experts, precision)
    package, their = in_package(mixture, precision)
    ids = torch.randint(100, 40_000, (ROWS, TOKENS))
    ours = [p for p in model.parameters() if p.requires_grad]
    layers = model.model.layers
    loops = [Loop(layer.mlp, mixture, f"model.layers.{n}.mlp") for n, layer in enumerate(layers)]

    def loss(of: Any) -> Tensor:
        return of(input_ids=ids, labels=ids, use_cache=False).loss

    def looped() -> Tensor:
        for layer, loop in zip(layers, loops, strict=True):
            layer.mlp = loop
        try:
            return loss(model)
        finally:
            for layer, loop in zip(layers, loops, strict=True):
                layer.mlp = loop.mlp

    steps = {
        OURS: (lambda: loss(model), ours),
        PACKAGE: (lambda: loss(package), their),
        LOOP: (looped, ours),
    }
    return rows_of(f"whole step, E = {experts}", steps, precision, turns)


def one_layer(experts: int, precision: str, turns: int) -> list[Measurement]:
    """All sides of the first layer's feed-forward alone, with so many experts."""
    torch.manual_seed(0)
    base, mixture = mixed(experts, precision)
    package, _ = in_package(mixture, precision)
    theirs, path = package.model.layers[0].mlp, "model.layers.0.mlp"
    loop = Loop(base.model.layers[0].mlp, mixture, path)
    own = [e for e in mixture.experts() if e.name != "shared"]
    layers = [
        {p.replace("model.layers.0", "block"): f for p, f in e.layers.items() if path in p}
        for e in own
    ]
    net = Net(base_in(precision).model.layers[0].mlp)
    width = base.config.hidden_size
    alone = mix(
        net,
        [Expert(e.name, one) for e, one in zip(own, layers, strict=True)],
        gate=Router(choice=TopK(k=TOP_K)),
        site="feedforward",
        blocks={"block": width},
        learning=Learning(),
    )
    with torch.no_grad():
        alone.gate("block.mlp").get_parameter("weight").copy_(loop.router)
    x = torch.randn(ROWS, TOKENS, width, requires_grad=True)
    moe = theirs.mixlora_moes["default"]
    their = [moe.gate_, *(p for one in moe.experts_.values() for p in one.parameters())]
    looped = [p for layer in loop.layers.values() for p in layer.parameters()]
    steps = {
        OURS: (lambda: net(x).square().mean(), [x, *net.parameters()]),
        PACKAGE: (lambda: theirs(x).square().mean(), [x, *their]),
        LOOP: (lambda: loop(x).square().mean(), [x, loop.router, *looped]),
    }
    return rows_of(f"one layer's feed-forward, E = {experts}", steps, precision, 5 * turns)


def rows_of(
    measure: str,
    steps: dict[str, tuple[Callable[[], Tensor], list[Tensor]]],
    precision: str,
    turns: int,
) -> list[Measurement]:
    """Medians of each side, and of our time over the others'.

    Raises:
        ValueError: The sides do not compute the same.
    """
    with torch.no_grad():
        losses = {side: float(told(step, precision)) for side, (step, _) in steps.items()}
    least, most = min(losses.values()), max(losses.values())
    if most - least > PRECISIONS[precision][1] * most:
        raise ValueError(f"the sides do not agree: {losses}")
    sides = {side: partial(once, *one, precision) for side, one in steps.items()}
    return in_turns(f"{measure}, {precision}", sides, turns, [(OURS, PACKAGE), (OURS, LOOP)])


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few repetitions, for a look")
    quick = parser.parse_args().quick
    turns = 2 if quick else 6
    parts = (whole, one_layer)
    asked = product(parts, EXPERTS, PRECISIONS)
    rows = [row for part, experts, how in asked for row in part(experts, how, turns)]
    settings = {
        "rows": ROWS, "tokens": TOKENS, "top k": TOP_K, "rank": RANK, "turns": turns,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    folder = {"folder": ROOT / "out/benchmarks/mixlora_cost"} if quick else {}
    write_results("mixlora_cost", rows, settings=settings, seeds=[0], **folder)


if __name__ == "__main__":
    main()

"""MixLoRA adapters as MoE-PEFT writes them, for a tiny LLaMA, and the loop that they mean."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
OLDER = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
CONFIG = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "target_modules": [*ATTENTION, *MLP],
    "routing_strategy": "mixlora",
    "num_experts": 4,
    "act_fn": "silu",
    "top_k": 2,
    "base_model_name_or_path": "ORG/NAME",
    "task_type": "CAUSAL_LM",
}


def tensors_of(model, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors of an adapter by today's keys."""
    generator = torch.Generator().manual_seed(3)
    experts, own = config["num_experts"], config.get("expert_lora", {})
    found = {}

    def pair(key, layer, rank):
        for letter, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            drawn = torch.randn(shape, generator=generator) * 0.3
            found[f"{key}.lora_{letter}.weight"] = drawn

    for number, block in enumerate(model.model.layers):
        at = f"mixlora.layers.{number}"
        width = block.mlp.up_proj.in_features
        router = torch.randn(experts, width, generator=generator)
        found[f"{at}.mlp.moe_gate.weight"] = router
        for name in config["target_modules"]:
            if name in ATTENTION:
                pair(f"{at}.self_attn.{name}", getattr(block.self_attn, name), config["r"])
            else:
                for expert in range(experts):
                    layer = getattr(block.mlp, name)
                    pair(f"{at}.mlp.{name}.experts.{expert}", layer, own.get("r", config["r"]))
    return found


def respelt(key: str, older: bool) -> str:
    """A key as mixlora 0.1 spells it, or, with the older names, as m-LoRA does."""
    parts = key.split(".")
    at = ".".join(parts[:3])
    if parts[4] == "moe_gate":
        return f"{at}.gate.weight"
    if parts[3] == "self_attn":
        return key
    name = OLDER[parts[4]] if older else parts[4]
    return f"{at}.experts.{parts[6]}.{name}.{'.'.join(parts[7:])}"


def publish(folder: Path, config: dict[str, Any], tensors, *, pickled: bool = True) -> Path:
    """Write an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    if pickled:
        kept = {key: nn.Parameter(value) for key, value in tensors.items()}
        torch.save(kept, folder / "adapter_model.bin")
    else:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


class Loop(nn.Module):
    """A layer and one update."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x):
        return self.base(x) + self.scale * ((x @ self.a.T) @ self.b.T)


class LoopMLP(nn.Module):
    """The whole feed-forward of each of a position's experts, one position after another."""

    def __init__(self, mlp, router, experts, chosen):
        super().__init__()
        self.act, self.router, self.experts, self.chosen = mlp.act_fn, router, experts, chosen

    def one(self, expert, v):
        own = self.experts[expert]
        return own["down_proj"](self.act(own["gate_proj"](v)) * own["up_proj"](v))

    def forward(self, x):
        rows = []
        for row in x:
            out = []
            for v in row:
                shares = (self.router @ v).softmax(0)
                out.append(sum(w * self.one(e, v) for e, w in self.chosen(shares)))
            rows.append(torch.stack(out))
        return torch.stack(rows)


def choice_of(config):
    """What the strategy makes of a position's shares: experts and weights."""

    def top_k(shares):
        weights, best = shares.topk(config["top_k"])
        return list(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))

    def top_p(shares):
        weights, order = shares.sort(descending=True)
        over = weights.cumsum(0) > config["top_p"]
        kept = int(over.int().argmax()) + 1 if over.any() else len(shares)
        return list(zip(order[:kept].tolist(), weights[:kept].tolist(), strict=True))

    def switch(shares):
        return [(int(shares.argmax()), float(shares.max()))]

    known = {"mixtral": top_k, "mixlora": top_k, "mixlora-dynamic": top_p}
    return known.get(config["routing_strategy"], switch)


def loop_of(model, config, tensors):
    """The model under an adapter's tensors by today's keys, its layers replaced by loops."""
    own = {**config, **config.get("expert_lora", {})}
    of = {
        "self_attn": config["lora_alpha"] / config["r"],
        "mlp": own["lora_alpha"] / (own["r"] ** 0.5 if own.get("use_rslora") else own["r"]),
    }

    def loop(layer, key, part):
        if f"{key}.lora_A.weight" not in tensors:
            return layer
        a, b = (tensors[f"{key}.lora_{letter}.weight"] for letter in "AB")
        return Loop(layer, a, b, of[part])

    for number, block in enumerate(model.model.layers):
        at = f"mixlora.layers.{number}"
        for name in ATTENTION:
            layer = getattr(block.self_attn, name)
            setattr(block.self_attn, name, loop(layer, f"{at}.self_attn.{name}", "self_attn"))
        experts = [
            {
                name: loop(getattr(block.mlp, name), f"{at}.mlp.{name}.experts.{expert}", "mlp")
                for name in MLP
            }
            for expert in range(config["num_experts"])
        ]
        router = tensors[f"{at}.mlp.moe_gate.weight"]
        block.mlp = LoopMLP(block.mlp, router, experts, choice_of(config))
    return model

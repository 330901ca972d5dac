"""Sixteen LoRAs trained together on one base, beside one after the other.

    python benchmarks/many_at_once.py            # --quick: few repetitions, for a look

SmolLM2-135M-Instruct, LoRAs of rank 8 on q and v; a step is forward, backward and AdamW. Together:
one step of all, each with its own rows (`mole_vl.tenants`). One after the other: a step of each
with the same rows, by this library (`mole_vl.lora`) and by peft. In a step each LoRA has 2 rows of
32 tokens, or 16 of 64; in fp32, and in bf16 by autocast, as `accelerate launch --mixed_precision
bf16` runs it. 16 rows of 64 of each are 16,384 tokens, which together take more than 24 GiB: these
go through in eight pieces, whose gradients add up. The sides take turns, the unit is one turn.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from costs import in_turns
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mole_vl.fresh import Form
from mole_vl.lora import LoRA
from mole_vl.tenants import mix_tenants
from nlp.adapter import blocks
from nlp.models import load_base
from results import ROOT, Measurement, write_results

TENANTS, RANK, TARGETS = 16, 8, ("q_proj", "v_proj")
SIZES = {(2, 32, "bf16"): 8, (2, 32, "fp32"): 8, (16, 64, "bf16"): 1}
"""Turns, by rows of each LoRA, their tokens, and the precision."""
AT_ONCE = 2
"""Rows of each LoRA that go through the base together."""
TOGETHER, APART, PEFT = "together", "one after the other", "one after the other, peft"
LORA = LoRA(form=Form(rank=RANK, alpha=16), targets=TARGETS, dropout=0.0)


def step_of(losses: list[Callable[[], Tensor]], parameters: list[Tensor]) -> Callable[[], None]:
    """A step of training, of a loss in pieces."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        for loss in losses:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def learns(model: Any) -> list[Tensor]:
    """What a model has to learn."""
    return [p for p in model.parameters() if p.requires_grad]


def sides(rows: int, tokens: int, precision: str) -> dict[str, Callable[[], None]]:
    """A step of every LoRA, on each side, with so many rows of each, so long."""
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (TENANTS, rows, tokens))
    names = [f"lora{place}" for place in range(TENANTS)]
    many: Any = load_base()[0]
    mixture = mix_tenants(many, dict.fromkeys(names, LORA), blocks=blocks(many))
    pieces = ids.split(AT_ONCE, dim=1)

    def loss(model: Any, shown: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(input_ids=shown, labels=shown, use_cache=False).loss

    def together(piece: Tensor) -> Tensor:
        owners = [name for name in names for _ in range(piece.shape[1])]
        with mixture.condition(tenant=owners):
            # Of equally many words each, the sum of means is the mean times their number.
            return TENANTS / len(pieces) * loss(many, piece.flatten(0, 1))

    one: Any = load_base()[0]
    LORA.mix(one, blocks=blocks(one))
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(TARGETS), lora_dropout=0.0)
    adapted: Any = get_peft_model(load_base()[0], config)

    def each(model: Any) -> Callable[[], None]:
        shown = [ids[place] for place in range(TENANTS)]
        steps = [step_of([partial(loss, model, own)], learns(model)) for own in shown]

        def run() -> None:
            for step in steps:
                step()

        return run

    all_of_them = step_of([partial(together, piece) for piece in pieces], learns(many))
    return {TOGETHER: all_of_them, APART: each(one), PEFT: each(adapted)}


def of_size(rows: int, tokens: int, precision: str, turns: int) -> list[Measurement]:
    """Medians of each side, and of the time together over the others'."""
    others = [(TOGETHER, side) for side in (APART, PEFT)]
    name = f"{TENANTS} LoRAs, {rows} rows of {tokens} each, {precision}"
    return in_turns(name, sides(rows, tokens, precision), turns, others)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few repetitions, for a look")
    quick = parser.parse_args().quick
    sizes = {(2, 32, "bf16"): 1} if quick else SIZES
    rows: list[Measurement] = []
    for size, turns in sizes.items():
        found = of_size(*size, turns)
        print(*(f"{row.measure}, {row.arm}: {row.mean:.3f}" for row in found), sep="\n", flush=True)
        rows += found
        # Hooks hold their models, and these a model each: all of it goes before the next.
        gc.collect()
    settings = {
        "tenants": TENANTS, "rank": RANK, "targets": TARGETS, "turns": list(sizes.values()),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    folder = {"folder": ROOT / "out/benchmarks/many_at_once"} if quick else {}
    write_results("many_at_once", rows, settings=settings, seeds=[0], **folder)


if __name__ == "__main__":
    main()

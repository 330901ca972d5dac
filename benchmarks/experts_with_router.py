"""Experts that learn with their router, beside one LoRA of as many parameters: sixteen tasks.

    python benchmarks/experts_with_router.py            # --quick: one seed, few steps, for a look
    python benchmarks/experts_with_router.py --rates    # which learning rate, on development rows
    python benchmarks/experts_with_router.py --longer   # four times the steps, two arms, one seed

SmolLM2-135M-Instruct learns the sixteen tasks of the text world's shelf at once, 100 steps of 16
rows: as one LoRA; as MixLoRA, 2 of 8 experts on the feed-forward and one LoRA on attention, with
the balance loss of each layer, with that of all layers together as MoE-PEFT has it (one seed), and
with none; and as MoLA, a router at each projection, 2 of 5 experts in the mean, rectangle and
inverted triangle, balanced as by its authors, and router by router (one seed). Ranks are such that
all have as many parameters, to 3 %; the rest is each method's own. Asked are 400 rows in wordings
of their own; the unit is the row, in the mean over three seeds.

The load entropy is that of each router's choices over the asked rows, 1 for all experts alike, in
the mean over routers. The learning rate is the best of three for one LoRA and for MixLoRA, after
half the steps, on other rows and one seed. Steps are timed in turns, in fp32.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import torch
from costs import in_turns
from fewshot_bench import ROWS, WORLD

from mole_vl import Mixture
from mole_vl.fresh import Form
from mole_vl.lora import LoRA
from mole_vl.mixlora import MixLoRA
from mole_vl.mola import MoLA
from mole_vl.specs import to_data
from mole_vl.training import FitConfig
from nlp.adapter import blocks, bound
from nlp.answers import exact_match
from nlp.calls import TextCalls
from nlp.data import EncodedRow, read_rows
from nlp.forms import form_of
from nlp.mixed_text import first_of_each
from nlp.models import load_base
from nlp.train_mixture import mixture_task, train_mixture
from nlp.world.tasks import SHELF
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

NAME = "experts_with_router"
STEPS, LONGER, SEEDS, ASKED, TIMED = 100, 400, (0, 1, 2), 25, 5
ONE, MIX, TALL, TRIANGLE = "one LoRA", "MixLoRA", "MoLA, rectangle", "MoLA, inverted triangle"
UNBALANCED, TOGETHER = "MixLoRA, no balance loss", "MixLoRA, balanced over all layers"
BY_ROUTER = "MoLA, inverted triangle, balanced by router"
_MIX = MixLoRA(
    form=Form(rank=4, alpha=8), shared=Form(rank=5, alpha=10), balance=0.01, balanced="layer"
)
_MOLA = MoLA(experts="rectangle", rank=4, alpha=8, balance=0.01)
Trained: TypeAlias = LoRA | MixLoRA | MoLA
ARMS: Mapping[str, Trained] = {
    ONE: LoRA(form=Form(rank=22, alpha=44)),
    MIX: _MIX,
    UNBALANCED: replace(_MIX, balance=0.0),
    TOGETHER: replace(_MIX, balanced="model"),
    TALL: _MOLA,
    TRIANGLE: replace(_MOLA, experts="inverted_triangle"),
    BY_ROUTER: replace(_MOLA, experts="inverted_triangle", balanced="router"),
}
OF_SEEDS = {arm: method for arm, method in ARMS.items() if arm not in (TOGETHER, BY_ROUTER)}
ARMS_LONGER = {arm: ARMS[arm] for arm in (ONE, MIX)}
RATES = (1e-3, 3e-3, 1e-2)
RATE = 3e-3
"""As `--rates` chose it for one LoRA and for MixLoRA alike; MoLA takes it over."""


class Lab:
    """The base, the rows that are learned, and those that are asked.

    Args:
        out: Folder for runs in progress.
        split: Which rows are asked, `test` or `dev`.
        asked: How many of each task's.
    """

    def __init__(self, out: Path, split: str, asked: int) -> None:
        self.out = out
        self.model, self.tokenizer = load_base()
        self.pad = self.tokenizer.pad_token_id
        train = [r for s in SHELF for r in read_rows(WORLD / f"data/{s.name}_train.jsonl")]
        self.train = self._encoded(train)
        rows = read_rows(WORLD / f"data/shelf_{split}.jsonl")
        self.asked = self._encoded(first_of_each(rows, asked))

    def _encoded(self, rows: Sequence[Any]) -> Sequence[EncodedRow]:
        return form_of(self.model).encode_rows(rows, self.tokenizer)

    def mixed(self, method: Trained) -> Mixture:
        """The base with a method's new experts; `unmix` it when done."""
        return method.mix(self.model, blocks=blocks(self.model), calls=TextCalls())

    def cell(self, method: Trained, seed: int, lr: float, steps: int) -> dict[str, Any]:
        """Train a method, then ask."""
        torch.manual_seed(seed)
        mixture = self.mixed(replace(method, seed=seed))
        run = self.out / f"run {time.time_ns()}"
        config = FitConfig(
            output=run, steps=steps, rows=ROWS, lr=lr, warmup=10, seed=seed, save_every=steps,
            log_every=1, progress=False,
        )  # fmt: skip
        spent = train_mixture(mixture, method, self.train, config, pad=self.pad, lesson={}).seconds
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(run)
        around = bound(mixture)
        with torch.no_grad():
            hits = exact_match(self.model, self.tokenizer, self.asked, batch_rows=50, around=around)
        found = {
            "hits": [int(hit) for hit in hits],
            "loss": [round(line["lm"], 4) for line in lines],
            "seconds": spent,
            "parameters": sum(
                p.numel()
                for p in (*mixture.gates.parameters(), *mixture.parameters_of_experts().values())
            ),
            "load entropy": None if isinstance(method, LoRA) else self._load(mixture, method),
        }
        mixture.unmix()
        return found

    @torch.no_grad()
    def _load(self, mixture: Mixture, method: Trained) -> float:
        """The load entropy over the asked rows, in the mean over batches of 100."""
        task, size = mixture_task(mixture, method, self.asked, pad=self.pad), len(self.asked)
        batches = [range(start, min(start + 100, size)) for start in range(0, size, 100)]
        told = [task.losses(task.examples(own))["load entropy"].value for own in batches]
        return float(torch.stack(told).mean())


def rates(units: Units, lab: Lab, steps: int) -> None:
    """What each rate makes of each method on development rows."""
    for name in (ONE, MIX):
        for lr in RATES:
            key = f"rate {lr}, {name}"
            one = units.get(key, partial(lab.cell, ARMS[name], 0, lr, steps), {"steps": steps})
            units.gather()
            print(f"{key}: {np.mean(one['hits']):.3f}, {one['seconds']:.0f} s", flush=True)


def of_arms(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Measurement]:
    """Exact match by arm and what each gains over one LoRA; loads and sizes."""
    hits = {arm: np.mean([one["hits"] for one in cells], 0) for arm, cells in found.items()}
    rows = [measured("exact match", arm, list(values)) for arm, values in hits.items()]
    rows += [
        measured("exact match", f"{arm} - {ONE}", list(values - hits[ONE]))
        for arm, values in hits.items()
        if arm != ONE
    ]
    for measure, value in {
        "exact match of a seed": lambda one: float(np.mean(one["hits"])),
        "load entropy": lambda one: one["load entropy"],
        "loss of the last 15 steps": lambda one: float(np.mean(one["loss"][-15:])),
        "parameters, millions": lambda one: one["parameters"] / 1e6,
    }.items():
        told = {arm: [value(one) for one in cells] for arm, cells in found.items()}
        rows += [measured(measure, arm, own) for arm, own in told.items() if None not in own]
    return rows


def step_times(lab: Lab, turns: int) -> list[Measurement]:
    """A step of each method, in turns: forward, losses, backward."""
    steps = {}
    for name in (ONE, MIX, TALL, TRIANGLE):
        model, _ = load_base()
        mixture = ARMS[name].mix(model, blocks=blocks(model), calls=TextCalls())
        mixture.train()
        task = mixture_task(mixture, ARMS[name], lab.train, pad=lab.pad)
        batch = task.examples(range(ROWS))

        def step(task: Any = task, batch: Any = batch) -> None:
            terms = task.losses(batch).values()
            torch.stack([term.value * term.weight for term in terms]).sum().backward()

        steps[name] = step
    return in_turns("a step", steps, turns, [(arm, ONE) for arm in (MIX, TALL, TRIANGLE)])


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """The loss by step of each method, in the mean over seeds and 10 steps."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for arm, cells in found.items():
        loss = np.mean([one["loss"] for one in cells], 0)
        width = min(10, len(loss))
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(width, len(loss) + 1), smooth, label=arm, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token, mean of 10 steps")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, for a look")
    parser.add_argument("--rates", action="store_true", help="choose learning rates")
    parser.add_argument("--longer", action="store_true", help="four times the steps, one seed")
    options = parser.parse_args()
    kind = "quick" if options.quick else "longer" if options.longer else "full"
    out = ROOT / "out/benchmarks" / NAME / kind
    folder = out if options.quick else FOLDER
    name = f"{NAME}_longer" if options.longer else NAME
    steps, seeds, asked, arms = {
        "quick": (12, SEEDS[:1], 2, ARMS),
        "longer": (LONGER, SEEDS[:1], ASKED, ARMS_LONGER),
        "full": (STEPS, SEEDS, ASKED, ARMS),
    }[kind]
    settings = {"rows a step": ROWS, "asked of each task": asked}
    units = Units(out / "units", folder / f"{name}_units.json", settings)
    if options.rates:
        rates(units, Lab(out, "dev", asked), steps // 2)
        return
    lab = Lab(out, "test", asked)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:
        # Other forms of the balance loss are a look beside the table: one seed.
        for arm, method in arms.items() if seed == seeds[0] else OF_SEEDS.items():
            made = {"method": to_data(method), "lr": RATE, "steps": steps}
            key, make = f"{arm}, {seed}", partial(lab.cell, method, seed, RATE, steps)
            one = units.get(key, make, made)
            found[arm].append(one)
            units.gather()
            shown = f"{np.mean(one['hits']):.3f}, load {one['load entropy']}"
            print(f"{key}: {shown}, {one['seconds']:.0f} s", flush=True)
    rows = of_arms(found)
    if not options.longer:
        rows += step_times(lab, 1 if options.quick else TIMED)
    told = {arm: {"method": to_data(m), "lr": RATE} for arm, m in arms.items()}
    settings |= {"steps": steps, "arms": told, "threads": torch.get_num_threads()}
    file = write_results(name, rows, settings=settings, seeds=seeds, folder=folder)
    draw(found, file.with_suffix(".png"))


if __name__ == "__main__":
    main()

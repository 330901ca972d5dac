"""Which experts of the text world's shelf, and which held-out tasks, are fit to measure with.

    python benchmarks/text_admission.py            # all; --part K/N for one of N processes
    python benchmarks/text_admission.py --quick    # two tasks of each, few steps, for a look

An expert is admitted if it answers 20 points more of its held-out rows than the base, whose prompts
are put in three ways (as they stand, in the chat template, behind three solved examples): the best
of them counts. A held-out task is admitted if a LoRA trained on all its rows gains 30 points over
the base that sees the same prompts, as they stand or in the chat template, and constant weights for
the shelf's experts, searched on its 500 labelled rows (as many as it has, if fewer), gain 10: then
there is something to learn, and something that mixing can give. What the base makes of solved
examples is shown beside it; where that is high, the task was hard to understand, not to do. The
first six of the list that pass are the benchmark's, but for `third`, whose development rows chose
`configs/text_fewshot.yaml`. Of held-out tasks no other figure is made here.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from mole_vl import Expert, mix, read_peft
from mole_vl.gates import LoRAHub
from mole_vl.training import FitConfig
from mole_vl.training.search import SearchConfig, search
from nlp.adapter import blocks, bound
from nlp.answers import exact_match
from nlp.data import Style, TextRow, digest_rows, read_rows
from nlp.forms import form_of
from nlp.models import BUILT_IN, load_base
from nlp.task import LanguageTask
from nlp.train_experts import LoRA, train_expert
from nlp.world.tasks import HELD_OUT, SHELF
from results import FOLDER, ROOT, Measurement, write_results
from units import Units

WORLD = ROOT / "worlds/text"
SHOTS = 3
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {
    "full": {"rank": 8, "alpha": 16, "targets": ALL_LINEAR, "steps": 300, "rows": 32, "lr": 1e-3},
    "constants": {"evaluations": 300, "rows": 500, "optimizer": "CMA", "l1": 0.0},
    "shots": SHOTS,
}
OF_EXPERT, OF_FULL, OF_CONSTANTS = 0.20, 0.30, 0.10
HELD, NOT_HELD = 6, "third"


@dataclass(frozen=True)
class Bench:
    """The base and where runs leave their files."""

    model: Any
    tokenizer: Any
    out: Path
    quick: bool

    def hits(self, model: Any, rows: Sequence[TextRow], style: Style = "plain") -> float:
        """Exact match, in parts of 1."""
        encoded = form_of(self.model).encode_rows(rows, self.tokenizer, style=style)
        found = exact_match(model, self.tokenizer, encoded, batch_rows=200)
        return sum(found) / len(found)

    def base(self, rows: Sequence[TextRow], examples: Sequence[TextRow]) -> dict[str, float]:
        """The base by the way in which prompts are put."""
        solved = "".join(f"{row.prompt} {row.answer}\n" for row in examples[:SHOTS])
        shown = [replace(row, prompt=solved + row.prompt) for row in rows]
        return {
            "plain": self.hits(self.model, rows),
            "chat": self.hits(self.model, rows, "chat"),
            "shots": self.hits(self.model, shown),
        }

    def expert(self, folder: Path, rows: Sequence[TextRow]) -> float:
        """One LoRA alone."""
        adapted = PeftModel.from_pretrained(self.model, folder)
        found = self.hits(adapted, rows)
        adapted.unload()
        return found

    def full(self, name: str, rows: Sequence[TextRow]) -> Path:
        """The folder of a LoRA trained on all rows of a task."""
        told = SETTINGS["full"]
        steps = 5 if self.quick else told["steps"]
        lora = LoRA(name=name, rank=told["rank"], alpha=told["alpha"], targets=told["targets"])
        run = FitConfig(
            output=self.out / "runs" / name,
            steps=steps,
            rows=told["rows"],
            lr=told["lr"],
            warmup=min(20, steps),
            progress=False,
        )
        output = self.out / "full"
        if not (output / name).exists():
            train_expert(
                self.model,
                form_of(self.model).encode_rows(rows, self.tokenizer),
                lora,
                run,
                pad=self.tokenizer.pad_token_id,
                base=BUILT_IN,
                output=output,
                lesson={**asdict(lora), "data": digest_rows(rows)},
            )
        return output / name

    def constants(
        self, name: str, experts: Sequence[Expert], few: Sequence[TextRow], rows: Sequence[TextRow]
    ) -> tuple[float, Mapping[str, float]]:
        """Constant weights found on labelled rows: their hits on others, and the weights."""
        told = dict(SETTINGS["constants"])
        told["rows"] = len(few) // 2 * 2
        told["evaluations"] = 10 if self.quick else told["evaluations"]
        mixture = mix(
            self.model, experts, gate=LoRAHub(), site="network", blocks=blocks(self.model)
        )
        task = LanguageTask(
            self.model,
            form_of(self.model).encode_rows(few, self.tokenizer),
            pad=self.tokenizer.pad_token_id,
            parameters={},
            around=bound(mixture),
        )
        config = SearchConfig(
            output=self.out / "search" / name, micro_rows=told["rows"] // 2, progress=False, **told
        )
        found = search(task, {"model": mixture}, config)
        hits = self.hits(self.model, rows)
        mixture.unmix()
        return hits, next(iter(found.weights["model"].values()))


def of_expert(bench: Bench, name: str) -> dict[str, Any]:
    """An expert of the shelf, on its rows of the test stream."""
    rows = [row for row in read_rows(WORLD / "data/shelf_test.jsonl") if row.task == name]
    examples = [row for row in read_rows(WORLD / "data/shelf_train.jsonl") if row.task == name]
    return {
        "rows": len(rows),
        "base": bench.base(rows, examples),
        "expert": bench.expert(WORLD / "experts" / name, rows),
    }


def of_task(bench: Bench, name: str, experts: Sequence[Expert]) -> dict[str, Any]:
    """A held-out task."""
    train, few, rows = (
        read_rows(WORLD / "data/few" / f"{name}_{kind}.jsonl") for kind in ("train", "few", "test")
    )
    if bench.quick:
        rows = rows[:20]
    constants, weights = bench.constants(name, experts, few, rows)
    return {
        "rows": len(rows),
        "base": bench.base(rows, few),
        "full": bench.expert(bench.full(name, train), rows),
        "constants": constants,
        "weights": {key: round(value, 3) for key, value in weights.items()},
    }


def admitted(found: dict[str, Any]) -> bool:
    """Whether an expert or a held-out task passes."""
    if "expert" in found:
        return found["expert"] - max(found["base"].values()) >= OF_EXPERT
    base = max(found["base"][way] for way in ("plain", "chat"))
    return found["full"] - base >= OF_FULL and found["constants"] - base >= OF_CONSTANTS


def held_out() -> list[str]:
    """The held-out tasks that were admitted, as the committed results say."""
    return json.loads((FOLDER / "text_admission.json").read_text())["settings"]["held-out tasks"]


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' tasks, as K/N")
    parser.add_argument("--quick", action="store_true", help="few tasks and steps, for a look")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    out = ROOT / "out/benchmarks/text_admission" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    units = Units(out / "units", results / "text_admission_units.json", SETTINGS)
    model, tokenizer = load_base()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType] (decorated by transformers)
    bench = Bench(model, tokenizer, out, options.quick)
    few = 2 if options.quick else None
    shelf = [s.name for s in SHELF[:few]]
    held = [s.name for s in HELD_OUT[:few]]
    experts = [read_peft(WORLD / "experts" / name) for name in shelf]
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"expert, {name}": partial(of_expert, bench, name) for name in shelf},
        **{f"held out, {name}": partial(of_task, bench, name, experts) for name in held},
    }
    found: dict[str, dict[str, Any]] = {}
    for key in list(jobs)[part - 1 :: parts]:
        found[key] = units.get(key, jobs[key])
        units.gather()
        print(key, found[key], flush=True)
    if parts > 1:
        return
    passing = [key for key, one in found.items() if admitted(one)]
    rows = []
    for key, one in found.items():
        arms = {f"base, {way}": value for way, value in one["base"].items()}
        arms |= {arm: one[arm] for arm in ("expert", "full", "constants") if arm in one}
        rows += [Measurement(key, arm, one["rows"], v, v, v) for arm, v in arms.items()]
    tasks = [
        key.partition(", ")[2]
        for key in passing
        if key.startswith("held out") and NOT_HELD not in key
    ]
    settings = SETTINGS | {"admitted": passing, "held-out tasks": tasks[:HELD]}
    write_results("text_admission", rows, settings=settings, seeds=[0], folder=results)
    print(f"admitted: {'; '.join(passing)}\nheld-out tasks: {', '.join(tasks[:HELD])}")


if __name__ == "__main__":
    main()

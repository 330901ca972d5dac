"""A new task from a few examples, by mixing a shelf of sixteen experts: all ways side by side.

    python benchmarks/fewshot.py --split dev            # the development tasks
    python benchmarks/fewshot.py --split test           # the held-out tasks
    python benchmarks/fewshot.py --split dev --quick    # one task, few rows, for a look

16 and 64 examples, three draws of each; every way answers the same rows, greedily. A way that
learns nothing is asked once. The unit is the task and draw, its rows averaged; differences are
paired. Cells that were measured are kept, and a run goes on where it stopped; `--part K/N` shares
them among processes.

Ways: the base; the base with the examples before the prompt; sum; NLA; the expert that likes the
examples best; Arrow (top 4); LoRAHub's search with its own settings, exact on Delta-W; X-LoRA in
one pass, whose gate reads each token's state behind a third of the blocks, with learned constants
below; a LoRA trained on the examples alone; gates, the preset that `fewshot_ablation.py` chose.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from fewshot_ablation import PRESET, XLORA
from fewshot_bench import ROWS, Arm, Bench, Gates, Lesson, asked_within, lesson_of, share
from peft import PeftModel
from text_admission import ALL_LINEAR, held_out

from mole_vl.gates import Arrow, Average, GateSpec, LoRAHub, Sum
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from mole_vl.training import FitConfig
from mole_vl.training.search import SearchConfig, search
from nlp.adapter import bound
from nlp.answers import log_likelihood
from nlp.models import BUILT_IN
from nlp.train_experts import LoRA, train_expert
from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

STEPS = {16: 40, 64: 80}
"""Steps of training by the number of examples, for all that are trained."""
SHOTS, DRAWS = tuple(STEPS), 3
ASKED = {"dev": 100, "test": None}
GATES = "gates"


def examples_first(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The base, shown the examples with their answers before each prompt: 16 of them at most."""
    solved = "".join(f"{row.prompt} {row.answer}\n" for row in lesson.few[:ROWS])
    return bench.judge([replace(row, prompt=solved + row.prompt) for row in lesson.asked])


def best_expert(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The one expert under which the examples' answers are most likely."""
    mixture = bench.mixed(lesson.task, Average())
    few, liked = bench.encoded(lesson.few), {}
    for name in mixture.names:
        with mixture.pinned({name: 1.0}):
            told = log_likelihood(bench.model, bench.tokenizer, few, around=bound(mixture))
        liked[name] = sum(told)
    best = max(liked, key=lambda name: liked[name])
    with mixture.pinned({best: 1.0}):
        found = bench.judge(lesson.asked, around=bound(mixture))
    mixture.unmix()
    return found | {"expert": best}


def lorahub(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """Constants by LoRAHub's search: 40 trials, on all examples."""
    mixture = bench.mixed(lesson.task, LoRAHub())
    run = bench.out / f"search {time.time_ns()}"
    config = SearchConfig(output=run, rows=len(lesson.few), progress=False)
    start = time.perf_counter()
    search(bench.language(mixture, lesson.few), {"model": mixture}, config)
    seconds = time.perf_counter() - start
    found = bench.judge(lesson.asked, around=bound(mixture)) | {"seconds": seconds}
    mixture.unmix()
    shutil.rmtree(run)
    return found


@dataclass(frozen=True)
class OwnLoRA:
    """A LoRA on all linear layers, trained on the examples, with no expert."""

    steps: int
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-3

    def __call__(self, bench: Bench, lesson: Lesson) -> dict[str, Any]:
        """Train on the examples, then ask."""
        folder = bench.out / f"lora {time.time_ns()}"
        run = FitConfig(
            output=folder / "run", steps=self.steps, rows=ROWS, lr=self.lr, warmup=5, progress=False
        )
        start = time.perf_counter()
        train_expert(
            bench.model,
            bench.encoded(lesson.few),
            LoRA(name="own", rank=self.rank, alpha=self.alpha, targets=ALL_LINEAR),
            run,
            pad=bench.tokenizer.pad_token_id,
            base=BUILT_IN,
            output=folder,
            lesson={},
        )
        seconds = time.perf_counter() - start
        adapted = PeftModel.from_pretrained(bench.model, folder / "own")
        found = bench.judge(lesson.asked, model=adapted) | {"seconds": seconds}
        adapted.unload()
        shutil.rmtree(folder)
        return found


def untouched(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The base."""
    return bench.judge(lesson.asked)


@dataclass(frozen=True)
class Way:
    """One way to a new task: an arm, and how it is made, which is kept with its cells."""

    arm: Arm
    made: Mapping[str, Any]


def made_by(arm: Callable[[Bench, Lesson], dict[str, Any]], **made: Any) -> Way:
    """A way that is made as its own code says."""
    return Way(arm, {"arm": arm.__name__, **made})


def fixed(gate: GateSpec, site: SiteKind = "network") -> Way:
    """A way whose gates learn nothing."""
    return Way(asked_within(gate, site), {"gate": to_data(gate), "site": site})


def taught(gates: Gates) -> Way:
    """A way whose gates learn from the examples."""
    return Way(gates, gates.settings())


FIXED: Mapping[str, Way] = {
    "base": made_by(untouched),
    "sum": fixed(Sum()),
    "NLA": fixed(Average()),
    "Arrow": fixed(Arrow(top_k=4), "matrix"),
}


def learned(shots: int) -> Mapping[str, Way]:
    """The ways that learn from examples, as they do from this many."""
    steps = STEPS[shots]
    return {
        "base, examples in the prompt": made_by(examples_first, examples=ROWS),
        "best expert": made_by(best_expert),
        "LoRAHub, on Delta-W": made_by(lorahub, trials=SearchConfig.evaluations),
        "X-LoRA in one pass": taught(replace(XLORA, steps=steps)),
        "LoRA of the examples": Way(OwnLoRA(steps), asdict(OwnLoRA(steps))),
        GATES: taught(replace(PRESET, steps=steps)),
    }


LEARNED = tuple(learned(SHOTS[0]))


Cell = tuple[str, str, int, int]


def cells(split: str, sizes: Sequence[int], quick: bool) -> list[Cell]:
    """Way, task, examples, draw; those that learn nothing are asked once, as of no examples."""
    tasks = [source.name for source in DEVELOPMENT] if split == "dev" else held_out()
    tasks, draws = tasks[: 1 if quick else None], range(1 if quick else DRAWS)
    lessons = product(sizes, draws, tasks)
    return [
        *((way, task, 0, 0) for task in tasks for way in FIXED),
        *((way, task, shots, draw) for shots, draw, task in lessons for way in LEARNED),
    ]


def summary(found: Mapping[Cell, Mapping[str, Any]]) -> list[Measurement]:
    """Exact match and log-likelihood by way, and what the gates gain over each."""
    measures = {
        "exact match": share,
        "log-likelihood per answer token": lambda one: float(np.mean(one["told"])),
    }
    rows = []
    for shots in sorted({shots for _, _, shots, _ in found if shots}):
        units = sorted({(t, draw) for _, t, s, draw in found if s == shots})
        for measure, value in measures.items():
            by_arm = {
                arm: [value(found.get((arm, t, shots, d)) or found[arm, t, 0, 0]) for t, d in units]
                for arm in (*FIXED, *LEARNED)
            }
            name = f"{measure}, {shots} examples"
            rows += [measured(name, arm, values) for arm, values in by_arm.items()]
            rows += [
                measured(name, f"{GATES} - {arm}", list(np.subtract(by_arm[GATES], values)))
                for arm, values in by_arm.items()
                if arm != GATES
            ]
            for task in sorted({task for task, _ in units}):
                rows += [
                    measured(
                        f"{name}, {task}",
                        arm,
                        [v for v, (own, _) in zip(values, units, strict=True) if own == task],
                    )
                    for arm, values in by_arm.items()
                ]
        for arm in LEARNED:
            mine = [one for (a, _, s, _), one in found.items() if (a, s) == (arm, shots)]
            spent = [one["seconds"] for one in mine if "seconds" in one]
            if spent:
                rows.append(measured(f"seconds of training, {shots} examples", arm, spent))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=tuple(ASKED), default="dev")
    parser.add_argument("--shots", type=int, choices=SHOTS, help="examples; all sizes if not said")
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' cells, as K/N")
    parser.add_argument("--quick", action="store_true", help="one task, few rows, for a look")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    sizes = [options.shots] if options.shots else SHOTS[: 1 if options.quick else None]
    asked = 10 if options.quick else ASKED[options.split]
    settings = {"split": options.split, "asked": asked, "rows a step": ROWS}
    name = f"fewshot_{options.split}"
    out = ROOT / "out/benchmarks" / name / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    units = Units(out / "units", results / f"{name}_units.json", settings)
    bench, ways = Bench(out), {0: FIXED, **{shots: learned(shots) for shots in SHOTS}}
    found: dict[Cell, dict[str, Any]] = {}
    for cell in cells(options.split, sizes, options.quick)[part - 1 :: parts]:
        way, task, shots, draw = cell
        lesson, how = lesson_of(task, shots, draw, asked), ways[shots][way]
        key = f"{way}, {task}, {shots}, {draw}"
        found[cell] = units.get(key, partial(how.arm, bench, lesson), how.made)
        units.gather()
        print(f"{key}: {share(found[cell]):.3f}", flush=True)
    if parts > 1:
        return
    made = {n: {way: how.made for way, how in by_name.items()} for n, by_name in ways.items()}
    settings |= {"ways by examples": made}
    seeds: Sequence[int] = range(DRAWS)
    write_results(name, summary(found), settings=settings, seeds=seeds, folder=results)


if __name__ == "__main__":
    main()

"""The mixed stream of all sixteen tasks of the shelf, no task named: every router side by side.

    python benchmarks/mixed_stream.py --split dev      # the 400 rows that choices are made on
    python benchmarks/mixed_stream.py --split test     # the 800 held-out rows
    python benchmarks/mixed_stream.py --split dev --quick

Ways: the base; sum; NLA; Arrow (top 4); PHATGOOSE (top 2); the task classifier's shares, and its
likeliest expert alone; X-LoRA in one pass; MoLE gates, which read the model's states and the
sentence embedding that the classifier reads, and the same of the states alone; the oracle, each
row's own expert. What learns from the stream learns from `shelf_train`, with three seeds, and its
gates are kept for both splits. The unit is the row, its seeds averaged first; a way's ratio to the
oracle is that of their means over rows drawn together. Cells that were measured are kept, and a run
goes on where it stopped; `--part K/N` shares them among processes (make the routers first:
`shelf_routers.py`). `--ways` names some of the ways.
"""

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewshot_bench import WORLD, Arm, Bench, Lesson, asked_within, share
from fewshot_ways import untouched
from shelf_routers import classified, phatgoose, told
from torch import Tensor

from mole_vl import Mixture, save_gates
from mole_vl.files import digest_contents
from mole_vl.gates import Arrow, Average, GateSpec, Hidden, MoLE, Sum
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from mole_vl.training import FitConfig, centre_gates, choice_task, fit
from nlp.adapter import bound
from nlp.around import Around, ExtraTerms
from nlp.data import TextBatch, TextRow, digest_rows, read_rows
from nlp.encoders import BUILT_IN_ENCODER
from nlp.mixed_text import ORACLE, first_of_each
from nlp.mixing import mix_by_file
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

SEEDS = (0, 1, 2)
GATES, STATES = "MoLE gates", "MoLE gates, states alone"


@dataclass(frozen=True)
class Learned:
    """Gates that learn from the stream: their kind, and how they are trained.

    With `alone` they learn from what each expert alone makes of each row. With an `encoder` they
    read its view of each prompt beside the model's states.
    """

    gate: GateSpec
    site: SiteKind
    lr: float
    steps: int
    after: int = 0
    rows: int = 16
    centring: int = 8
    alone: bool = False
    encoder: str | None = None
    weight_decay: float = 0.0

    def mixture(self, bench: Bench, rows: Sequence[TextRow], run: Path, seed: int) -> Mixture:
        """The base mixed by the gates in the folder of their run, where they are trained first."""
        file = run / "gates.safetensors"
        if file.exists():
            return mix_by_file(bench.model, bench.tokenizer, bench.experts(""), file)
        mixture = bench.mixed("", self.gate, self.site, self.after, self.encoder)
        task = bench.language(mixture, rows)
        config = FitConfig(
            output=run / "run",
            steps=self.steps,
            rows=self.rows,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=seed,
            save_every=50,
            progress=False,
        )
        centre_gates([mixture], task, rows=self.rows, batches=self.centring, seed=seed)
        if self.alone:
            made = {"rows": digest_rows(rows)}
            told = [mixture.digests, to_data(self.gate), self.site, self.after, self.encoder, made]
            survey = bench.out / f"survey {digest_contents([json.dumps(told).encode()])[:12]}"
            task = choice_task({"model": mixture}, task, survey, rows=self.rows, settings=made)
        fit(task, config, to_data(self))
        save_gates(mixture, file)
        return mixture

    def __call__(self, bench: Bench, lesson: Lesson, run: Path, seed: int) -> dict[str, Any]:
        """Train, then ask; of gates over rows, the mean weight of each expert by task too."""
        mixture = self.mixture(bench, lesson.few, run, seed)
        if mixture.layout.kind == "preview":
            seen: dict[tuple[int, ...], Tensor] = {}
            found = bench.judge(lesson.asked, around=noted(mixture, seen))
            weights = torch.stack([seen[row.prompt] for row in bench.encoded(lesson.asked)])
            found["weights"] = by_task(lesson.asked, weights, mixture.names)
        else:
            found = bench.judge(lesson.asked, around=bound(mixture))
        mixture.unmix()
        return found


def noted(mixture: Mixture, seen: dict[tuple[int, ...], Tensor]) -> Around:
    """A language task's seam to a mixture that notes the weights (E,) found for each prompt.

    Args:
        mixture: One whose gate sees a preview.
        seen: Filled with the weights, by the prompt's ids.
    """

    @contextmanager
    def around(batch: TextBatch) -> Iterator[ExtraTerms]:
        with mixture.record() as records, bound(mixture)(batch) as terms:
            yield terms
        weights = records[0].output.weights.detach().cpu()
        for ids, mask, own in zip(batch["input_ids"], batch["prompt_mask"], weights, strict=True):
            seen[tuple(ids[mask].tolist())] = own

    return around


def by_task(
    rows: Sequence[TextRow], weights: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean weight of each expert over the rows of each task, by task and expert."""
    means = {}
    for task in sorted({row.task for row in rows}):
        mine = weights[[row.task == task for row in rows]].mean(0).tolist()
        means[task] = {name: round(value, 4) for name, value in zip(names, mine, strict=True)}
    return means


def oracle(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """Each row by its own task's expert alone."""
    mixture = bench.mixed("", Average())
    weights = torch.tensor([[float(row.task == n) for n in mixture.names] for row in lesson.asked])
    around = told(mixture, bench.encoded(lesson.asked), weights)
    found = bench.judge(lesson.asked, around=around)
    mixture.unmix()
    return found


FIXED: Mapping[str, Arm] = {
    "base": untouched,
    "sum": asked_within(Sum()),
    "NLA": asked_within(Average()),
    "Arrow": asked_within(Arrow(top_k=4), "matrix"),
    "PHATGOOSE": phatgoose,
    "classifier, soft": classified(hard=False),
    "classifier, hard": classified(hard=True),
    ORACLE: oracle,
}
ALONE = Learned(
    MoLE(score=Hidden(pool=("mean", "max", "last")), top_k=1, preview="average"),
    "preview",
    lr=2e-3,
    steps=750,
    after=24,
    rows=64,
    alone=True,
)
LEARNED: Mapping[str, Learned] = {
    "X-LoRA in one pass": Learned(MoLE(over="position"), "network", lr=5e-3, steps=150, after=10),
    STATES: ALONE,
    GATES: replace(ALONE, encoder=BUILT_IN_ENCODER, weight_decay=3.0),
}


def cells(quick: bool, ways: Collection[str]) -> list[tuple[str, int]]:
    """Way and seed; those that learn nothing from the stream here are asked once."""
    seeds = SEEDS[:1] if quick else SEEDS
    fixed, taught = ([way for way in kind if way in ways] for kind in (FIXED, LEARNED))
    return [(arm, 0) for arm in fixed] + [(arm, seed) for seed in seeds for arm in taught]


def over_oracle(pairs: np.ndarray, axis: int = 0) -> np.ndarray:
    """A way's mean over the oracle's, of pairs (..., 2) of the two."""
    means = np.mean(pairs, axis=axis)
    return means[..., 0] / means[..., 1]


def beside_gates(hits: Mapping[str, np.ndarray]) -> list[Measurement]:
    """Exact match of each way, its ratio to the oracle, and what the gates gain over it.

    Args:
        hits: By way, of each row, (rows,).
    """
    rows = [measured("exact match", way, values.tolist()) for way, values in hits.items()]
    rows += [
        measured(
            "exact match over the oracle's, a ratio of means",
            way,
            np.stack([values, hits[ORACLE]], 1).tolist(),
            centre=over_oracle,
        )
        for way, values in hits.items()
    ]
    return rows + [
        measured("exact match", f"{GATES} - {way}", (hits[GATES] - values).tolist())
        for way, values in hits.items()
        if way != GATES
    ]


def summary(
    found: Mapping[tuple[str, int], Mapping[str, Any]], tasks: Sequence[str]
) -> list[Measurement]:
    """Exact match of each way, overall and by task, its ratio to the oracle, and likelihood."""
    arms = list(dict.fromkeys(arm for arm, _ in found))

    def over_seeds(arm: str, measure: str) -> np.ndarray:
        return np.mean([one[measure] for (a, _), one in found.items() if a == arm], axis=0)

    hits = {arm: over_seeds(arm, "hits") for arm in arms}
    rows = beside_gates(hits)
    rows += [
        measured("log-likelihood per answer token", arm, over_seeds(arm, "told").tolist())
        for arm in arms
    ]
    for arm in (arm for arm in LEARNED if arm in arms):
        shares = [share(one) for (a, _), one in found.items() if a == arm]
        rows.append(measured("exact match of a seed", arm, shares))
    own = np.array(tasks)
    for task in sorted(set(tasks)):
        for arm, values in hits.items():
            rows.append(measured(f"exact match, {task}", arm, values[own == task].tolist()))
    for task in sorted(set(tasks)):
        for arm in LEARNED:
            shares = [one["weights"][task][task] for one in _weighing(found, arm)]
            if shares:
                rows.append(measured(f"weight of its own expert, {task}", arm, shares))
    return rows


def _weighing(
    found: Mapping[tuple[str, int], Mapping[str, Any]], arm: str
) -> list[Mapping[str, Any]]:
    """An arm's cells, by seed, where its gates are over rows."""
    return [one for (own, _), one in found.items() if own == arm and "weights" in one]


def confusion(weights: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """To which experts each task's rows go, from a tenth of the weight, in Markdown."""
    lines = ["| task | goes to |", "|---|---|"]
    for task in weights[0]:
        mean = {name: np.mean([one[task][name] for one in weights]) for name in weights[0][task]}
        parts = sorted(((w, name) for name, w in mean.items() if w >= 0.1), reverse=True)
        lines.append(f"| {task} | {', '.join(f'{name} {w:.2f}' for w, name in parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=(*FIXED, *LEARNED),
        help="gates and oracle beside these; if not said, all",
    )
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' cells, as K/N")
    parser.add_argument("--quick", action="store_true", help="few steps and rows, for a look")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    ways = {arm: replace(how, steps=5) if options.quick else how for arm, how in LEARNED.items()}
    name = f"mixed_stream_{options.split}"
    out = ROOT / "out/benchmarks/mixed_stream" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    train, asked = (read_rows(WORLD / f"data/shelf_{s}.jsonl") for s in ("train", options.split))
    lesson = Lesson("", train, first_of_each(asked, 2 if options.quick else None))
    settings = {"split": options.split, "asked": len(lesson.asked)}
    units = Units(out / f"units {options.split}", results / f"{name}_units.json", settings)
    bench, found = Bench(out), {}
    wanted = {*(options.ways or (*FIXED, *LEARNED)), GATES, ORACLE}
    for arm, seed in cells(options.quick, wanted)[part - 1 :: parts]:
        if arm in ways:
            own = to_data(ways[arm])
            run = out / "runs" / f"{arm} {seed} {digest_contents([json.dumps(own).encode()])[:12]}"
            make = partial(ways[arm], bench, lesson, run, seed)
        else:
            make, own = partial(FIXED[arm], bench, lesson), {}
        key = f"{arm}, {seed}"
        found[arm, seed] = units.get(key, make, own)
        units.gather()
        print(f"{key}: {share(found[arm, seed]):.3f}", flush=True)
    if parts > 1:
        return
    rows = summary(found, [row.task for row in lesson.asked])
    told_of = settings | {"ways": {arm: to_data(how) for arm, how in ways.items() if arm in wanted}}
    write_results(name, rows, settings=told_of, seeds=SEEDS, folder=results)
    print(confusion([one["weights"] for one in _weighing(found, GATES)]))


if __name__ == "__main__":
    main()

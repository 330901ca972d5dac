"""How long gates train to the same score, with our loss and with the MoLE authors'.

    python benchmarks/authors_loss.py            # all development pairs
    python benchmarks/authors_loss.py --quick    # one pair, few steps, for a look

Their loss (arXiv 2404.13628, the authors' code): a picture's sampler stands at a step drawn by lot;
all remaining steps run, each with gradient through its own call, and at each the clean picture that
is predicted there is decoded with gradient and judged. Ours, the preset's, draws in few steps with
gradient through all, and decodes and judges once, at the end. The claim is about the loss alone:
gates, learning rate and its schedule, rows, noise, caption and picture terms and the views are the
preset's on both sides (the authors have a softmax gate that reads, a rate of 1e-5, one row, no
guidance, an L2 term, and a step of the optimiser at every second step of the sampler). The
composition has no training picture that could be noised to the step drawn, so that its sampler goes
there without gradient. The sampler has the 20 steps of our report; theirs has up to 50, which
`--sampler-steps 50` gives it, with results of their own (authors_loss_50).

Score: image alignment to the true drawing by judge-CLIP, pictures of the same noise at every look.
Target: the start (untrained gates, the sum) and 95 % of what our loss gains over it by its end.
Seconds are those of training, without the looks: by the clock, and of this process's CPU, which do
not count what else the machine does (with OMP_NUM_THREADS=1 they are the seconds of an idle
machine). A run ends with the preset's steps, or when it has taken 12 times our CPU seconds; one
that does not reach the target counts with its last second, so that its ratio is a lower bound. A
pair and side that is done is kept under out/benchmarks.
"""

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from costs import alone, clocks

from dreambooth.adapter import positive_rows
from dreambooth.clip_task import ClipTask
from dreambooth.sampling import guided, sample
from dreambooth.subject_style import SubjectStyle
from dreambooth.world.candidates import write_candidates
from dreambooth.world.compositions import Composition, compositions
from emoji_pairs import CONFIG, PICTURES, WORLD, domain_of
from mole_vl.domain import gate_parameters, prepare
from mole_vl.training import FitConfig, Progress, Stop, Term, fit
from mole_vl.training.rows import rows_of_step
from presets import described, load, plan
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

OURS, THEIRS = "preset", "authors' loss"
SHARE = 0.95
CLOCKS = ("seconds", "cpu_seconds")


class AuthorsTask(ClipTask):
    """The MoLE authors' loss: every remaining step of the sampler is judged, with gradient."""

    def losses(self, batch: Any) -> Mapping[str, Term]:
        """The terms `text` and `picture`, each a mean over the steps from `batch.upto` to the end.

        The gradient passes each call of the network from there, and its decoding; what one call
        does to the next is left out, as the authors detach the latents between them.
        """
        base, guidance, rows = self._base, self._loss.guidance, len(batch.noise)
        states, scheduler = batch.states(), self._scheduler
        source = positive_rows(rows, states.device)
        found: dict[str, list[Term]] = {}
        with self._mixture.condition(source=source):
            latents = sample(base, batch.noise, states, scheduler, guidance, batch.upto)
            for step in scheduler.timesteps[batch.upto :]:
                output = guided(base, latents, step, states, guidance)
                clean = base.noising.clean(latents, output, step.expand(rows))
                pictures = base.decode(clean).clamp(-1, 1)
                for name, term in self._judged(pictures, batch).items():
                    found.setdefault(name, []).append(term)
                stepped: Any = scheduler.step(output.detach(), int(step), latents)
                latents = stepped.prev_sample
        return {
            name: Term(torch.stack([term.value for term in terms]).mean(), terms[0].weight)
            for name, terms in found.items()
        }


def task_of(side: str, domain: SubjectStyle, sampler_steps: int) -> ClipTask:
    """The task of one side, over a domain that is mixed."""
    loss = domain.loss
    if side == THEIRS:
        loss = replace(loss, steps=sampler_steps, first=0.0, last=1.0)
    return (AuthorsTask if side == THEIRS else ClipTask)(
        domain.base,
        domain.mixture,
        [domain.scene()],
        domain.resolution,
        domain.clip,
        loss,
        parameters=gate_parameters({"unet": domain.mixture}),
    )


@dataclass
class Course:
    """A run's looks: after which step, after how many seconds of training, with what score."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def reached(self, target: float) -> int | None:
        """The first look with that score."""
        return next((look for look, score in enumerate(self.scores) if score >= target), None)


class Watch:
    """Looks at a run: every few steps, and when its seconds are spent; it stops the clocks for it.

    Args:
        domain: What draws and judges.
        every: Steps between looks.
        noises: Pictures of a look.
        budget: CPU seconds of training after which the run ends.
    """

    def __init__(self, domain: SubjectStyle, every: int, noises: int, budget: float) -> None:
        self.domain, self.every, self.noises, self.budget = domain, every, noises, budget
        self.course = Course()
        self.spent = np.zeros(2)
        self._look(0)
        self.since = clocks()

    def __call__(self, progress: Progress) -> None:
        """After a step."""
        self.spent += clocks() - self.since
        spent = self.spent[1] >= self.budget
        if spent or progress.step % self.every == 0 or progress.step == progress.steps:
            self._look(progress.step)
        if spent:
            raise Stop
        self.since = clocks()

    def _look(self, step: int) -> None:
        drawings = {"gates": self.domain.draw(self.noises)}
        scores = self.domain.scores(self.domain.judge, drawings)["gates"]["image"]
        seconds, cpu_seconds = self.spent.tolist()
        self.course.steps.append(step)
        self.course.seconds.append(seconds)
        self.course.cpu_seconds.append(cpu_seconds)
        self.course.scores.append(float(np.mean(scores)))


def mixed(preset: Any, pair: Composition, config: FitConfig) -> SubjectStyle:
    """A pair's domain with untrained gates."""
    domain = domain_of(preset, pair, drawn=1)
    prepare(domain, preset.gate, config, **plan(preset))
    return domain


def course_of(
    side: str, pair: Composition, config: FitConfig, budget: float, options: argparse.Namespace
) -> Course:
    """The course of one side's run."""
    # A run that broke off has lost its clock.
    shutil.rmtree(config.output, ignore_errors=True)
    domain = mixed(load(CONFIG), pair, config)
    watch = Watch(domain, options.every, options.noises, budget)
    fit(task_of(side, domain, options.sampler_steps), config, watch=watch)
    return watch.course


def one_step(side: str, pair: Composition, config: FitConfig, sampler_steps: int) -> float:
    """CPU seconds of one batch's loss and gradient: the authors' from the sampler's first step."""
    task = task_of(side, mixed(load(CONFIG), pair, config), sampler_steps)
    batch: Any = task.batch(rows_of_step(config.seed, 0, config.rows))
    batch = batch if side == OURS else replace(batch, upto=0)
    start = time.process_time()
    terms = task.losses(batch).values()
    torch.stack([term.weight * term.value for term in terms]).sum().backward()
    return time.process_time() - start


def summary(courses: Mapping[str, Mapping[str, Course]]) -> list[Measurement]:
    """Seconds and scores by side, over pairs."""
    rows = []
    for side in (OURS, THEIRS):
        found = [sides[side] for sides in courses.values()]
        for name, place in (("start", 0), ("end", -1)):
            scores = [course.scores[place] for course in found]
            rows.append(measured(f"image alignment, judge-CLIP, at the {name}", side, scores))
        for name in CLOCKS:
            every = [getattr(course, name)[-1] for course in found]
            name = name.replace("cpu_", "CPU ")
            each = [seconds / one.steps[-1] for seconds, one in zip(every, found, strict=True)]
            rows.append(measured(f"{name} a step", side, each))
            rows.append(measured(f"{name} of training", side, every))
    # Where our loss gains nothing there is no target.
    gained = [sides for sides in courses.values() if sides[OURS].scores[-1] > sides[OURS].scores[0]]
    return rows + (reaching(gained) if gained else [])


def reaching(courses: Sequence[Mapping[str, Course]]) -> list[Measurement]:
    """Seconds to the target, of pairs that have one."""
    looks: dict[str, list[int | None]] = {OURS: [], THEIRS: []}
    for sides in courses:
        scores = sides[OURS].scores
        target = scores[0] + SHARE * (scores[-1] - scores[0])
        for side, course in sides.items():
            looks[side].append(course.reached(target))
    rows = []
    for side, found in looks.items():
        arrived = [float(look is not None) for look in found]
        rows.append(measured("share of pairs that reach the target", side, arrived))
    for clock in CLOCKS:
        until = {
            side: [
                getattr(sides[side], clock)[-1 if look is None else look]
                for sides, look in zip(courses, found, strict=True)
            ]
            for side, found in looks.items()
        }
        name = f"{clock.replace('cpu_', 'CPU ')} to the target, at least"
        rows += [measured(name, side, seconds) for side, seconds in until.items()]
        ratios = [theirs / ours for ours, theirs in zip(until[OURS], until[THEIRS], strict=True)]
        arm = f"{THEIRS} / {OURS}"
        rows.append(measured(f"ratio of {name}", arm, ratios))
        rows.append(measured(f"ratio of {name}, median", arm, ratios, centre=np.median))
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sampler-steps", type=int, default=20, help="of the authors' loss")
    parser.add_argument("--budget", type=float, default=12.0, help="times our CPU seconds")
    parser.add_argument("--every", type=int, default=5, help="steps between looks")
    parser.add_argument("--noises", type=int, default=4, help="pictures of a look")
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' pairs, as K/N")
    parser.add_argument("--quick", action="store_true", help="one pair, few steps, for a look")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = arguments()
    if options.quick:
        options.every = 1
    write_candidates(WORLD, PICTURES)
    preset = load(CONFIG)
    name = "authors_loss" + (f"_{options.sampler_steps}" if options.sampler_steps != 20 else "")
    folder = ROOT / "out/benchmarks" / name / ("quick" if options.quick else "full")
    results = folder if options.quick else FOLDER
    part, parts = map(int, options.part.split("/"))
    pairs = compositions(WORLD, "dev")[: 1 if options.quick else None]
    steps = 3 if options.quick else preset.fit.steps
    config = replace(preset.fit, steps=steps, progress=False)
    settings = described(CONFIG) | {
        "steps": steps,
        "loss": asdict(preset.domain.loss),
        **{name: value for name, value in vars(options).items() if name != "part"},
        "share of the gain": SHARE,
    }
    kept = Units(folder / "units", results / f"{name}_units.json", settings)
    # Before anything is loaded here: see `alone`.
    steps_alone = {
        side: alone(one_step, side, pairs[0], config, options.sampler_steps)
        for side in ((OURS, THEIRS) if parts == 1 else ())
    }
    courses: dict[str, dict[str, Course]] = {}
    for pair in pairs[part - 1 :: parts]:
        sides, budget = courses.setdefault(pair.name, {}), float("inf")
        for side in (OURS, THEIRS):
            unit = f"{pair.name}, {side}"
            run = replace(config, output=folder / "runs" / unit)
            measure = partial(course_of, side, pair, run, budget, options)
            sides[side] = Course(**kept.get(unit, lambda measure=measure: asdict(measure())))
            budget = options.budget * sides[OURS].cpu_seconds[-1]
            kept.gather()
        print(f"{pair.name}: done", flush=True)
    if parts > 1:
        return
    rows = summary(courses)
    for side, (seconds, gib) in steps_alone.items():
        arm = side if side == OURS else f"{side}, from the sampler's first step"
        rows.append(measured("CPU seconds of one step alone", arm, [seconds]))
        rows.append(measured("peak GiB of a process with one step", arm, [gib]))
    settings["courses"] = {
        name: {side: asdict(course) for side, course in sides.items()}
        for name, sides in courses.items()
    }
    write_results(name, rows, settings=settings, seeds=[config.seed], folder=results)


if __name__ == "__main__":
    main()

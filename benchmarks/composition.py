"""A subject's and a style's LoRA joined in every way there is, against the true drawing.

    python benchmarks/composition.py --split dev     # chooses the merges' strengths
    python benchmarks/composition.py --split test    # all test subjects in all test styles
    python benchmarks/composition.py --quick         # two development pairs, for a look
    python benchmarks/composition.py --split test --part 1/2    # half of it, beside another process

Every way draws the same prompt from the same noise. Image alignment is the cosine to the true
drawing, which nothing was trained on, both seen from the mean training picture: by judge-CLIP, by
EfficientNet-Lite0 (ImageNet), and by loss-CLIP, which trains the gates, in rows marked so. The rank
of the truth is its place among all pictures of the world, nearest first. Text alignment is
judge-CLIP's cosine to the caption. The unit is the pair, its noises averaged first; intervals are
by bootstrap over subjects. A pair that is done is kept in `results/composition_SPLIT_units.json`
and not drawn again, its pictures under out/benchmarks; with `--part`, which writes no results,
several processes share the pairs (the first trains the slot gates: start the others when it draws
pairs), and a last run without it writes them.

Slot gates are trained on the pairs of one half of the subjects and used on the other half's, which
they never saw.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreambooth.adapter import blocks
from dreambooth.clip import Clip
from dreambooth.clip_task import DRAWN
from dreambooth.drawing import draw_encoded
from dreambooth.grid import save_grid
from dreambooth.pairs import Pair, Pairs
from dreambooth.sampling import Branches, one_branch
from dreambooth.subject_style import SubjectStyle
from dreambooth.world.candidates import write_candidates
from dreambooth.world.compositions import Composition, compositions
from dreambooth.world.pictures import Pictures
from dreambooth.world.scenes import to_float
from dreambooth.world.split import base_pairs
from dreambooth.world.world import World
from emoji_pairs import CONFIG, PICTURES, WORLD, domain_of
from eyes import Eye, efficientnet
from merges import KINDS, PeftMerges
from mole_vl import Expert, Mixture, mix_from, save_gates
from mole_vl.domain import prepare
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training import fit, mix_seed
from presets import described, load, plan
from results import FOLDER, ROOT, measured, write_results
from units import Units

OUT = ROOT / "out/benchmarks/composition"
STRENGTHS = (0.6, 0.8, 1.0)
MERGES = ("sum", *(f"peft {kind}" for kind in KINDS))
SWITCH_EVERY = 5
SLOTS = ("subject", "style")
SLOT_STEPS, SLOT_ROWS = 90, 8
NOISES = 4


class Judges:
    """The eyes of the benchmark, and what they see of the whole world."""

    def __init__(self, judge: str, trained_on: str) -> None:
        self.world = World.load(WORLD)
        pictures = Pictures.load(WORLD, self.world)
        self.pairs = self.world.pairs()
        every = torch.stack([to_float(pictures[pair]) for pair in self.pairs])
        place = {pair: index for index, pair in enumerate(self.pairs)}
        ordinary = every[[place[pair] for pair in base_pairs(self.world)]]
        self.clip = Clip(judge)
        encoders = {
            "judge-CLIP": self.clip.pictures,
            "EfficientNet-Lite0": efficientnet(),
            "loss-CLIP, trained on": Clip(trained_on).pictures,
        }
        self.eyes = {name: Eye(encode, ordinary) for name, encode in encoders.items()}
        self.seen = {name: eye(every) for name, eye in self.eyes.items()}
        self.place = place
        self.every = every

    def picture(self, pair: Composition) -> Tensor:
        """The true drawing, (3, h, w) in [-1, 1]."""
        return self.every[self.place[pair.pair]]

    @torch.no_grad()
    def scores(self, pictures: Tensor, pair: Composition, caption: str) -> dict[str, list[float]]:
        """Each measure of each picture."""
        found = {}
        truth = self.place[pair.pair]
        for name, eye in self.eyes.items():
            cosines = eye(pictures) @ self.seen[name].T
            own = cosines[:, truth]
            found[f"image alignment, {name}"] = own.tolist()
            nearer = (cosines > own[:, None]).sum(1)
            found[f"rank of the truth, {name}"] = (nearer + 1).tolist()
        words = self.clip.captions([caption])[0]
        found["text alignment, judge-CLIP"] = (self.clip.pictures(pictures) @ words).tolist()
        return found


def switched(mixture: Mixture) -> Branches:
    """LoRA Switch: one LoRA at a time, the next one every few steps (arXiv 2402.16843)."""
    names = mixture.names
    return lambda step: [mixture.pinned({names[step // SWITCH_EVERY % len(names)]: 1.0})]


def composite(mixture: Mixture) -> Branches:
    """LoRA Composite: the mean of one guided prediction for each LoRA (arXiv 2402.16843)."""
    return lambda _step: [mixture.pinned({name: 1.0}) for name in mixture.names]


def gated(domain: SubjectStyle, mixture: Mixture, pictures: int) -> Branches:
    """The gates, each row under the results that it had in training."""
    source = domain.loss.source(pictures, domain.base.unet.device)
    return lambda _step: [mixture.condition(source=source)]


def trained_slots(
    preset: Any, pairs: Sequence[Composition], output: Path, steps: int
) -> list[Path]:
    """Files of slot gates for the pairs of every other subject, each trained on the others'."""
    names = list(dict.fromkeys(pair.subject.name for pair in pairs))
    files = []
    for half in (0, 1):
        seen = [pair for pair in pairs if names.index(pair.subject.name) % 2 != half]
        settings = [pair.settings(WORLD / "loras", PICTURES) for pair in seen]
        given = preset.domain
        domain = Pairs(
            base=given.base_name,
            pairs=[
                Pair(
                    experts=dict(zip(SLOTS, one["experts"], strict=True)),
                    prompt=one["prompt"],
                    caption=one["caption"],
                )
                for one in settings
            ],
            pictures={name: file for one in settings for name, file in one["pictures"].items()},
            ordinary=settings[0]["ordinary"],
            clip=given.clip_name,
            resolution=given.resolution,
            loss=given.loss,
        )
        folder = output / f"slots for half {half}"
        config = replace(preset.fit, steps=steps, rows=SLOT_ROWS, output=folder, progress=False)
        mixtures, task, agreed = prepare(domain, preset.gate, config, **plan(preset))
        fit(task, config, agreed)
        files.append(folder / "unet.safetensors")
        save_gates(mixtures["unet"], files[-1])
    return files


def ways(
    preset: Any,
    pair: Composition,
    strengths: Mapping[str, Sequence[float]],
    slot_file: Path,
    output: Path,
    noises: int,
    steps: int,
) -> Iterator[tuple[str, SubjectStyle, Branches]]:
    """Every way to join a pair's LoRAs, with the domain whose UNet it is built into."""
    domain, mixture = trained(preset, pair, preset.gate, plan(preset), output / "gates", steps)
    yield "base", domain, lambda _: [mixture.disabled()]
    yield "subject", domain, lambda _: [mixture.pinned({pair.subject.name: 1.0})]
    yield "style", domain, lambda _: [mixture.pinned({pair.style.name: 1.0})]
    for strength in strengths["sum"]:
        same = dict.fromkeys(mixture.names, strength)
        yield f"sum {strength}", domain, lambda _, same=same: [mixture.pinned(same)]
    mean = dict.fromkeys(mixture.names, 1 / len(mixture.names))
    yield "NLA", domain, lambda _: [mixture.pinned(mean)]
    yield "Switch", domain, switched(mixture)
    yield "Composite", domain, composite(mixture)
    yield "gates", domain, gated(domain, mixture, noises)
    slots, unet = domain_of(preset, pair, drawn=1), mixture.unmix()
    slots.load(domain)
    playing = [
        Expert(slot, expert.layers) for slot, expert in zip(SLOTS, slots.experts, strict=True)
    ]
    mixture = mix_from(unet, playing, slot_file, blocks=blocks(slots.base.unet))
    yield "slot gates", slots, gated(slots, mixture, noises)
    whole = plan(preset) | {"site": "network", "after": 0}
    vector = MoLE(score=Free(), normaliser=Sigmoid())
    domain, _ = trained(preset, pair, vector, whole, output / "network", steps)
    yield "network vector", domain, one_branch
    domain = domain_of(preset, pair, drawn=1)
    domain.mix(preset.gate, "block")
    domain.mixture.unmix()
    loras = {p.name: WORLD / "loras" / p.name / "unet" for p in (pair.subject, pair.style)}
    merges = PeftMerges(domain.base.unet, loras)
    for kind in KINDS:
        for strength in strengths[f"peft {kind}"]:
            with merges.merged(kind, strength):
                yield f"peft {kind} {strength}", domain, one_branch


def trained(
    preset: Any, pair: Composition, gate: Any, where: Mapping[str, Any], output: Path, steps: int
) -> tuple[SubjectStyle, Mixture]:
    """A pair's domain with its gates trained as the preset says."""
    domain = domain_of(preset, pair, drawn=1)
    config = replace(preset.fit, steps=steps, output=output, progress=False)
    mixtures, task, agreed = prepare(domain, gate, config, **where)
    fit(task, config, agreed)
    return domain, mixtures["unet"]


def drawn(domain: SubjectStyle, branches: Branches, noises: int) -> Tensor:
    """Pictures of a pair, one from each noise."""
    return draw_encoded(
        domain.base,
        domain.states.repeat_interleave(noises),
        [mix_seed(0, index, 0, DRAWN) for index in range(noises)],
        domain.resolution,
        domain.steps,
        domain.loss.guidance,
        branches,
    )


def scores_of(
    preset: Any,
    pair: Composition,
    strengths: Mapping[str, Sequence[float]],
    judges: Judges,
    slot_file: Path,
    output: Path,
    options: argparse.Namespace,
) -> dict[str, dict[str, list[float]]]:
    """Scores of one pair by way and measure; its pictures are left as a grid."""
    found, rows = {}, {}
    steps = 2 if options.quick else preset.fit.steps
    every = ways(preset, pair, strengths, slot_file, output, NOISES, steps)
    for name, domain, branches in every:
        rows[name] = drawn(domain, branches, NOISES)
        found[name] = judges.scores(rows[name], pair, domain.caption)
    rows["truth"] = judges.picture(pair).unsqueeze(0)
    save_grid(rows, output / "pictures.png")
    return found


def settings_of(preset: Any) -> dict[str, Any]:
    """How a preset's pictures are made, and how many for each unit."""
    return described(CONFIG) | {"loss": asdict(preset.domain.loss), "noises": NOISES}


def chosen_strengths(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Each merge's strength of the best image alignment, by judge-CLIP, on development pairs."""
    means = {arm: np.mean(found["image alignment, judge-CLIP"]) for arm, found in scores.items()}
    return {
        merge: max(STRENGTHS, key=lambda strength: means[f"{merge} {strength}"]) for merge in MERGES
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--quick", action="store_true", help="two pairs, few steps, for a look")
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' pairs, as K/N")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    results = OUT.parent if options.quick else FOLDER
    strengths: dict[str, Sequence[float]] = dict.fromkeys(MERGES, STRENGTHS)
    if options.split == "test":
        dev = json.loads((results / "composition_dev.json").read_text())
        strengths = {merge: [one] for merge, one in dev["settings"]["strengths"].items()}
    write_candidates(WORLD, PICTURES)
    preset = load(CONFIG)
    judges = Judges(preset.domain.judge_name, preset.domain.clip_name)
    folder = OUT / ("quick" if options.quick else options.split)
    settings = settings_of(preset) | {
        "slot gates": {"steps": 2 if options.quick else SLOT_STEPS, "rows a step": SLOT_ROWS},
    }
    gathered = results / f"composition_{options.split}_units.json"
    kept = Units(folder / "units", gathered, settings | {"strengths": strengths})
    pairs = compositions(WORLD, options.split)[: 2 if options.quick else None]
    subjects = list(dict.fromkeys(pair.subject.name for pair in pairs))
    slot_steps = settings["slot gates"]["steps"]
    slot_files = cache(lambda: trained_slots(preset, pairs, folder / "runs", slot_steps))
    units: dict[str, dict[str, dict[str, list[float]]]] = {}
    for pair in pairs[part - 1 :: parts]:
        half = subjects.index(pair.subject.name) % 2
        output = folder / "runs" / pair.name
        units[pair.name] = kept.get(
            pair.name,
            lambda pair=pair, half=half, output=output: scores_of(
                preset, pair, strengths, judges, slot_files()[half], output, options
            ),
        )
        kept.gather()
        print(f"{pair.name}: done", flush=True)
    if parts > 1:
        return
    scores = by_arm(pairs, units)
    settings["strengths"] = (
        chosen_strengths(scores[None])
        if options.split == "dev"
        else {merge: one[0] for merge, one in strengths.items()}
    )
    rows = [row for style, found in scores.items() for row in summary(style, found)]
    name = f"composition_{options.split}"
    write_results(name, rows, settings=settings, seeds=[preset.fit.seed], folder=results)


def by_arm(
    pairs: Sequence[Composition], units: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
) -> dict[str | None, dict[str, dict[str, list[float]]]]:
    """A value for each subject, by style (None for all), arm and measure.

    Subjects have the same styles, so a bootstrap over these means is one over subjects.
    """
    styles = dict.fromkeys(pair.style.name for pair in pairs)
    found: dict[str | None, dict[str, dict[str, list[float]]]] = {}
    for style in (None, *(styles if len(styles) > 1 else ())):
        values: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for pair in pairs:
            if style in (None, pair.style.name):
                for arm, measures in units[pair.name].items():
                    for measure, drawn in measures.items():
                        values[arm, measure][pair.subject.name].append(float(np.mean(drawn)))
        found[style] = defaultdict(dict)
        for (arm, measure), subjects in values.items():
            found[style][arm][measure] = [float(np.mean(v)) for v in subjects.values()]
    return found


def summary(style: str | None, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Any]:
    """Every arm's measures, and the paired differences from the gates."""
    where = "" if style is None else f" in {style}"
    differences = [("gates", arm) for arm in scores if arm != "gates"]
    differences += [("slot gates", "NLA")] if "slot gates" in scores else []
    rows = []
    for measure in scores["gates"]:
        for arm, found in scores.items():
            rows.append(measured(measure + where, arm, found[measure]))
        for one, other in differences:
            pairs = zip(scores[one][measure], scores[other][measure], strict=True)
            rows.append(measured(measure + where, f"{one} - {other}", [a - b for a, b in pairs]))
    return rows


if __name__ == "__main__":
    main()

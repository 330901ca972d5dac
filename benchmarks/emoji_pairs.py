"""Learned gates against sum and average on the emoji world's development pairs.

    python benchmarks/emoji_pairs.py [--quick]

For each pair (a development subject in the development style) and each seed, gates are trained as
in `configs/emoji_subject_style.yaml`, and every arm draws the same prompt from the same noise.
Alignment is the cosine to the true drawing, or to the caption, as judge-CLIP sees it (loss-CLIP,
which trains the gates, in rows marked so). The unit is the pair and seed, its pictures averaged
first; differences are paired.
"""

import argparse
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import torch

from dreambooth.clip import Clip
from dreambooth.data import load_picture
from dreambooth.grid import save_grid
from dreambooth.subject_style import SubjectStyle
from dreambooth.world.candidates import write_candidates
from dreambooth.world.compositions import Composition, compositions
from mole_vl.domain import prepare
from mole_vl.training import fit
from presets import described, load, plan
from results import FOLDER, ROOT, measured, write_results

CONFIG = ROOT / "configs/emoji_subject_style.yaml"
WORLD = ROOT / "worlds/emoji"
PICTURES = ROOT / "out/world"


def domain_of(preset: Any, pair: Composition, drawn: int) -> SubjectStyle:
    """The preset's domain, for another pair."""
    return preset.domain.but(drawn=drawn, **pair.settings(WORLD / "loras", PICTURES))


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--quick", action="store_true", help="one pair, few steps, for a look")
    quick = options.parse_args().quick
    seeds = [0] if quick else [0, 1, 2]
    write_candidates(WORLD, PICTURES)
    preset = load(CONFIG)
    steps = 5 if quick else preset.fit.steps
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds = []  # of runs that were not found trained, or begun
    folder = ROOT / "out/benchmarks" if quick else FOLDER
    for pair in compositions(WORLD, "dev")[: 1 if quick else None]:
        for seed in seeds:
            output = ROOT / f"out/benchmarks/emoji_pairs/{steps}/{pair.name}-{seed}"
            domain = domain_of(preset, pair, drawn=8)
            config = replace(preset.fit, steps=steps, seed=seed, output=output)
            _, task, agreed = prepare(domain, preset.gate, config, **plan(preset))
            found_trained = output.exists()
            result = fit(task, config, agreed)
            if not found_trained:
                seconds.append(result.seconds)
            drawings = domain.drawings(seed)
            for mark, clip in (("", Clip(domain.judge_name)), (", trained on", domain.clip)):
                for name, found in domain.scores(clip, drawings).items():
                    arm = {pair.subject.name: "subject", pair.style.name: "style"}.get(name, name)
                    for measure, values in found.items():
                        mean = torch.tensor(values).mean().item()
                        scores[f"{measure} alignment{mark}", arm].append(mean)
            if seed == 0 and domain.truth_file is not None:
                drawings["truth"] = load_picture(domain.truth_file, domain.resolution).unsqueeze(0)
                save_grid(drawings, folder / f"emoji_pairs {pair.name}.png", zoom=1)
            print(f"{pair.name}, seed {seed}: done", flush=True)
    rows = [measured(measure, arm, values) for (measure, arm), values in scores.items()]
    for measure, arm in list(scores):
        if arm in ("sum", "NLA"):
            differences = [
                gates - other
                for gates, other in zip(scores[measure, "gates"], scores[measure, arm], strict=True)
            ]
            rows.append(measured(measure, f"gates - {arm}", differences))
    if seconds:
        rows.append(measured("seconds of training", "gates", seconds))
    settings = described(CONFIG) | {
        "steps": steps,
        "loss": asdict(preset.domain.loss),
        "pictures a unit": 8,
        "quick": quick,
    }
    write_results("emoji_pairs", rows, settings=settings, seeds=seeds, folder=folder)


if __name__ == "__main__":
    main()

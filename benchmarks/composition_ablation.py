"""What the picture preset's choices are worth: one factor at a time, on development pairs alone.

    python benchmarks/composition_ablation.py [--quick] [--only NAME ...]

Every variant is the preset but for the factor that its name tells, trained on each development pair
with two seeds; measures and intervals are those of `composition.py`. A unit that is done is kept
under out/benchmarks, so that variants may run one by one, and all of them are gathered in
`results/composition_ablation_units.json`, by variant, pair and seed: what stands there is not
trained again.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from composition import NOISES, Judges, by_arm, settings_of, summary
from dreambooth.clip_task import ClipLoss
from dreambooth.data import Jitter
from dreambooth.world.candidates import write_candidates
from dreambooth.world.compositions import Composition, compositions
from emoji_pairs import CONFIG, PICTURES, WORLD, domain_of
from mole_vl.domain import prepare
from mole_vl.gates import Hidden, Responses, ScaledSoftmax
from mole_vl.specs import to_data
from mole_vl.training import fit
from presets import load, plan
from results import FOLDER, ROOT, write_results
from units import Units

UNITS = "composition_ablation_units.json"
SEEDS = (0, 1)
# One call of the network, at a time drawn by lot from the first half of 20 steps.
ONE_CALL = {"steps": 20, "first": 0.0, "last": 0.5, "through": 1}

# What each changes of the preset: of its gate, its loop, its loss, its conditioning, or its plan.
VARIANTS: dict[str, dict[str, Any]] = {
    "gates": {},
    "site network": {"site": "network"},
    "site layer": {"site": "layer"},
    "hidden, lr 3e-3": {"gate": {"score": Hidden()}, "fit": {"lr": 3e-3}},
    "responses, lr 3e-3": {"gate": {"score": Responses()}, "fit": {"lr": 3e-3}},
    "hidden, lr 3e-3, own negatives": {
        "gate": {"score": Hidden()},
        "fit": {"lr": 3e-3},
        "loss": {"negatives": "own"},
    },
    "told the time": {"conditioning": ("time",)},
    "told time and prompt, lr 0.01": {"conditioning": ("time", "prompt"), "fit": {"lr": 0.01}},
    "softmax of total 2": {"gate": {"normaliser": ScaledSoftmax()}},
    "lr 0.03": {"fit": {"lr": 0.03}},
    "120 steps": {"fit": {"steps": 120}},
    "through one call": {"loss": ONE_CALL, "fit": {"rows": 8}},
    "caption alone": {"loss": {"picture": 0.0}},
    "pictures alone": {"loss": {"text": 0.0}},
    "directional beside": {"loss": {"directional": 1.0}},
    "denoising alone": {
        "loss": {"text": 0.0, "picture": 0.0, "denoise": 1.0},
        "fit": {"rows": 16},
    },
    "one view": {"loss": {"views": 1, "jitter": Jitter()}},
}


def scores_of(
    name: str, pair: Composition, seed: int, judges: Judges, output: Path, steps: int | None
) -> dict[str, list[float]]:
    """Scores by measure of one pair's pictures by one variant's gates."""
    preset, changed = load(CONFIG), dict(VARIANTS[name])
    gate = replace(preset.gate, **changed.pop("gate", {}))
    loss: ClipLoss = replace(preset.domain.loss, **changed.pop("loss", {}))
    config = replace(preset.fit, seed=seed, output=output, progress=False)
    config = replace(config, **changed.pop("fit", {}))
    if steps is not None:
        config = replace(config, steps=steps)
    told = changed.pop("conditioning", ())
    domain = domain_of(preset, pair, drawn=1).but(loss=loss, conditioning=told)
    _, task, settings = prepare(domain, gate, config, **(plan(preset) | changed))
    fit(task, config, settings)
    return judges.scores(domain.draw(NOISES), pair, domain.caption)


def main() -> None:
    """Run the ablation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one pair, few steps, for a look")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these alone, and no table")
    options = parser.parse_args()
    write_candidates(WORLD, PICTURES)
    preset = load(CONFIG)
    judges = Judges(preset.domain.judge_name, preset.domain.clip_name)
    folder = ROOT / "out/benchmarks/composition_ablation" / ("quick" if options.quick else "full")
    settings, results = settings_of(preset), folder if options.quick else FOLDER
    kept = Units(folder / "units", results / UNITS, settings)
    pairs = compositions(WORLD, "dev")[: 1 if options.quick else None]
    units: dict[str, dict[str, dict[str, list[float]]]] = {pair.name: {} for pair in pairs}
    steps = 2 if options.quick else None
    for name in options.only or VARIANTS:
        for pair in pairs:
            found: dict[str, list[float]] = {}
            for seed in SEEDS[: 1 if options.quick else None]:
                unit = f"{name}/{pair.name}-{seed}"
                make = partial(scores_of, name, pair, seed, judges, folder / "runs" / unit, steps)
                for measure, values in kept.get(unit, make).items():
                    found.setdefault(measure, []).extend(values)
            units[pair.name][name] = found
        print(f"{name}: done", flush=True)
    kept.gather()
    if options.only:
        return
    rows = summary(None, by_arm(pairs, units)[None])
    settings["variants"] = {name: to_data(changed) for name, changed in VARIANTS.items()}
    write_results("composition_ablation", rows, settings=settings, seeds=SEEDS, folder=results)


if __name__ == "__main__":
    main()

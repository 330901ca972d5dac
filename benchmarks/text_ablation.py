"""What the text preset's choices are worth: one factor at a time, on development rows alone.

    python benchmarks/text_ablation.py [--quick]

Every variant is the preset but for the factor that its name tells, trained once (seed 0) and asked
all of `mixed_dev`; the unit is the row, differences are paired. The test rows are not read.
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from mole_vl.domain import prepare
from mole_vl.gates import Responses
from mole_vl.specs import to_data
from mole_vl.training import fit
from nlp.mixed_text import ORACLE
from presets import described, load, plan
from results import FOLDER, ROOT, measured, write_results
from text_mixed import CONFIG

DEV = ROOT / "worlds/text/data/mixed_dev.jsonl"


# What each changes of the preset: of its gate, its loop, or its plan.
VARIANTS: dict[str, dict[str, Any]] = {
    "preset": {},
    "after 6": {"after": 6},
    "after 10": {"after": 10},
    "network, after 0": {"site": "network", "after": 0},
    "network, after 4": {"site": "network", "after": 4},
    "network, after 10": {"site": "network", "after": 10},
    "not centred": {"centring": 0},
    "lr 3e-3": {"fit": {"lr": 3e-3}},
    "lr 1e-2": {"fit": {"lr": 1e-2}},
    "150 steps of 8 rows": {"fit": {"steps": 150, "rows": 8}},
    "responses": {"gate": {"score": Responses()}},
    "block": {"site": "block", "after": 0},
    "block, lr 3e-3": {"site": "block", "after": 0, "fit": {"lr": 3e-3}},
    "block, by token": {"site": "block", "after": 0, "gate": {"over": "position"}},
}


def hits_of(name: str, quick: bool) -> dict[str, np.ndarray]:
    """The development rows' hits by arm."""
    preset = load(CONFIG)
    changed = dict(VARIANTS[name])
    gate = replace(preset.gate, **changed.pop("gate", {}))
    output = ROOT / "out/benchmarks/text_ablation" / ("quick" if quick else "full")
    config = replace(preset.fit, **changed.pop("fit", {}), output=output / name.replace(" ", "_"))
    if quick:
        config = replace(config, steps=5)
    domain, chosen = preset.domain, plan(preset) | changed
    domain.test, domain.asked = DEV, 6 if quick else None
    _, task, settings = prepare(domain, gate, config, **chosen)
    fit(task, config, settings)
    arms = ["gates", "NLA", ORACLE] if name == "preset" else ["gates"]
    return {arm: np.array(found, float) for arm, found in domain.hits(arms).items()}


def main() -> None:
    """Run the ablation."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--quick", action="store_true", help="few steps and rows, for a look")
    options.add_argument("--only", nargs="+", choices=VARIANTS, help="print these; write nothing")
    given = options.parse_args()
    found: dict[str, np.ndarray] = {}
    for name in given.only or VARIANTS:
        hits = hits_of(name, given.quick)
        found |= {name if arm == "gates" else arm: values for arm, values in hits.items()}
        print(f"{name}: { ({arm: round(v.mean(), 3) for arm, v in hits.items()}) }", flush=True)
    if given.only:
        return
    rows = [measured("exact match, dev", name, values.tolist()) for name, values in found.items()]
    rows += [
        measured("exact match, dev", f"{name} - preset", (values - found["preset"]).tolist())
        for name, values in found.items()
        if name != "preset"
    ]
    folder = ROOT / "out/benchmarks" if given.quick else FOLDER
    settings = described(CONFIG) | {
        "variants": {name: to_data(changed) for name, changed in VARIANTS.items()},
        "quick": given.quick,
    }
    write_results("text_ablation", rows, settings=settings, seeds=[0], folder=folder)


if __name__ == "__main__":
    main()

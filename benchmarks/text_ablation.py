"""What the text preset's choices are worth: one factor at a time, on development rows alone.

    python benchmarks/text_ablation.py [--quick]

Every variant is the preset but for the factor that its name tells, trained once (seed 0) and asked
all of `mixed_dev`; the unit is the row, differences are paired. The test rows are not read.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from text_mixed import CONFIG, load

from mole_vl.gates import MoLE, Responses
from mole_vl.specs import to_data
from mole_vl.training import centre_gates, fit
from nlp.mixed_text import ORACLE
from results import FOLDER, ROOT, measured, write_results

DEV = ROOT / "worlds/text/data/mixed_dev.jsonl"


@dataclass(frozen=True)
class Variant:
    """What one variant changes of the preset's gate, placement and training."""

    gate: Mapping[str, Any]
    place: Mapping[str, Any]
    fit: Mapping[str, Any]
    centring: int | None


def variant(
    *,
    gate: Mapping[str, Any] | None = None,
    place: Mapping[str, Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    centring: int | None = None,
) -> Variant:
    """The preset with some settings changed."""
    return Variant(gate or {}, place or {}, fit or {}, centring)


VARIANTS = {
    "preset": variant(),
    "after 0": variant(place={"after": 0}),
    "after 10": variant(place={"after": 10}),
    "not centred": variant(centring=0),
    "not centred, lr 1e-2": variant(centring=0, fit={"lr": 1e-2}),
    "lr 1e-2": variant(fit={"lr": 1e-2}),
    "150 steps of 8 rows": variant(fit={"steps": 150, "rows": 8}),
    "responses": variant(gate={"score": Responses()}),
    "block": variant(place={"site": "block", "after": 0}),
    "block, by token": variant(gate={"over": "position"}, place={"site": "block", "after": 0}),
}


def hits_of(name: str, changed: Variant, quick: bool) -> dict[str, np.ndarray]:
    """The development rows' hits by arm."""
    preset = load()
    domain = preset.domain
    domain.test, domain.asked = DEV, 6 if quick else None
    gate: MoLE = replace(preset.gate, **changed.gate)
    place = {"site": preset.site, "after": preset.after, **changed.place}
    mixture = domain.mix(gate, **place)["model"]
    output = ROOT / "out/benchmarks/text_ablation" / ("quick" if quick else "full")
    config = replace(preset.fit, **changed.fit, output=output / name.replace(" ", "_"))
    if quick:
        config = replace(config, steps=5)
    task = domain.task(preset.balance)
    batches = changed.centring if changed.centring is not None else preset.centring
    centre_gates([mixture], task, rows=config.rows, batches=batches, seed=config.seed)
    fit(task, config, {"gate": to_data(gate), **place, "centring": batches})
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
        hits = hits_of(name, VARIANTS[name], given.quick)
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
    settings = {
        "config": CONFIG.name,
        "variants": {name: str(changed) for name, changed in VARIANTS.items()},
        "quick": given.quick,
    }
    write_results("text_ablation", rows, settings=settings, seeds=[0], folder=folder)


if __name__ == "__main__":
    main()

"""The presets of `configs`, as benchmarks train them."""

from pathlib import Path
from typing import Any

from jsonargparse import auto_parser

from mole_vl.specs import to_data
from train_gates import train_gates


def load(config: Path) -> Any:
    """A preset, its domain built anew."""
    parser = auto_parser(train_gates, as_positional=False)
    return parser.instantiate(parser.parse_args(["--config", str(config)]))


def plan(preset: Any) -> dict[str, Any]:
    """What a preset tells `prepare` beside domain, gate and loop."""
    return {name: preset[name] for name in ("site", "after", "balance", "centring", "alone")}


def described(config: Path) -> dict[str, Any]:
    """A preset as the settings of a benchmark's results."""
    preset = load(config)
    return {
        "config": config.name,
        "gate": to_data(preset.gate),
        **plan(preset),
        "steps": preset.fit.steps,
        "rows a step": preset.fit.rows,
        "lr": preset.fit.lr,
    }

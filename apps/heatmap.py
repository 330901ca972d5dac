"""The gates' weights by block and step, one map for each expert."""

import re
from collections.abc import Mapping

from mole_vl.heat_map import heat_map
from pipelines import WeightMap

# A UNet registers its middle last, and runs it before its upper half.
_RUN = {"down": 0, "mid": 1, "up": 2}


def heat_maps(maps: Mapping[str, WeightMap]) -> str:
    """Part of a page: the maps of all components that ran; empty if none did."""
    return "".join(_component(name, one) for name, one in maps.items() if one.weights.numel())


def short_name(site: str) -> str:
    """A site's name for people: "down 1.0" is the first transformer block of down_blocks.1."""
    half = re.match(r"(down|mid|up)_block", site)
    numbers = re.sub(r"transformer_blocks\.0$", "", site)
    found = re.findall(r"\d+", numbers)
    if half is None:
        return f"layer {found[-1]}" if found else site
    return f"{half[1]} {'.'.join(found)}" if half[1] != "mid" else "mid"


def _component(component: str, one: WeightMap) -> str:
    rows = sorted(range(len(one.sites)), key=lambda row: _order(one.sites[row]))
    return heat_map(
        [short_name(one.sites[row]) for row in rows],
        {name: one.weights[rows, :, place].tolist() for place, name in enumerate(one.experts)},
        axis="steps, first to last" if component == "unet" else "prompts",
        label=f"weights of {', '.join(one.experts)} in the {component} by block and step",
    )


def _order(site: str) -> int:
    return _RUN.get(site.partition("_")[0], 0)

"""Write `docs/composition.md`, the card of the text-to-image benchmarks, from their results.

    python benchmarks/card.py    # fills in benchmarks/card.md

Every number on the card stands in `benchmarks/results`; this program measures nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dreambooth.world.world import World
from results import FOLDER, ROOT

CARD = ROOT / "docs/composition.md"
JUDGE, NET, TRAINED = "judge-CLIP", "EfficientNet-Lite0", "loss-CLIP, trained on"
IMAGE, RANK = "image alignment, ", "rank of the truth, "
TEXT = "text alignment, judge-CLIP"
WORLD = ROOT / "worlds/emoji"
STYLES = ("", " in contrast", " in twemoji")


class Results:
    """One benchmark's rows by measure and arm.

    Args:
        name: Of its file.
    """

    def __init__(self, name: str) -> None:
        content = json.loads((FOLDER / f"{name}.json").read_text())
        self.settings: dict[str, Any] = content["settings"]
        self.commit: str = content["commit"]
        self.rows = {(row["measure"], row["arm"]): row for row in content["rows"]}

    def arms(self, measure: str) -> list[str]:
        """The arms of a measure, differences left out."""
        return [arm for m, arm in self.rows if m == measure and " - " not in arm]

    def cell(self, measure: str, arm: str, digits: int = 3) -> str:
        """A mean and its interval."""
        row = self.rows[measure, arm]
        low, high = row["low"], row["high"]
        return f"{row['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    def mean(self, measure: str, arm: str) -> float:
        """A mean."""
        return self.rows[measure, arm]["mean"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def split_table(found: Results, styles: Sequence[str]) -> str:
    """Every arm of a split, by its image alignment, the best first."""
    arms = sorted(
        found.arms(IMAGE + JUDGE), key=lambda arm: -found.mean(IMAGE + JUDGE + styles[0], arm)
    )
    heads = ["", *(f"image, {JUDGE}{style}" for style in styles)]
    heads += [f"image, {NET}", "rank of the truth", "text", "image, loss-CLIP (trained on)"]
    rows = []
    for arm in arms:
        cells = [found.cell(IMAGE + JUDGE + style, arm) for style in styles]
        cells += [found.cell(IMAGE + NET, arm), f"{found.mean(RANK + JUDGE, arm):.0f}"]
        cells += [found.cell(TEXT, arm), f"{found.mean(IMAGE + TRAINED, arm):.3f}"]
        rows.append([f"**{arm}**" if "gates" in arm else arm, *cells])
    return table(heads, rows)


def differences(found: Results, styles: Sequence[str]) -> str:
    """The paired differences of image alignment from the gates."""
    arms = [arm for arm in found.arms(IMAGE + JUDGE) if arm != "gates"]
    pairs = [*(f"gates - {arm}" for arm in arms), "slot gates - NLA"]
    measures = [IMAGE + eye + style for eye in (JUDGE, NET) for style in styles]
    heads = ["", *(measure.removeprefix("image alignment, ") for measure in measures), "text"]
    rows = [
        [pair, *(found.cell(measure, pair) for measure in measures), found.cell(TEXT, pair)]
        for pair in pairs
    ]
    return table(heads, rows)


def ablation() -> str:
    """The variants of the preset, and what each loses."""
    found = Results("composition_ablation")
    rows = []
    for arm in found.arms(IMAGE + JUDGE):
        cells = [found.cell(measure, arm) for measure in (IMAGE + JUDGE, IMAGE + NET, TEXT)]
        lost = "" if arm == "gates" else found.cell(IMAGE + JUDGE, f"gates - {arm}")
        rows.append(["the preset" if arm == "gates" else arm, *cells, lost])
    heads = ["", f"image, {JUDGE}", f"image, {NET}", "text", f"the preset - this, {JUDGE}"]
    return table(heads, rows)


def styles() -> str:
    """What each style's LoRA conveys."""
    found = Results("emoji_styles")
    rows = []
    for style in ("retro", "contrast", "twemoji"):
        cells = []
        for eye in (JUDGE, NET):
            measure = f"{IMAGE}{eye} in {style}"
            (gain,) = (arm for m, arm in found.rows if m == measure and " - " in arm)
            nearest = gain.removeprefix("its LoRA - ")
            cells += [
                f"{found.mean(measure, 'its LoRA'):.3f}",
                f"{found.mean(measure, nearest):.3f} ({nearest})",
                found.cell(measure, gain),
            ]
        rows.append([style, *cells])
    heads = [""]
    for eye in (JUDGE, NET):
        heads += [f"its LoRA, {eye}", "the base's nearest style", "difference"]
    return table(heads, rows)


def authors() -> str:
    """Time to the same score with the authors' loss, of samplers of 20 and of 50 steps."""
    short, long = Results("authors_loss"), Results("authors_loss_50")
    heads = ["", "", "20 steps of the sampler", "50 steps"]
    rows = [
        [measure, arm, short.cell(measure, arm, 2), long.cell(measure, arm, 2)]
        for measure, arm in short.rows
        if "CPU" in measure or "second" not in measure
    ]
    return table(heads, rows)


def card() -> str:
    """The whole card."""
    test, dev = Results("composition_test"), Results("composition_dev")
    said: Mapping[str, Callable[[], str]] = {
        "{TEST}": lambda: split_table(test, STYLES),
        "{DIFFERENCES}": lambda: differences(test, STYLES),
        "{DEV}": lambda: split_table(dev, STYLES[:1]),
        "{ABLATION}": ablation,
        "{STYLES}": styles,
        "{AUTHORS}": authors,
        "{PICTURES}": lambda: f"{len(World.load(WORLD).pairs()):,}",
        "{STRENGTHS}": lambda: ", ".join(
            f"{merge} {strength}" for merge, strength in test.settings["strengths"].items()
        ),
    }
    text = (ROOT / "benchmarks/card.md").read_text()
    for mark, write in said.items():
        text = text.replace(mark, write())
    return text


if __name__ == "__main__":
    CARD.write_text(card())
    print(CARD.relative_to(ROOT))

"""Gates over slots ("subject", "style"), trained on several pairs of LoRAs at once.

Their file names slots: mixed with other LoRAs under the slots' names, they serve pairs that they
never saw.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from dreambooth.adapter import blocks
from dreambooth.clip_task import ClipLoss, ClipTask
from dreambooth.conditioning import Told, unet_features
from dreambooth.grid import save_grid
from dreambooth.subject_style import SubjectStyle, check_site
from mole_vl import Mixture, mix
from mole_vl.domain import Domain, gate_parameters
from mole_vl.faults import refuse
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind
from mole_vl.training import Task


@dataclass(frozen=True, kw_only=True)
class Pair:
    """LoRAs that are drawn together.

    Args:
        experts: The LoRA's folder in each slot, by the slot's name.
        prompt: What the base is told, with the LoRAs' trigger words.
        caption: The same in words that CLIP knows.
        truth: A picture of what the prompt should look like, for the report alone.
    """

    experts: dict[str, Path]
    prompt: str
    caption: str
    truth: Path | None = None


class Pairs(Domain):
    """LoRAs over a Stable Diffusion base; gates learn what each slot is good for, over all pairs.

    Args:
        base: Stable Diffusion in diffusers' format: a folder, or a Hub id.
        pairs: The pairs, all with the same slots; a LoRA may be in several pairs, in one slot.
        pictures: Folder of each LoRA's own pictures, by the LoRA's name.
        ordinary: Folder of pictures of nothing in particular.
        clip: The CLIP that trains, as open_clip names it.
        negative: Negative prompt.
        resolution: Side of the pictures.
        loss: How pictures are drawn and judged in training.
        judge: Another CLIP for the report; the one that trains if not given.
        drawn: Pictures of each pair and arm in the report.
        steps: Sampler steps of the report's pictures; those of the loss if not given.
        conditioning: What the UNet is told and its gates read too: `time`, `prompt`, or both.
    """

    def __init__(
        self,
        base: str,
        pairs: list[Pair],
        pictures: dict[str, Path],
        ordinary: Path,
        clip: str,
        negative: str = "",
        resolution: int = 512,
        loss: ClipLoss = ClipLoss(),  # noqa: B008 (frozen)
        judge: str | None = None,
        drawn: int = 4,
        steps: int | None = None,
        conditioning: Sequence[Told] = (),
    ) -> None:
        slots = [tuple(pair.experts) for pair in pairs]
        named = {Path(folder).name for pair in pairs for folder in pair.experts.values()}
        lacking = sorted(named - set(pictures))
        refuse(
            "Pairs",
            [
                None if pairs else "pairs is empty, expected at least one",
                *(
                    f"{pair.caption!r} has the slots {', '.join(own)}, expected "
                    f"{', '.join(slots[0])} as the first pair has, in its order"
                    for pair, own in zip(pairs, slots, strict=True)
                    if own != slots[0]
                ),
                f"pictures has no folder for {', '.join(lacking)}" if lacking else None,
            ],
        )
        self.slots = slots[0]
        self.parts = [
            SubjectStyle(
                base=base,
                experts=list(pair.experts.values()),
                prompt=pair.prompt,
                caption=pair.caption,
                pictures={f.name: pictures[f.name] for f in map(Path, pair.experts.values())},
                ordinary=ordinary,
                clip=clip,
                negative=negative,
                resolution=resolution,
                loss=loss,
                judge=judge,
                truth=pair.truth,
                drawn=drawn,
                steps=steps,
                conditioning=conditioning,
            )
            for pair in pairs
        ]

    def mix(self, gate: GateSpec, site: SiteKind, after: int = 0) -> Mapping[str, Mixture]:
        """Load base, experts, pictures and CLIP, and mix the UNet with the LoRAs of all pairs."""
        check_site(site)
        first = self.parts[0]
        first.load()
        for part in self.parts[1:]:
            part.load(first)
        experts = {expert.name: expert for part in self.parts for expert in part.experts}
        names = list(experts)
        unet = first.base.unet
        self.mixture = mix(
            unet,
            list(experts.values()),
            gate=gate,
            site=site,
            after=after,
            blocks=blocks(unet),
            slots={
                slot: list(dict.fromkeys(part.experts[place].name for part in self.parts))
                for place, slot in enumerate(self.slots)
            },
            features=unet_features(unet, first.conditioning, first.base.noising.steps),
        )
        for part in self.parts:
            part.mixture = self.mixture
            part.filled = tuple(names.index(expert.name) for expert in part.experts)
        return {"unet": self.mixture}

    def lesson(self) -> dict[str, object]:
        """What each pair's lesson is, and who plays which part."""
        return {"slots": list(self.slots), "pairs": [part.lesson() for part in self.parts]}

    def task(self, balance: float) -> Task:
        """The CLIP loss on pictures of all pairs, row by row."""
        first = self.parts[0]
        return ClipTask(
            first.base,
            self.mixture,
            [part.scene() for part in self.parts],
            first.resolution,
            first.clip,
            first.loss,
            parameters=gate_parameters({"unet": self.mixture}),
            balance_weight=balance,
        )

    def report(self, folder: Path) -> str:
        """Draws every pair by base, sum, average and gates; leaves `scores.json` and a grid each.

        Returns:
            The mean scores by pair and arm, and over all pairs.
        """
        if not PartialState().is_main_process:
            return ""
        found: dict[str, dict[str, dict[str, list[float]]]] = {}
        judge = self.parts[0].judge.to(self.parts[0].base.unet.device)
        for part in self.parts:
            drawings = self._drawings(part)
            found[part.caption] = part.scores(judge, drawings)
            save_grid(drawings, folder / f"{part.caption}.png", zoom=max(1, 128 // part.resolution))
        (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
        return table(found)

    def _drawings(self, part: SubjectStyle) -> dict[str, Tensor]:
        names = [expert.name for expert in part.experts]
        contexts: dict[str, AbstractContextManager[object]] = {
            "base": self.mixture.disabled(),
            "sum": self.mixture.pinned(dict.fromkeys(names, 1.0)),
            "NLA": self.mixture.pinned(dict.fromkeys(names, 1 / len(names))),
            "gates": nullcontext(),
        }
        found = {}
        for arm, context in contexts.items():
            with context:
                found[arm] = part.draw(part.drawn)
        return found


def table(found: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> str:
    """Mean scores by pair, measure and arm, in Markdown."""
    arms = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for pair, scores in found.items():
        for measure in scores[arms[0]]:
            cells = [sum(scores[arm][measure]) / len(scores[arm][measure]) for arm in arms]
            lines.append(f"| {pair}: {measure} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)

"""Gates over slots ("subject", "style"), trained on several pairs of LoRAs at once.

Their file names slots: mixed with other LoRAs under the slots' names, they serve pairs that they
never saw.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from torch import Tensor

from dreambooth.clip_task import ClipLoss, ClipTask
from dreambooth.conditioning import Told
from dreambooth.grid import save_grid
from dreambooth.mixing import TEXT, UNET, mix_parts, mute_notice
from dreambooth.notices import tell
from dreambooth.reporting import table_of_pairs
from dreambooth.subject_style import SubjectStyle, check_site
from mole_vl import Mixture
from mole_vl.arms import Arm, pinned_arm, together
from mole_vl.domain import Domain, gate_parameters
from mole_vl.faults import refuse, some
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind
from mole_vl.training import Task

T = TypeVar("T")

# The report names a file by each caption; file systems take 255 bytes.
_LONGEST = 250


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
        words: What each LoRA's own pictures show, by the LoRA's name; for the directional term.
        judge: Another CLIP for the report; the one that trains if not given.
        drawn: Pictures of each pair and arm in the report.
        steps: Sampler steps of the report's pictures; those of the loss if not given.
        text_encoder: Whether the LoRAs' parts of the text encoder are mixed too, with gates of
            their own; of a slot, all LoRAs have that part or none.
        conditioning: What the UNet is told and its gates read too: `time`, `prompt`, or both.
        checkpointing: Whether activations are computed again in the backward pass.
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
        words: dict[str, str] | None = None,
        judge: str | None = None,
        drawn: int = 4,
        steps: int | None = None,
        text_encoder: bool = False,
        conditioning: Sequence[Told] = (),
        checkpointing: bool = False,
    ) -> None:
        slots = [tuple(pair.experts) for pair in pairs]
        named = _named(pairs)
        lacking = sorted(named.keys() - pictures.keys())
        unsaid = [] if words is None else sorted(named.keys() - words.keys())
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
                *_caption_faults([pair.caption for pair in pairs]),
                *(
                    f"{name} stands for {' and '.join(map(str, folders))}, expected one LoRA of "
                    "a name: rename a folder"
                    for name, folders in named.items()
                    if len({folder.resolve() for folder in folders}) > 1
                ),
                f"pictures has no folder for {', '.join(lacking)}" if lacking else None,
                f"words does not say what {', '.join(unsaid)} shows" if unsaid else None,
            ],
        )
        self.slots = slots[0]
        self.parts = [
            SubjectStyle(
                base=base,
                experts=list(pair.experts.values()),
                prompt=pair.prompt,
                caption=pair.caption,
                pictures=_of(pair, pictures),
                ordinary=ordinary,
                clip=clip,
                negative=negative,
                resolution=resolution,
                loss=loss,
                words=None if words is None else _of(pair, words),
                judge=judge,
                truth=pair.truth,
                drawn=drawn,
                steps=steps,
                text_encoder=text_encoder,
                conditioning=conditioning,
                checkpointing=checkpointing,
            )
            for pair in pairs
        ]

    def mix(self, gate: GateSpec, site: SiteKind, after: int = 0) -> Mapping[str, Mixture]:
        """Load base, experts, pictures and CLIP, and mix the LoRAs of all pairs."""
        check_site(site)
        first = self.parts[0]
        first.load()
        for part in self.parts[1:]:
            part.load(first)
        tell(mute_notice(name for part in self.parts for name in part.mute))
        experts = {expert.name: expert for part in self.parts for expert in part.experts}
        slots = {
            slot: list(dict.fromkeys(part.experts[place].name for part in self.parts))
            for place, slot in enumerate(self.slots)
        }
        found, roles = {UNET: list(experts.values())}, {UNET: slots}
        texts = {expert.name: expert for part in self.parts for expert in part.text_experts}
        speaking = _speaking(slots, texts)
        if speaking:
            found[TEXT], roles[TEXT] = list(texts.values()), speaking
        mixtures = mix_parts(first.base, found, gate, site, after, first.conditioning, roles)
        self.mixture, self.text = mixtures[UNET], mixtures.get(TEXT)
        for part in self.parts:
            part.mixture, part.text = self.mixture, self.text
            names = [expert.name for expert in part.experts]
            part.filled = _places(names, self.mixture)
            if self.text is not None:
                part.text_filled = _places([n for n in names if n in texts], self.text)
        return mixtures

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
            parameters=gate_parameters(first.mixtures),
            balance_weight=balance,
            text=self.text,
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
        return table_of_pairs(found)

    def _drawings(self, part: SubjectStyle) -> dict[str, Tensor]:
        names = [expert.name for expert in part.experts]
        mixtures = list(part.mixtures.values())
        arms: dict[str, Arm] = {
            "base": lambda: together([mixture.disabled() for mixture in mixtures]),
            "sum": pinned_arm(mixtures, dict.fromkeys(names, 1.0)),
            "NLA": pinned_arm(mixtures, dict.fromkeys(names, 1 / len(names))),
            "gates": nullcontext,
        }
        found = {}
        for name, arm in arms.items():
            with arm():
                found[name] = part.draw(part.drawn)
        return found


def _named(pairs: Sequence[Pair]) -> dict[str, list[Path]]:
    """The folders of each LoRA's name."""
    found: dict[str, list[Path]] = {}
    for folder in dict.fromkeys(Path(folder) for p in pairs for folder in p.experts.values()):
        found.setdefault(folder.name, []).append(folder)
    return found


def _caption_faults(captions: Sequence[str]) -> list[str]:
    """Captions that the report could not tell apart, or name a picture by."""
    return [
        *(
            f"{n} pairs have the caption {caption!r}, expected each its own"
            for caption, n in Counter(captions).items()
            if n > 1
        ),
        *(
            f"the caption {caption!r} cannot name the report's picture: expected words without "
            f"slashes, of at most {_LONGEST} bytes"
            for caption in captions
            if not caption.strip() or "/" in caption or len(caption.encode()) > _LONGEST
        ),
    ]


def _of(pair: Pair, given: Mapping[str, T]) -> dict[str, T]:
    """What is given for the LoRAs of one pair, by their names."""
    names = [Path(folder).name for folder in pair.experts.values()]
    return {name: given[name] for name in names}


def _speaking(slots: Mapping[str, list[str]], texts: Collection[str]) -> dict[str, list[str]]:
    """The slots whose LoRAs have a part of the text encoder.

    Raises:
        ValueError: Some LoRAs of a slot have it, and others lack it.
    """
    lacking = {slot: [name for name in names if name not in texts] for slot, names in slots.items()}
    refuse(
        "text_encoder",
        [
            f"in the slot {slot!r}, {some(lacking[slot])} has no part of the text encoder, and "
            "others have: expected it of all its LoRAs, or of none"
            for slot, names in slots.items()
            if texts and 0 < len(lacking[slot]) < len(names)
        ],
    )
    return {slot: names for slot, names in slots.items() if not lacking[slot]}


def _places(names: Sequence[str], mixture: Mixture) -> tuple[int, ...]:
    return tuple(mixture.names.index(name) for name in names)

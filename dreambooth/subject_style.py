"""Gates over DreamBooth LoRAs for one prompt: a subject's and a style's, say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from dreambooth.adapter import fitted_to
from dreambooth.base import Base
from dreambooth.clip import Clip
from dreambooth.clip_task import DRAWN, ClipLoss, ClipTask, Scene
from dreambooth.conditioning import Told, told_faults
from dreambooth.data import check_picture, load_picture, picture_files
from dreambooth.drawing import draw_encoded
from dreambooth.goals import Goals, composed
from dreambooth.grid import save_grid
from dreambooth.mixing import TEXT, UNET, check_text, mix_parts, mute_notice, read_parts
from dreambooth.notices import tell
from dreambooth.prompts import Prompts
from dreambooth.reporting import alignments, table_of_arms
from dreambooth.text_gates import Unencoded, encode_gated
from mole_vl import Expert, Mixture
from mole_vl.arms import arms
from mole_vl.domain import Domain, gate_parameters
from mole_vl.experts import check_names
from mole_vl.faults import at_least, refuse
from mole_vl.files import digest
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind
from mole_vl.training import Task, mix_seed

_DRAWN_AT_ONCE = 8


class SubjectStyle(Domain):
    """LoRAs over a Stable Diffusion base; gates learn to draw one prompt from what CLIP sees.

    Args:
        base: Stable Diffusion in diffusers' format: a folder, or a Hub id.
        experts: LoRA folders, each with a `unet` folder in PEFT's format, and one `text_encoder`
            if it has that part.
        prompt: What the base is told, with the LoRAs' trigger words.
        caption: The same in words that CLIP knows.
        pictures: Folder of each expert's own pictures, by the expert's name.
        ordinary: Folder of pictures of nothing in particular (DreamBooth's class pictures): what
            the experts' pictures differ from.
        clip: The CLIP that trains, as open_clip names it (`local-dir:FOLDER`, `hf-hub:ORG/REPO`).
        negative: Negative prompt.
        resolution: Side of the pictures.
        loss: How pictures are drawn and judged in training.
        words: What each expert's own pictures show, in words that CLIP knows, by the expert's name;
            for the directional term alone.
        judge: Another CLIP for the report; the one that trains if not given.
        truth: A picture of what the prompt should look like, for the report alone.
        drawn: Pictures of each arm in the report.
        steps: Sampler steps of the report's pictures; those of the loss if not given.
        text_encoder: Whether the LoRAs' parts of the text encoder are mixed too, with gates of
            their own (Stable Diffusion 1.x, 2.x).
        conditioning: What the UNet is told and its gates read too: `time`, `prompt`, or both.
        checkpointing: Whether the UNet's and the VAE's activations are computed again in the
            backward pass: less memory, more time, the same numbers.
    """

    def __init__(
        self,
        base: str,
        experts: list[Path],
        prompt: str,
        caption: str,
        pictures: dict[str, Path],
        ordinary: Path,
        clip: str,
        negative: str = "",
        resolution: int = 512,
        loss: ClipLoss = ClipLoss(),  # noqa: B008 (frozen)
        words: dict[str, str] | None = None,
        judge: str | None = None,
        truth: Path | None = None,
        drawn: int = 4,
        steps: int | None = None,
        text_encoder: bool = False,
        conditioning: Sequence[Told] = (),
        checkpointing: bool = False,
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name != "self"}
        refuse(
            "SubjectStyle",
            [
                None if caption.strip() else "caption is empty, expected words that CLIP knows",
                _words_fault(loss, words, pictures),
                at_least("resolution", resolution, 1),
                at_least("drawn", drawn, 1),
                at_least("steps", steps, 1),
                *told_faults(conditioning),
            ],
        )
        self.base_name = base
        self.expert_folders = experts
        self.prompt = prompt
        self.caption = caption
        self.picture_folders = pictures
        self.ordinary_folder = ordinary
        self.clip_name = clip
        self.negative = negative
        self.resolution = resolution
        self.loss = loss
        self.words = words
        self.judge_name = judge or clip
        self.truth_file = truth
        self.drawn = drawn
        self.steps = steps or loss.steps
        self.text_encoder = text_encoder
        self.conditioning = tuple(conditioning)
        self.checkpointing = checkpointing
        self.text: Mixture | None = None
        # Places of the experts in the slots of mixtures that are shared with other prompts.
        self.filled: tuple[int, ...] | None = None
        self.text_filled: tuple[int, ...] | None = None

    def but(self, **settings: Any) -> "SubjectStyle":
        """The same, not loaded, with some of the constructor's settings replaced."""
        return SubjectStyle(**{**self._given, **settings})

    def mix(self, gate: GateSpec, site: SiteKind, after: int = 0) -> Mapping[str, Mixture]:
        """Load base, experts, pictures and CLIP, and mix the UNet, and the text encoder."""
        check_site(site)
        self.load()
        tell(mute_notice(self.mute))
        experts = {UNET: self.experts}
        if self.text_encoder:
            experts[TEXT] = self.text_experts
        mixtures = mix_parts(self.base, experts, gate, site, after, self.conditioning)
        self.mixture, self.text = mixtures[UNET], mixtures.get(TEXT)
        return mixtures

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures by component."""
        return {UNET: self.mixture} | ({} if self.text is None else {TEXT: self.text})

    def load(self, other: "SubjectStyle | None" = None) -> None:
        """Load all that `mix` needs.

        Args:
            other: One that is loaded, with the same base, CLIPs and ordinary pictures, to share
                them.
        """
        loras = [read_parts(folder) for folder in self.expert_folders]
        experts = [parts[UNET] for parts in loras]
        check_names(experts)
        names = {expert.name for expert in experts}
        if set(self.picture_folders) != names:
            raise ValueError(
                f"pictures are given for {', '.join(sorted(self.picture_folders))}; the experts "
                f"are {', '.join(sorted(names))}: expected a folder for each"
            )
        if self.truth_file is not None:
            check_picture("truth", self.truth_file)
        self.files = {name: picture_files(folder) for name, folder in self.picture_folders.items()}
        self.ordinary_files = picture_files(self.ordinary_folder)
        if other is None:
            self.base, self.clip = Base.load(self.base_name), Clip(self.clip_name)
            # The report's judge is found now, not after the training.
            self.judge = self.clip if self.judge_name == self.clip_name else Clip(self.judge_name)
        else:
            self.base, self.clip, self.judge = other.base, other.clip, other.judge
        self.base.check_resolution(self.resolution)
        if self.checkpointing:
            self.base.checkpoint_pictures()
        self._take_text(loras)
        self.ordinary = self._loaded(self.ordinary_files) if other is None else other.ordinary
        self.experts = experts
        self.pictures = {name: self._loaded(files) for name, files in self.files.items()}
        with torch.no_grad():
            self._states = self.base.encode_prompts([self.negative, self.prompt])

    def _take_text(self, loras: Sequence[Mapping[str, Expert]]) -> None:
        """Take the LoRAs' parts of the text encoder, or note whose stay mute."""
        encoder = self.base.text_encoder
        self.text_experts: list[Expert] = []
        self.mute: list[str] = []
        if self.text_encoder:
            check_text(loras, self.base)
            self.text_experts = [
                fitted_to(parts[TEXT], encoder) for parts in loras if TEXT in parts
            ]
        else:
            encoders = self.base.text_encoders.keys()
            self.mute = [parts[UNET].name for parts in loras if encoders & parts]

    def lesson(self) -> dict[str, object]:
        """The base, its prompts, the pictures and how they are judged."""
        return {
            "base": self.base_name,
            "prompts": [self.prompt, self.negative, self.caption],
            "pictures": {name: digest(files) for name, files in self.files.items()},
            "ordinary": digest(self.ordinary_files),
            "clip": self.clip_name,
            "resolution": self.resolution,
            "loss": asdict(self.loss),
            "words": self.words,
        }

    def _loaded(self, files: Sequence[Path]) -> Tensor:
        return torch.stack([load_picture(file, self.resolution) for file in files])

    @torch.no_grad()
    def goals(self, clip: Clip) -> Goals:
        """Where a CLIP should see the pictures."""
        centre = clip.pictures(self.ordinary).mean(0)
        own = torch.stack([clip.pictures(pictures).mean(0) for pictures in self.pictures.values()])
        caption = clip.captions([self.caption])[0]
        words = caption.new_empty(0, len(caption))
        if self.words is not None:
            words = clip.captions([self.words[name] for name in self.pictures])
        return Goals(caption, centre, composed(centre, own), own, words)

    @property
    def unencoded(self) -> Unencoded:
        """The prompts for a text encoder that is mixed."""
        return Unencoded(self.negative, self.prompt, self.text_filled)

    @property
    @torch.no_grad()
    def states(self) -> Prompts:
        """The encoded negative and positive prompt, under the contexts in force."""
        if self.text is None:
            return self._states
        return encode_gated(self.base, self.text, [self.unencoded])

    def scene(self) -> Scene:
        """The prompt and its goals, as the CLIP that trains sees them."""
        states = self._states if self.text is None else self.unencoded
        shown = torch.cat(list(self.pictures.values()))
        return Scene(states, self.goals(self.clip), shown, self.filled)

    def task(self, balance: float) -> Task:
        """The CLIP loss on predicted clean pictures."""
        return ClipTask(
            self.base,
            self.mixture,
            [self.scene()],
            self.resolution,
            self.clip,
            self.loss,
            parameters=gate_parameters(self.mixtures),
            balance_weight=balance,
            text=self.text,
        )

    @torch.no_grad()
    def draw(self, pictures: int, seed: int = 0) -> Tensor:
        """Pictures (n, 3, h, w) in [-1, 1] of the prompt under the contexts in force.

        Picture i starts from the noise of (seed, i), whatever the arm and the number drawn; no
        step of a training starts from it.
        """
        device, states = self.base.unet.device, self.states
        found = []
        for start in range(0, pictures, _DRAWN_AT_ONCE):
            rows = range(start, min(pictures, start + _DRAWN_AT_ONCE))
            source = self.loss.source(len(rows), device)
            filled = None
            if self.filled is not None:
                filled = torch.tensor([self.filled] * (2 * len(rows)))
            with self.mixture.condition(source=source, filled=filled):
                drawn = draw_encoded(
                    self.base,
                    states.repeat_interleave(len(rows)),
                    [mix_seed(seed, row, 0, DRAWN) for row in rows],
                    self.resolution,
                    self.steps,
                    self.loss.guidance,
                )
            found.append(drawn)
        return torch.cat(found)

    def drawings(self, seed: int = 0) -> dict[str, Tensor]:
        """The report's pictures by arm, all from the same noise."""
        found = {}
        for name, arm in arms(list(self.mixtures.values())).items():
            with arm():
                found[name] = self.draw(self.drawn, seed)
        return found

    def scores(
        self, clip: Clip, drawings: Mapping[str, Tensor]
    ) -> dict[str, dict[str, list[float]]]:
        """Alignment of every drawing by arm, as one CLIP sees it (`dreambooth.reporting`)."""
        return alignments(clip, drawings, self.goals(clip), self._truth())

    def _truth(self) -> Tensor | None:
        return None if self.truth_file is None else load_picture(self.truth_file, self.resolution)

    def report(self, folder: Path) -> str:
        """Draws every arm; leaves `grid.png` and `scores.json`, returns the mean scores."""
        if not PartialState().is_main_process:
            return ""
        drawings = self.drawings()
        device = self.base.unet.device
        found = self.scores(self.judge.to(device), drawings)
        (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
        truth = self._truth()
        if truth is not None:
            drawings["truth"] = truth.unsqueeze(0)
        save_grid(drawings, folder / "grid.png", zoom=max(1, 128 // self.resolution))
        return table_of_arms(self.caption, found)


def check_site(site: SiteKind) -> None:
    """Raise ValueError at a site that cannot serve a network which is called step by step."""
    if site == "preview":
        raise ValueError(
            "site 'preview' holds one reading of a row for all that follows, and a UNet's "
            "input changes at every step: use site 'network', or 'block'"
        )


def _words_fault(
    loss: ClipLoss, words: Mapping[str, str] | None, pictures: Mapping[str, Path]
) -> str | None:
    if words is None:
        needed = "what each expert's pictures show, for the directional term"
        return f"words is not given, expected {needed}" if loss.directional else None
    if set(words) == set(pictures):
        return None
    return (
        f"words is given for {', '.join(sorted(words))}, expected the names that pictures has: "
        f"{', '.join(sorted(pictures))}"
    )

"""Gates over DreamBooth LoRAs for one prompt: a subject's and a style's, say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from dreambooth.adapter import blocks, positive_rows
from dreambooth.base import Base
from dreambooth.clip import Clip, composed
from dreambooth.clip_task import DRAWN, ClipLoss, ClipTask, Goals, Scene
from dreambooth.conditioning import Told, told_faults, unet_features
from dreambooth.data import check_picture, load_picture, picture_files
from dreambooth.grid import save_grid
from dreambooth.sampling import sample, schedule
from mole_vl import Mixture, mix, read_components
from mole_vl.arms import arms
from mole_vl.domain import Domain, gate_parameters
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
        experts: LoRA folders, each with a `unet` folder in PEFT's format.
        prompt: What the base is told, with the LoRAs' trigger words.
        caption: The same in words that CLIP knows.
        pictures: Folder of each expert's own pictures, by the expert's name.
        ordinary: Folder of pictures of nothing in particular (DreamBooth's class pictures): what
            the experts' pictures differ from.
        clip: The CLIP that trains, as open_clip names it (`local-dir:FOLDER`, `hf-hub:ORG/REPO`).
        negative: Negative prompt.
        resolution: Side of the pictures.
        loss: How pictures are drawn and judged in training.
        judge: Another CLIP for the report; the one that trains if not given.
        truth: A picture of what the prompt should look like, for the report alone.
        drawn: Pictures of each arm in the report.
        steps: Sampler steps of the report's pictures; those of the loss if not given.
        conditioning: What the UNet is told and its gates read too: `time`, `prompt`, or both.
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
        judge: str | None = None,
        truth: Path | None = None,
        drawn: int = 4,
        steps: int | None = None,
        conditioning: Sequence[Told] = (),
    ) -> None:
        refuse(
            "SubjectStyle",
            [
                None if caption.strip() else "caption is empty, expected words that CLIP knows",
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
        self.judge_name = judge or clip
        self.truth_file = truth
        self.drawn = drawn
        self.steps = steps or loss.steps
        self.conditioning = tuple(conditioning)
        # Places of the experts in the slots of a mixture that is shared with other prompts.
        self.filled: tuple[int, ...] | None = None

    def mix(self, gate: GateSpec, site: SiteKind, after: int = 0) -> Mapping[str, Mixture]:
        """Load base, experts, pictures and CLIP, and mix the UNet."""
        check_site(site)
        self.load()
        unet = self.base.unet
        found = blocks(unet)
        told = unet_features(unet, self.conditioning, self.base.noising.steps)
        self.mixture = mix(
            unet, self.experts, gate=gate, site=site, after=after, blocks=found, features=told
        )
        return {"unet": self.mixture}

    def load(self, other: "SubjectStyle | None" = None) -> None:
        """Load all that `mix` needs.

        Args:
            other: One that is loaded, with the same base, CLIPs and ordinary pictures, to share
                them.
        """
        experts = []
        for folder in self.expert_folders:
            parts = read_components(folder)
            if "unet" not in parts:
                found = ", ".join(filter(None, parts)) or "the LoRA's files themselves"
                raise ValueError(
                    f"{folder} has no unet folder (found {found}): expected the LoRA of the UNet "
                    f"in {folder / 'unet'}"
                )
            experts.append(parts["unet"])
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
        self.ordinary = self._loaded(self.ordinary_files) if other is None else other.ordinary
        self.experts = experts
        self.pictures = {name: self._loaded(files) for name, files in self.files.items()}
        with torch.no_grad():
            self.states = self.base.encode_prompts([self.negative, self.prompt])

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
        }

    def _loaded(self, files: Sequence[Path]) -> Tensor:
        return torch.stack([load_picture(file, self.resolution) for file in files])

    @torch.no_grad()
    def goals(self, clip: Clip) -> Goals:
        """Where a CLIP should see the pictures."""
        centre = clip.pictures(self.ordinary).mean(0)
        means = [clip.pictures(pictures).mean(0) for pictures in self.pictures.values()]
        return Goals(clip.captions([self.caption])[0], centre, composed(centre, *means))

    def scene(self) -> Scene:
        """The prompt and its goals, as the CLIP that trains sees them."""
        return Scene(self.states, self.goals(self.clip), self.filled)

    def task(self, balance: float) -> Task:
        """The CLIP loss on predicted clean pictures."""
        return ClipTask(
            self.base,
            self.mixture,
            [self.scene()],
            self.resolution,
            self.clip,
            self.loss,
            parameters=gate_parameters({"unet": self.mixture}),
            balance_weight=balance,
        )

    @torch.no_grad()
    def draw(self, pictures: int, seed: int = 0) -> Tensor:
        """Pictures (n, 3, h, w) in [-1, 1] of the prompt under the contexts in force.

        Picture i starts from the noise of (seed, i), whatever the arm and the number drawn; no
        step of a training starts from it.
        """
        scheduler = schedule(self.base, self.steps)
        device = self.base.unet.device
        shape = self.base.latent_shape(self.resolution)
        found = []
        for start in range(0, pictures, _DRAWN_AT_ONCE):
            rows = range(start, min(pictures, start + _DRAWN_AT_ONCE))
            noise = [_noise(shape, mix_seed(seed, row, 0, DRAWN)) for row in rows]
            states = self.states.to(device).repeat_interleave(len(rows), 0)
            source = positive_rows(len(rows), device)
            filled = None if self.filled is None else torch.tensor([self.filled] * len(source))
            with self.mixture.condition(source=source, filled=filled):
                latents = sample(
                    self.base, torch.stack(noise).to(device), states, scheduler, self.loss.guidance
                )
            found.append(self.base.decode(latents).clamp(-1, 1))
        return torch.cat(found)

    def drawings(self, seed: int = 0) -> dict[str, Tensor]:
        """The report's pictures by arm, all from the same noise."""
        found = {}
        for name, arm in arms([self.mixture]).items():
            with arm():
                found[name] = self.draw(self.drawn, seed)
        return found

    @torch.no_grad()
    def scores(
        self, clip: Clip, drawings: Mapping[str, Tensor]
    ) -> dict[str, dict[str, list[float]]]:
        """Alignment of every drawing by arm, as one CLIP sees it.

        Returns:
            By arm: `text`, the cosine to the caption, and with a truth `image`, the cosine to it,
            both seen from the mean ordinary picture.
        """
        goals = self.goals(clip)
        truth = None
        if self.truth_file is not None:
            picture = load_picture(self.truth_file, self.resolution).unsqueeze(0)
            truth = clip.pictures(picture)[0] - goals.centre
        found = {}
        for name, pictures in drawings.items():
            seen = clip.pictures(pictures)
            found[name] = {"text": (seen @ goals.caption).tolist()}
            if truth is not None:
                offset = seen - goals.centre
                cosine = torch.cosine_similarity(offset, truth.expand_as(offset), dim=-1)
                found[name]["image"] = cosine.tolist()
        return found

    def report(self, folder: Path) -> str:
        """Draws every arm; leaves `grid.png` and `scores.json`, returns the mean scores."""
        if not PartialState().is_main_process:
            return ""
        drawings = self.drawings()
        device = self.base.unet.device
        found = self.scores(self.judge.to(device), drawings)
        (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
        if self.truth_file is not None:
            drawings["truth"] = load_picture(self.truth_file, self.resolution).unsqueeze(0)
        save_grid(drawings, folder / "grid.png", zoom=max(1, 128 // self.resolution))
        measures = list(next(iter(found.values())))
        lines = [f"| {self.caption} | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        for name, values in found.items():
            cells = [f"{sum(values[m]) / len(values[m]):.3f}" for m in measures]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def check_site(site: SiteKind) -> None:
    """Raise ValueError at a site that cannot serve a network which is called step by step."""
    if site == "preview":
        raise ValueError(
            "site 'preview' holds one reading of a row for all that follows, and a UNet's "
            "input changes at every step: use site 'network', or 'block'"
        )


def _noise(shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

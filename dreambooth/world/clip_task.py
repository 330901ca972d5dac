"""Training of a small CLIP on everything that is not withheld: it knows the world by name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from open_clip import CLIP
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from dreambooth.world.captions import with_article
from dreambooth.world.scenes import scene, to_float
from dreambooth.world.world import Pair
from mole_vl.training import Row, Term

SCENE_SHARE = 0.15
NAMED_SHARE = 0.85
STYLED_SHARE = 0.85
RECOLOURED_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How pictures vary: the page's zoom, shift (of half a page) and turn in degrees."""

    zoom: tuple[float, float]
    shift: float
    turn: float


@dataclass(frozen=True)
class Shown:
    """What a picture shows: pairs in one style, left to right, or their forms in other colours."""

    pairs: tuple[Pair, ...]
    recoloured: bool

    @property
    def style(self) -> str | None:
        """The style that can be seen: none in other colours."""
        return None if self.recoloured else self.pairs[0].style.name


@dataclass(frozen=True)
class Said:
    """What a caption says; None where it leaves something open."""

    names: tuple[str, ...] | None
    kinds: tuple[str, ...]
    style: str | None

    @property
    def text(self) -> str:
        """The caption, in the form of the base's captions."""
        things = " and ".join(map(with_article, self.names or self.kinds))
        return things if self.style is None else f"{things} in {self.style} style"

    def holds_for(self, shown: Shown) -> bool:
        """Whether the caption is true of a picture."""
        return (
            self.style in (None, shown.style)
            and self.names in (None, tuple(pair.subject.name for pair in shown.pairs))
            and self.kinds == tuple(pair.subject.class_word for pair in shown.pairs)
        )


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 3, 64, 64), token ids (B, L), and which text is true of which picture (B, B)."""

    pictures: Tensor
    tokens: Tensor
    truth: Tensor


class ClipTask:
    """Contrastive learning; a picture may have several true captions in a batch.

    Source: the loss of CLIP (Radford et al. 2021), the mean over positives as in SupCon (Khosla et
    al. 2020, equation 2).
    """

    def __init__(
        self,
        clip: CLIP,
        tokenizer: CLIPTokenizer,
        pairs: Sequence[Pair],
        pictures: Tensor,
        crops: Crops,
    ) -> None:
        self.clip = clip.train()
        self.tokenizer = tokenizer
        self.pairs = pairs
        self.pictures = to_float(pictures)
        self.crops = crops
        self.same_style: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            self.same_style.setdefault(pair.style.name, []).append(index)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters of the CLIP."""
        return dict(self.clip.named_parameters())

    def place(self, device: torch.device) -> None:
        """Moves the CLIP to the device."""
        self.clip.to(device)
        self.device = device

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One picture and one true caption for each row.

        Some pictures are recoloured, and their captions leave the style open: what tells a subject
        in a style where it was never seen is its form.
        """
        shown, pages, said, turns = [], [], [], []
        for row in rows:
            generator = row.generator()
            index = row.pick(len(self.pairs))
            pairs, page = [self.pairs[index]], self.pictures[index]
            if _chance(SCENE_SHARE, generator):
                others = self.same_style[self.pairs[index].style.name]
                other = others[int(torch.randint(len(others), (), generator=generator))]
                pairs.append(self.pairs[other])
                page = scene(page, self.pictures[other], generator)
            recoloured = _chance(RECOLOURED_SHARE, generator)
            shown.append(Shown(tuple(pairs), recoloured))
            pages.append(_recoloured(page, generator) if recoloured else page)
            said.append(_describe(shown[-1], generator))
            turns.append(self._crop(generator, mirrored=len(pairs) == 1))
        truth = torch.tensor([[text.holds_for(picture) for text in said] for picture in shown])
        tokens = self.tokenizer(
            [text.text for text in said], padding="max_length", return_tensors="pt"
        ).input_ids
        pictures = _cropped(torch.stack(pages), torch.stack(turns))
        return Batch(pictures.to(self.device), tokens.to(self.device), truth.to(self.device))

    def units(self, batch: Batch) -> int:
        """One unit a row."""
        return len(batch.pictures)

    def losses(self, batch: Batch) -> Mapping[str, Term]:
        """Both directions of the contrastive loss."""
        images, texts, scale = self.clip(batch.pictures, batch.tokens)[:3]
        logits = scale.clamp(max=100) * images @ texts.T  # (B, B), a row per picture
        return {
            "image_to_text": Term(_contrast(logits, batch.truth), weight=0.5),
            "text_to_image": Term(_contrast(logits.T, batch.truth.T), weight=0.5),
        }

    def _crop(self, generator: Generator, *, mirrored: bool) -> Tensor:
        """The affine map (2, 3) from the crop's coordinates to the page's.

        Half of the `mirrored` ones are; a scene never, for its caption says what is on the left.
        """
        draw = torch.rand(5, generator=generator).tolist()
        low, high = self.crops.zoom
        size = 1 / (low * (high / low) ** draw[0])
        angle = math.radians(self.crops.turn) * (2 * draw[1] - 1)
        mirror = -1 if mirrored and draw[2] < 0.5 else 1
        x, y = (self.crops.shift * (2 * d - 1) for d in draw[3:])
        cos, sin = size * math.cos(angle), size * math.sin(angle)
        return torch.tensor([[mirror * cos, -sin, x], [mirror * sin, cos, y]])


def _describe(shown: Shown, generator: Generator) -> Said:
    named = len(shown.pairs) > 1 or _chance(NAMED_SHARE, generator)
    return Said(
        names=tuple(pair.subject.name for pair in shown.pairs) if named else None,
        kinds=tuple(pair.subject.class_word for pair in shown.pairs),
        style=shown.style if _chance(STYLED_SHARE, generator) else None,
    )


def _recoloured(page: Tensor, generator: Generator) -> Tensor:
    """A page (3, H, W), hues turned, paled or greyed, lightened or darkened; white stays white."""
    turn, paling, gamma = torch.rand(3, generator=generator).tolist()
    angle, saturation = 2 * math.pi * turn, 1.2 * paling
    # A turn about the grey axis (Rodrigues), the part across that axis scaled.
    grey = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turned = math.cos(angle) * (torch.eye(3) - grey) + math.sin(angle) * across
    colours = torch.einsum("ij,jhw->ihw", grey + saturation * turned, (page + 1) / 2)
    return colours.clamp(1e-4, 1) ** math.exp(gamma - 0.5) * 2 - 1


def _cropped(pages: Tensor, maps: Tensor) -> Tensor:
    """Each page (3, H, W) through its map (2, 3); what lies beyond a page is white, as it is."""
    grid = F.affine_grid(maps, list(pages.shape), align_corners=False)
    return F.grid_sample(pages - 1, grid, align_corners=False) + 1


def _contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of each row against all that is true of it, in equal parts."""
    wanted = truth.float()
    return F.cross_entropy(logits, wanted / wanted.sum(dim=1, keepdim=True))


def _chance(share: float, generator: Generator) -> bool:
    return bool(torch.rand((), generator=generator) < share)

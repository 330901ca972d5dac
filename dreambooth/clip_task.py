"""Training gates by what CLIP sees, as a task for `fit`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.adapter import Negatives, positive_rows
from dreambooth.base import Base
from dreambooth.clip import Clip
from dreambooth.data import Jitter
from dreambooth.goals import Goals, away, directional
from dreambooth.prompts import Prompts, side_by_side
from dreambooth.sampling import guided, sample, schedule, walk
from dreambooth.text_gates import Unencoded, encode_gated
from mole_vl import Mixture
from mole_vl.faults import at_least, one_of, refuse
from mole_vl.losses import balance
from mole_vl.passes import Record
from mole_vl.training import Row, Term, mix_seed

# Streams of random numbers beside the first, which is the noise of training.
_VIEWS, DRAWN, _SHOWN = 1, 2, 3


TERMS = ("text", "picture", "directional", "l2", "denoise")


@dataclass(frozen=True, kw_only=True)
class ClipLoss:
    """How pictures are drawn and judged while gates are trained.

    Each step draws from fresh noise up to a step of the sampler that is chosen at random; the clean
    picture predicted there is decoded and judged, with gradient through that call of the network
    and `through - 1` before it (truncated back-propagation: what a gate does early shows late). In
    several views, each moved and shrunk a little, a picture must please
    by what it shows, not by a texture that this one CLIP likes.

    A term whose weight is 0 is not computed. Each is logged by its name.

    Args:
        steps: Sampler steps.
        guidance: Strength of classifier-free guidance; 1 is the prompt alone.
        negatives: Whether a picture's negative row takes its positive row's gate results (shared),
            or has its own; a pipeline's `guidance` must say the same.
        first: Share of the sampler's steps before the earliest that is judged.
        last: Share of the sampler's steps before the latest that is judged.
        through: How many of the network's calls up to the judged one the gradient passes.
        text: Weight of the caption term (the global CLIP loss).
        picture: Weight of the term of the experts' own pictures.
        directional: Weight of the directional CLIP loss: from each expert's own pictures to the one
            drawn as from their words to the caption (arXiv 2108.00946, eq. 1).
        l2: Weight of the mean squared distance, pixel by pixel in [0, 1], to one of the experts'
            own pictures (the MoLE authors' code).
        denoise: Weight of the plain denoising loss on the experts' own pictures under the prompt.
        views: How many times each picture is judged.
        jitter: Moves each view.
    """

    steps: int = 20
    guidance: float = 3.0
    negatives: Negatives = "shared"
    first: float = 0.0
    last: float = 0.8
    through: int = 1
    text: float = 1.0
    picture: float = 1.0
    directional: float = 0.0
    l2: float = 0.0
    denoise: float = 0.0
    views: int = 4
    jitter: Jitter = Jitter(shift=0.1, shrink=0.75)

    def __post_init__(self) -> None:
        ends = f"first is {self.first}, last is {self.last}"
        ordered = 0 <= self.first <= self.last <= 1
        weights = {name: getattr(self, name) for name in TERMS}
        refuse(
            "ClipLoss",
            [
                at_least("steps", self.steps, 1),
                at_least("guidance", self.guidance, 1),
                one_of("negatives", self.negatives, get_args(Negatives)),
                None if ordered else f"{ends}, expected 0 <= first <= last <= 1",
                at_least("through", self.through, 1),
                *(at_least(name, weight, 0) for name, weight in weights.items()),
                None if any(weights.values()) else f"all of {', '.join(TERMS)} are 0",
                at_least("views", self.views, 1),
            ],
        )

    def source(self, pictures: int, device: torch.device) -> Tensor | None:
        """The row of guidance whose gate result each row takes; None for its own."""
        return positive_rows(pictures, device) if self.negatives == "shared" else None

    @property
    def judges(self) -> bool:
        """Whether a term looks at what is drawn."""
        return any((self.text, self.picture, self.directional, self.l2))


@dataclass(frozen=True)
class Scene:
    """A prompt, and what a picture of it should show.

    Args:
        states: The encoded negative and positive prompt; their words, where the text encoder's
            gates learn too.
        goals: Where CLIP should see the pictures.
        shown: The experts' own pictures, (n, 3, h, w) in [-1, 1].
        filled: The places of the experts in the mixture's slots; None for gates without slots.
    """

    states: Prompts | Unencoded
    goals: Goals
    shown: Tensor
    filled: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Scene":
        """The same on a device."""
        states = self.states.to(device) if isinstance(self.states, Prompts) else self.states
        return Scene(states, self.goals.to(device), self.shown.to(device), self.filled)


@dataclass(frozen=True)
class _Batch:
    noise: Tensor
    upto: int
    rows: Sequence[Row]
    scenes: Sequence[Scene]

    def states(self) -> Prompts:
        """Encoded prompts of guidance, [negative; positive], 2 rows of them."""
        encoded = (scene.states for scene in self.scenes)
        return side_by_side([states for states in encoded if isinstance(states, Prompts)])

    def unencoded(self) -> list[Unencoded]:
        """The prompts of each row that are encoded anew at every loss."""
        return [scene.states for scene in self.scenes if isinstance(scene.states, Unencoded)]

    def goals(self, views: int) -> Goals:
        """Each row's goals, once a view, (rows * views, ...)."""
        return Goals.of_rows([scene.goals for scene in self.scenes], views)

    def each(self) -> tuple[Sequence[Row], Sequence[Scene]]:
        """Rows and their scenes, side by side."""
        return self.rows, self.scenes

    def filled(self, branches: int) -> Tensor | None:
        """The experts in the slots of the rows, (branches * rows, slots)."""
        places = [scene.filled for scene in self.scenes if scene.filled is not None]
        return torch.tensor(places).repeat(branches, 1) if places else None


class ClipTask:
    """Teach a mixture's gates to draw what a caption says and what the experts' pictures show.

    Args:
        base: The base, its UNet mixed.
        mixture: The UNet's mixture.
        scenes: What is drawn: each row draws one of them.
        resolution: Side of the pictures drawn.
        clip: The judge whose gradient is used.
        loss: How pictures are drawn and judged.
        parameters: What is trained, by name.
        balance_weight: Factor of the balance loss; at 0 there is no such term.
        text: The text encoder's mixture, where its gates learn too.
    """

    def __init__(
        self,
        base: Base,
        mixture: Mixture,
        scenes: Sequence[Scene],
        resolution: int,
        clip: Clip,
        loss: ClipLoss,
        *,
        parameters: Mapping[str, nn.Parameter],
        balance_weight: float = 0.0,
        text: Mixture | None = None,
    ) -> None:
        self._base = base
        self._text = text
        self._mixture = mixture
        self._scenes = scenes
        self._shape = base.latent_shape(resolution)
        self._clip = clip
        self._loss = loss
        self._parameters = parameters
        self._balance_weight = balance_weight
        self._scheduler = schedule(base, loss.steps)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the caller said is trained."""
        return self._parameters

    def place(self, device: torch.device) -> None:
        """Move base, judge, prompts and goals."""
        self._base.to(device)
        self._clip.to(device)
        self._scenes = [scene.to(device) for scene in self._scenes]

    def batch(self, rows: Sequence[Row]) -> _Batch:
        """A scene and fresh noise for each row; one sampler's step for the whole global batch."""
        noise = [torch.randn(self._shape, generator=row.generator()) for row in rows]
        low, high = (
            round(share * (self._loss.steps - 1)) for share in (self._loss.first, self._loss.last)
        )
        chance = torch.Generator().manual_seed(mix_seed(rows[0].seed, rows[0].step))
        upto = int(torch.randint(low, high + 1, (), generator=chance))
        scenes = [self._scenes[row.pick(len(self._scenes))] for row in rows]
        return _Batch(torch.stack(noise).to(scenes[0].goals.caption.device), upto, rows, scenes)

    def units(self, batch: _Batch) -> int:
        """Pictures."""
        return len(batch.noise)

    def losses(self, batch: _Batch) -> Mapping[str, Term]:
        """The terms of the loss that have a weight, and `balance`."""
        states, said = self._encoded(batch)
        records: list[Record] = []
        terms = {}
        if self._loss.judges:
            terms |= self._judged(self._predicted(batch, states, records), batch)
        if self._loss.denoise:
            terms["denoise"] = Term(self._denoised(batch, states, records), self._loss.denoise)
        if self._balance_weight:
            balanced = self._balance(records, said)
            terms["balance"] = Term(balanced, self._balance_weight, per_unit=False)
        return terms

    def _encoded(self, batch: _Batch) -> tuple[Prompts, list[Record]]:
        """Prompts of guidance, [negative; positive], and what a text encoder's gates said."""
        if self._text is None:
            return batch.states(), []
        with self._text.record() as records:
            return encode_gated(self._base, self._text, batch.unencoded()), records

    def _balance(self, records: list[Record], said: list[Record]) -> Tensor:
        """Over all gates; of each network for itself, where they do not weigh the same LoRAs."""
        if self._text is None:
            return balance(records)
        if self._text.weighed == self._mixture.weighed:
            # The text encoder's gates speak once for all the calls that the UNet's speak in.
            return balance([*records, *said * (len(records) // len(self._mixture.sites))])
        return balance(records) + balance(said)

    def _judged(self, pictures: Tensor, batch: _Batch) -> dict[str, Term]:
        """The terms of pictures (rows, 3, h, w) in [-1, 1] that were drawn for the batch."""
        loss, goals = self._loss, batch.goals(self._loss.views)
        seen = self._clip.pictures(self._views(pictures, batch.rows))
        terms = {}
        if loss.text:
            terms["text"] = Term(away(seen, goals.caption), loss.text)
        if loss.picture:
            terms["picture"] = Term(away(seen - goals.centre, goals.offset), loss.picture)
        if loss.directional:
            terms["directional"] = Term(directional(seen, goals), loss.directional)
        if loss.l2:
            shown = torch.stack([picture for picture, _ in map(self._shown, *batch.each())])
            terms["l2"] = Term(F.mse_loss(pictures / 2, shown / 2), loss.l2)
        return terms

    def _predicted(self, batch: _Batch, states: Prompts, records: list[Record]) -> Tensor:
        """Clean pictures (rows, 3, h, w) in [-1, 1], with gradient through the last calls."""
        loss = self._loss
        step = self._scheduler.timesteps[batch.upto]
        start = max(0, batch.upto + 1 - loss.through)
        how = (states, self._scheduler, loss.guidance)
        source = loss.source(len(batch.noise), states.device)
        with self._mixture.condition(source=source, filled=batch.filled(2)):
            latents = sample(self._base, batch.noise, *how, start)
            with self._mixture.record() as found:
                latents = walk(self._base, latents, *how, slice(start, batch.upto))
                output = guided(self._base, latents, step, states, loss.guidance)
        records += found
        clean = self._base.noising.clean(latents, output, step.expand(len(latents)))
        return self._base.decode(clean).clamp(-1, 1)

    def _denoised(self, batch: _Batch, states: Prompts, records: list[Record]) -> Tensor:
        """The mean squared error of what the UNet predicts of the experts' own pictures, noised."""
        noising = self._base.noising
        pictures, chances = zip(*map(self._shown, *batch.each()), strict=True)
        steps = torch.stack([noising.draw_timestep(chance) for chance in chances])
        steps = steps.to(batch.noise.device)
        with torch.no_grad():
            latents = self._base.encode(torch.stack(pictures)).float()
        noisy = noising.add_noise(latents, batch.noise, steps)
        positive = states[slice(len(latents), None)]
        with self._mixture.condition(filled=batch.filled(1)), self._mixture.record() as found:
            predicted = self._base.predict(noisy, steps, positive)
        records += found
        return F.mse_loss(predicted.float(), noising.target(latents, batch.noise, steps))

    def _shown(self, row: Row, scene: Scene) -> tuple[Tensor, torch.Generator]:
        """One of the scene's own pictures, chosen by the row's chance, and what chance is left."""
        chance = row.generator(stream=_SHOWN)
        return scene.shown[torch.randint(len(scene.shown), (), generator=chance)], chance

    def _views(self, pictures: Tensor, rows: Sequence[Row]) -> Tensor:
        """Each picture `views` times, (rows * views, 3, h, w), moved by the row's own chance."""
        views = []
        for picture, row in zip(pictures, rows, strict=True):
            chance = row.generator(stream=_VIEWS)
            # Places of pixels must not be rounded to an autocast's lower precision.
            with torch.autocast(picture.device.type, enabled=False):
                moved = picture.float()
                views += [self._loss.jitter(moved, chance) for _ in range(self._loss.views)]
        return torch.stack(views)

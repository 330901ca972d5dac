"""Training gates by what CLIP sees, as a task for `fit`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreambooth.adapter import positive_rows
from dreambooth.base import Base
from dreambooth.clip import Clip, away
from dreambooth.data import Jitter
from dreambooth.prompts import Prompts, side_by_side
from dreambooth.sampling import guided, sample, schedule, walk
from mole_vl import Mixture
from mole_vl.faults import at_least, refuse
from mole_vl.losses import balance
from mole_vl.training import Row, Term, mix_seed

# Streams of random numbers beside the first, which is the noise of training.
_VIEWS, DRAWN = 1, 2


@dataclass(frozen=True, kw_only=True)
class ClipLoss:
    """How pictures are drawn and judged while gates are trained.

    Each step draws from fresh noise up to a step of the sampler that is chosen at random; the clean
    picture predicted there is decoded and judged, with gradient through that call of the network
    and `through - 1` before it (truncated back-propagation: what a gate does early shows late). In
    several views, each moved and shrunk a little, a picture must please
    by what it shows, not by a texture that this one CLIP likes.

    Args:
        steps: Sampler steps.
        guidance: Strength of classifier-free guidance.
        first: Share of the sampler's steps before the earliest that is judged.
        last: Share of the sampler's steps before the latest that is judged.
        through: How many of the network's calls up to the judged one the gradient passes.
        text: Weight of the caption term.
        picture: Weight of the term of the experts' own pictures.
        views: How many times each picture is judged.
        jitter: Moves each view.
    """

    steps: int = 20
    guidance: float = 3.0
    first: float = 0.0
    last: float = 0.8
    through: int = 1
    text: float = 1.0
    picture: float = 1.0
    views: int = 4
    jitter: Jitter = Jitter(shift=0.1, shrink=0.75)

    def __post_init__(self) -> None:
        ends = f"first is {self.first}, last is {self.last}"
        ordered = 0 <= self.first <= self.last <= 1
        refuse(
            "ClipLoss",
            [
                at_least("steps", self.steps, 1),
                at_least("guidance", self.guidance, 0),
                None if ordered else f"{ends}, expected 0 <= first <= last <= 1",
                at_least("through", self.through, 1),
                at_least("text", self.text, 0),
                at_least("picture", self.picture, 0),
                at_least("views", self.views, 1),
            ],
        )


@dataclass(frozen=True)
class Goals:
    """Where CLIP should see the pictures: all (d,), the picture goal as an offset from a centre."""

    caption: Tensor
    centre: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Scene:
    """A prompt, and what a picture of it should show.

    Args:
        states: The encoded negative and positive prompt.
        goals: Where CLIP should see the pictures.
        filled: The places of the experts in the mixture's slots; None for gates without slots.
    """

    states: Prompts
    goals: Goals
    filled: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Scene":
        """The same on a device."""
        goals = Goals(*(tensor.to(device) for tensor in vars(self.goals).values()))
        return Scene(self.states.to(device), goals, self.filled)


@dataclass(frozen=True)
class _Batch:
    noise: Tensor
    upto: int
    rows: Sequence[Row]
    scenes: Sequence[Scene]

    def states(self) -> Prompts:
        """Encoded prompts of guidance, [negative; positive], 2 rows of them."""
        return side_by_side([scene.states for scene in self.scenes])

    def goals(self, views: int) -> Goals:
        """Each row's goals, once a view, (rows * views, d)."""
        each = [vars(scene.goals).values() for scene in self.scenes]
        together = (torch.stack(tensors) for tensors in zip(*each, strict=True))
        return Goals(*(tensor.repeat_interleave(views, 0) for tensor in together))

    def filled(self) -> Tensor | None:
        """The experts in the slots of the rows of guidance, (2 rows, slots)."""
        places = [scene.filled for scene in self.scenes if scene.filled is not None]
        return torch.tensor(places).repeat(2, 1) if places else None


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
    ) -> None:
        self._base = base
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
        return _Batch(torch.stack(noise).to(scenes[0].states.device), upto, rows, scenes)

    def units(self, batch: _Batch) -> int:
        """Pictures."""
        return len(batch.noise)

    def losses(self, batch: _Batch) -> Mapping[str, Term]:
        """The terms `text`, `picture`, `balance`, those with a weight."""
        loss, rows = self._loss, len(batch.noise)
        states = batch.states()
        step = self._scheduler.timesteps[batch.upto]
        start = max(0, batch.upto + 1 - loss.through)
        how = (states, self._scheduler, loss.guidance)
        source = positive_rows(rows, states.device)
        with self._mixture.condition(source=source, filled=batch.filled()):
            latents = sample(self._base, batch.noise, *how, start)
            with self._mixture.record() as records:
                latents = walk(self._base, latents, *how, slice(start, batch.upto))
                output = guided(self._base, latents, step, states, loss.guidance)
        clean = self._base.noising.clean(latents, output, step.expand(rows))
        terms = self._judged(clean, batch)
        if self._balance_weight:
            terms["balance"] = Term(balance(records), self._balance_weight, per_unit=False)
        return terms

    def _judged(self, clean: Tensor, batch: _Batch) -> dict[str, Term]:
        """The terms `text` and `picture` of clean latents, (rows, c, h, w)."""
        loss, goals = self._loss, batch.goals(self._loss.views)
        seen = self._clip.pictures(self._views(self._base.decode(clean).clamp(-1, 1), batch.rows))
        terms = {}
        if loss.text:
            terms["text"] = Term(away(seen, goals.caption), loss.text)
        if loss.picture:
            terms["picture"] = Term(away(seen - goals.centre, goals.offset), loss.picture)
        return terms

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

"""What happens when something on the page is pressed."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from apps.album import ORDINARY_PICTURES, take_pictures
from apps.curve import loss_curve
from apps.drawing import GATES, Look, Wish, side_by_side
from apps.exporting import export
from apps.heatmap import heat_maps
from apps.session import Session, Sessions
from apps.shelf import Shelf
from apps.stopping import Stopped, reports
from apps.studio import Studio
from apps.training import Lesson, Point, Trainer, one_file
from apps.uploads import find_lora, take_gates, take_lora, uploaded
from apps.words import caption_of, prompt_of
from mole_vl.faults import refuse

_KEEP = gr.skip()


class Actions:
    """The page's functions; each reads and changes the session of whoever asks alone.

    Args:
        studio: Draws.
        trainer: Trains gates.
        shelf: The LoRAs that are there for everybody.
        sessions: The open pages.
        limit: Bytes of the largest upload.
        places: Whether LoRAs may be named by path or Hub id.
    """

    def __init__(
        self,
        studio: Studio,
        trainer: Trainer,
        shelf: Shelf,
        sessions: Sessions,
        *,
        limit: int,
        places: bool,
    ) -> None:
        self.studio = studio
        self.trainer = trainer
        self.shelf = shelf
        self.sessions = sessions
        self.limit = limit
        self.places = places
        first = [shelf[name] for name in shelf.first_choice()]
        self.prompt = prompt_of(lora.words for lora in first)
        self.caption = caption_of(lora.words for lora in first)

    def session(self, request: gr.Request) -> Session:
        """The session of whoever asks."""
        return self.sessions.of(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """Forget a page that was closed."""
        self.sessions.close(request.session_hash)

    # LoRAs

    def choose(self, names: list[str], prompt: str, caption: str, request: gr.Request) -> list[Any]:
        """Another choice: its words, masks, pictures."""
        session = self.session(request)
        words = [lora.words for lora in session.chosen(names, self.shelf)]
        return [
            self._written(session, prompt, self.prompt, prompt_of(words)),
            self._written(session, caption, self.caption, caption_of(words)),
            gr.update(choices=names, value=names),
            gr.update(choices=[*names, ORDINARY_PICTURES], value=(*names, ORDINARY_PICTURES)[0]),
            self.pictures(session, names),
        ]

    def bring(self, file: str, names: list[str], request: gr.Request) -> Any:
        """An uploaded LoRA."""
        try:
            return self._brought(uploaded(Path(file), self.limit), names, request)
        finally:
            Path(file).unlink(missing_ok=True)

    def find(self, place: str, names: list[str], request: gr.Request) -> Any:
        """A LoRA by path or Hub id."""
        if not self.places:
            raise ValueError("LoRAs by path or Hub id are for a page of one's own: upload the file")
        return self._brought(find_lora(place), names, request)

    def _brought(self, source: Path, names: list[str], request: gr.Request) -> Any:
        session = self.session(request)
        lora = take_lora(self.studio, session, source, [*self.shelf, *session.loras])
        return gr.update(choices=[*self.shelf, *session.loras], value=[*names, lora.name])

    def _written(self, session: Session, now: str, opening: str, new: str) -> Any:
        """The words of another choice, unless the person wrote some."""
        if now.strip() and now != opening and now not in session.written:
            return _KEEP
        session.written.add(new)
        return new

    # Drawing

    def draw(
        self,
        names: list[str],
        speaking: list[str],
        prompt: str,
        negative: str,
        seed: float,
        steps: float,
        guidance: float,
        strength: float,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Side by side: status, pictures and heat map as they come."""
        _check_given("drawing", seed=seed)
        session = self.session(request)
        session.drawing.start()
        loras = session.chosen(names, self.shelf)
        wish = Wish(
            prompt=prompt,
            negative=negative,
            seed=int(seed),
            steps=int(steps),
            guidance=guidance,
            strength=strength,
            masked=tuple(name for name in names if name not in speaking),
        )

        def work(look: Callable[[Look], None]) -> None:
            side_by_side(self.studio, session, loras, wish, look)

        trained = session.gates_of(frozenset(names)) is not None
        shown = -1
        try:
            for look in reports(work, session.drawing):
                pictures = _KEEP
                if len(look.pictures) != shown:
                    shown = len(look.pictures)
                    pictures = [(str(f), _label(a, trained)) for a, f in look.pictures.items()]
                maps = _weights(look, trained) if look.state == "done" else _KEEP
                yield [_drawing_said(look), pictures, maps]
        except Stopped:
            yield [said("Stopped."), _KEEP, _KEEP]

    def stop_drawing(self, request: gr.Request) -> None:
        """End the session's drawing at its next step."""
        self.session(request).drawing.stop()

    # Training

    def train(
        self,
        names: list[str],
        prompt: str,
        negative: str,
        caption: str,
        seed: float,
        steps: float,
        every: float,
        rows: float,
        rate: float,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Gates for the chosen LoRAs: status, curve, samples, and the gate file at the end."""
        _check_given("training", **{"seed": seed, "learning rate": rate})
        session = self.session(request)
        session.training.start()
        loras = session.chosen(names, self.shelf)
        lesson = Lesson(
            prompt=prompt,
            negative=negative,
            caption=caption,
            seed=int(seed),
            steps=int(steps),
            every=int(every),
            rows=int(rows),
            rate=rate,
        )

        def work(report: Callable[[Point], None]) -> None:
            self.trainer.train(session, loras, lesson, report)

        terms: dict[str, list[float]] = {}
        try:
            for point in reports(work, session.training):
                if point.state == "training":
                    for name, value in point.terms.items():
                        terms.setdefault(name, []).append(value)
                samples = [str(file) for file in point.samples] or _KEEP
                file = _KEEP
                if point.gates is not None:
                    file = gr.update(value=str(one_file(point.gates)), interactive=True)
                curve = loss_curve(terms, lesson.steps) or _KEEP
                yield [_training_said(point, lesson.steps), curve, samples, file]
        except Stopped:
            yield [said("Stopped before the first step."), _KEEP, _KEEP, _KEEP]

    def stop_training(self, request: gr.Request) -> None:
        """End the session's training after its step."""
        self.session(request).training.stop()

    def bring_pictures(
        self, files: list[str], of: str, names: list[str], request: gr.Request
    ) -> str:
        """Uploaded pictures of a LoRA."""
        session = self.session(request)
        try:
            if of not in (*names, ORDINARY_PICTURES):
                raise ValueError(f"There is no LoRA {of!r} among the chosen")
            folder = session.new_path("pictures")
            take_pictures([Path(file) for file in files], folder)
        finally:
            for file in files:
                Path(file).unlink(missing_ok=True)
        session.pictures[of] = folder
        return self.pictures(session, names)

    def pictures(self, session: Session, names: Sequence[str]) -> str:
        """What is said of the chosen LoRAs' pictures."""
        lacking = self.trainer.lacking(session, names)
        lines = []
        for name in (*names, ORDINARY_PICTURES):
            if name in session.pictures:
                state = f"{len(list(session.pictures[name].glob('*.png')))} uploaded"
            else:
                state = "none yet: upload some" if name in lacking else "there"
            lines.append(f"{escape(name)}: {state}")
        return "Pictures to learn from: " + " · ".join(lines)

    def bring_gates(self, file: str, request: gr.Request) -> str:
        """An uploaded gate file."""
        try:
            session, brought = self.session(request), uploaded(Path(file), self.limit)
            names = take_gates(self.studio, session, self.shelf, brought)
        finally:
            Path(file).unlink(missing_ok=True)
        return said(f"These gates serve {' + '.join(names)} from now on.")

    # Export

    def export(self, rank: float, form: Any, request: gr.Request) -> list[Any]:
        """One ordinary LoRA, and what it misses."""
        file, missed = export(self.studio, self.session(request), int(rank), form)
        size = file.stat().st_size / 1024
        parts = ", ".join(f"{value:.1%} of the {part}'s update" for part, value in missed.items())
        return [
            said(f"{file.name}, {size:.0f} KiB; misses {parts}."),
            gr.update(value=str(file), interactive=True),
        ]


def said(words: str, share: float | None = None) -> str:
    """A line of a status, with a bar where a share is known."""
    bar = ""
    if share is not None:
        bar = f'<div class="track"><div class="done" style="width:{share:.0%}"></div></div>'
    return f'<div class="said"><b>{escape(words)}</b>{bar}</div>'


def _check_given(subject: str, **numbers: float | None) -> None:
    """Raise ValueError where a person emptied the field of a number."""
    empty = [name for name, value in numbers.items() if value is None]
    refuse(subject, [f"{name} is empty, expected a number" for name in empty])


def _label(arm: str, trained: bool) -> str:
    if arm == GATES:
        return "gates, trained" if trained else "gates, untrained"
    return arm


def _drawing_said(look: Look) -> str:
    if look.state == "waiting":
        return said("Waiting: another drawing goes first.")
    if look.state == "done":
        return said("Done.", 1.0)
    return said(f"Drawing {look.arm}", look.share)


def _weights(look: Look, trained: bool) -> str:
    if look.weights is None:
        return ""
    note = "" if trained else " They are untrained: train some in the next tab."
    return f"<h4>What the gates said, by block and step.{note}</h4>{heat_maps(look.weights)}"


def _training_said(point: Point, steps: int) -> str:
    if point.state == "waiting":
        return said("Waiting: another training goes first.")
    if point.state == "preparing":
        return said("Loading base, pictures and CLIP", 0.0)
    if point.state == "training":
        return said(f"Step {point.step} of {steps}", point.step / steps)
    how = "Done" if point.state == "done" else f"Stopped after step {point.step}"
    return said(f"{how}: the side by side draws with these gates now.", point.step / steps)

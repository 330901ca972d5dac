"""The page: its layout, and what each part of it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from apps.actions import Actions
from apps.layout import Layout, Opening
from apps.sentences import spoken

# Two people draw and train at once as far as Gradio goes: the studio and the trainer give turns.
_AT_ONCE = 16
_IN_LINE = 64
# Files that nothing refers to any more go after an hour; a session's own go with it.
_CACHE = (600, 3600)


def build(actions: Actions, opening: Opening, root: Path) -> gr.Blocks:
    """The page, to be launched.

    Args:
        actions: What happens.
        opening: What it shows first.
        root: Folder of all sessions' files.
    """
    with gr.Blocks(
        title="mole-vl", analytics_enabled=False, delete_cache=_CACHE, fill_width=False
    ) as page:
        layout = Layout(opening)
        _wire(layout, actions, root)
        page.unload(actions.leave)
    page.queue(api_open=False, max_size=_IN_LINE, default_concurrency_limit=_AT_ONCE)
    return page


def _wire(layout: Layout, actions: Actions, root: Path) -> None:
    mixing, drawing, training, made = layout.mixing, layout.drawing, layout.training, layout.export
    told = spoken(root)

    def on(event: Any, function: Callable[..., Any], inputs: Any, outputs: Any, **how: Any) -> None:
        event(
            told(function),
            inputs,
            outputs,
            **{"show_progress": "hidden", "api_visibility": "private", **how},
        )

    on(
        mixing.loras.change,
        actions.choose,
        [mixing.loras, mixing.prompt, training.caption],
        [mixing.prompt, training.caption, mixing.speaking, training.of, training.known],
    )
    on(mixing.file.upload, actions.bring, [mixing.file, mixing.loras], mixing.loras)
    on(mixing.find.click, actions.find, [mixing.place, mixing.loras], mixing.loras)
    on(
        drawing.draw.click,
        actions.draw,
        [
            mixing.loras,
            mixing.speaking,
            mixing.prompt,
            mixing.negative,
            mixing.seed,
            mixing.steps,
            mixing.guidance,
            mixing.strength,
        ],
        [drawing.status, drawing.pictures, drawing.weights],
    )
    on(drawing.stop.click, actions.stop_drawing, None, None, queue=False)
    on(
        training.train.click,
        actions.train,
        [
            mixing.loras,
            mixing.prompt,
            mixing.negative,
            training.caption,
            mixing.seed,
            training.steps,
            training.every,
            training.rows,
            training.rate,
        ],
        [training.status, training.curve, training.samples, training.download],
    )
    on(training.stop.click, actions.stop_training, None, None, queue=False)
    on(
        training.files.upload,
        actions.bring_pictures,
        [training.files, training.of, mixing.loras],
        training.known,
    )
    on(training.upload.upload, actions.bring_gates, training.upload, training.status)
    on(made.make.click, actions.export, [made.rank, made.form], [made.status, made.download])

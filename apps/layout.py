"""What stands on the page and where; nothing happens here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gradio as gr

from apps.album import ORDINARY_PICTURES
from apps.shelf import SUFFIX
from dreambooth.data import SUFFIXES
from dreambooth.lora_files import Form

STYLE = Path(__file__).with_name("page.css")
_TITLE = """# mole-vl
Several LoRAs in one picture: added up they blur each other; small gates let each speak where it
should. All pictures of a side by side start from the same noise."""
_ARMS = """**base** knows no LoRA · **sum** adds all at full weight · **NLA** takes their average ·
**Switch** lets one at a time draw · **gates** weigh them block by block"""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What the page shows before anything was done.

    Args:
        base: The base's name.
        loras: What can be chosen.
        chosen: What is.
        prompt: That calls the chosen.
        caption: The same in plain words.
        negative: Negative prompt.
        steps: Inference steps.
        guidance: Strength of guidance.
        seed: Of the noise.
        training_steps: Of gates.
        rows: Pictures of a training step.
        rate: Peak learning rate of gates.
        places: Whether LoRAs can be named by path or Hub id.
        limit: MiB of the largest upload.
        pictures: What is said of the chosen LoRAs' pictures.
    """

    base: str
    loras: Sequence[str]
    chosen: Sequence[str]
    prompt: str
    caption: str
    negative: str
    steps: int
    guidance: float
    seed: int
    training_steps: int
    rows: int
    rate: float
    places: bool
    limit: int
    pictures: str


class Mixing:
    """The column that both tabs share: LoRAs, prompt, and how to draw."""

    def __init__(self, opening: Opening) -> None:
        self.loras = gr.Dropdown(
            list(opening.loras),
            value=list(opening.chosen),
            multiselect=True,
            label="LoRAs",
            info="Choose two or more: a subject and a style, say.",
            elem_id="loras",
        )
        with gr.Accordion("Bring another LoRA", open=False, elem_id="bring"):
            self.file = gr.UploadButton(
                f"Upload {SUFFIX}", file_types=[SUFFIX], size="sm", elem_id="lora-file"
            )
            gr.Markdown(
                f"diffusers' or kohya's file for this base, at most {opening.limit} MiB. Nobody "
                "else sees it, and it goes when the page is closed.",
                elem_classes="note",
            )
            self.place = gr.Textbox(
                label="Hub id, folder or file",
                placeholder="org/repository",
                visible=opening.places,
                elem_id="place",
            )
            self.find = gr.Button("Load", size="sm", visible=opening.places, elem_id="find")
        self.prompt = gr.Textbox(opening.prompt, label="Prompt", lines=2, elem_id="prompt")
        self.speaking = gr.CheckboxGroup(
            list(opening.chosen),
            value=list(opening.chosen),
            label="Who speaks",
            info="An unticked LoRA is silent in every mixture.",
            elem_id="speaking",
        )
        self.strength = gr.Slider(0, 2, 1.0, step=0.05, label="Strength")
        with gr.Accordion("More", open=False, elem_id="more"):
            self.negative = gr.Textbox(opening.negative, label="Negative prompt")
            self.seed = gr.Number(
                opening.seed, label="Seed", precision=0, minimum=0, elem_id="seed"
            )
            self.steps = gr.Slider(1, 100, opening.steps, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(1, 15, opening.guidance, step=0.5, label="Guidance")


class DrawTab:
    """Side by side, and what the gates said."""

    def __init__(self) -> None:
        with gr.Row(elem_classes="buttons"):
            self.draw = gr.Button("Draw side by side", variant="primary", elem_id="draw", scale=3)
            self.stop = gr.Button("Stop", elem_id="stop-draw", scale=1)
        self.status = gr.HTML(elem_id="draw-status")
        self.pictures = gr.Gallery(
            label="Side by side",
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="pictures",
        )
        gr.Markdown(_ARMS, elem_classes="note")
        self.weights = gr.HTML(elem_id="weights")


class TrainTab:
    """Gates trained for the chosen LoRAs."""

    def __init__(self, opening: Opening) -> None:
        gr.Markdown(
            "Gates learn from what CLIP sees: the caption in plain words, and the LoRAs' own "
            "pictures. Only the gates are trained; base and LoRAs stay as they are.",
            elem_classes="note",
        )
        self.caption = gr.Textbox(
            opening.caption,
            label="Caption",
            info="What the picture should show, without trigger words.",
            elem_id="caption",
        )
        with gr.Row():
            self.steps = gr.Slider(
                1, 300, opening.training_steps, step=1, label="Steps", elem_id="train-steps"
            )
            self.every = gr.Slider(
                1, 100, 15, step=1, label="Samples every … steps", elem_id="train-every"
            )
        with gr.Accordion("Pictures and settings", open=False, elem_id="train-more"):
            self.known = gr.Markdown(opening.pictures, elem_id="known-pictures")
            with gr.Row():
                self.of = gr.Dropdown(
                    [*opening.chosen, ORDINARY_PICTURES],
                    value=opening.chosen[0] if opening.chosen else ORDINARY_PICTURES,
                    label="Pictures of",
                    elem_id="pictures-of",
                )
                self.files = gr.UploadButton(
                    "Upload pictures",
                    file_count="multiple",
                    file_types=sorted(SUFFIXES),
                    elem_id="picture-files",
                )
            with gr.Row():
                self.rows = gr.Slider(1, 16, opening.rows, step=1, label="Pictures a step")
                self.rate = gr.Number(opening.rate, label="Learning rate")
        with gr.Row(elem_classes="buttons"):
            self.train = gr.Button("Train gates", variant="primary", elem_id="train", scale=3)
            self.stop = gr.Button("Stop, keep what was learned", elem_id="stop-train", scale=2)
        self.status = gr.HTML(elem_id="train-status")
        self.curve = gr.HTML(elem_id="curve")
        self.samples = gr.Gallery(
            label="Samples",
            columns=4,
            height="auto",
            object_fit="contain",
            buttons=["fullscreen"],
            interactive=False,
            elem_id="samples",
        )
        with gr.Row(elem_classes="buttons"):
            self.download = gr.DownloadButton(
                "Download the gate file", interactive=False, elem_id="gate-file"
            )
            self.upload = gr.UploadButton(
                "Use a gate file", file_types=[SUFFIX], elem_id="bring-gates"
            )


class ExportTab:
    """The last drawing's gates as one ordinary LoRA."""

    def __init__(self) -> None:
        gr.Markdown(
            "One ordinary LoRA in place of the mixture, for tools that know nothing of gates: the "
            "gates' weights of the last side by side, averaged over its steps, masks and strength "
            "included. A lower rank makes a smaller file that misses more.",
            elem_classes="note",
        )
        with gr.Row():
            self.rank = gr.Slider(1, 64, 8, step=1, label="Rank", elem_id="rank")
            self.form = gr.Dropdown(
                list(get_args(Form)), value="diffusers", label="Format", elem_id="form"
            )
        self.make = gr.Button("Make the LoRA", variant="primary", elem_id="make")
        self.status = gr.HTML(elem_id="export-status")
        self.download = gr.DownloadButton(
            "Download the LoRA", interactive=False, elem_id="lora-download"
        )


class Layout:
    """All of the page; to be made inside `gr.Blocks`."""

    def __init__(self, opening: Opening) -> None:
        gr.Markdown(f"{_TITLE} The base is `{opening.base}`.", elem_id="head")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                self.mixing = Mixing(opening)
            with gr.Column(scale=2, min_width=480), gr.Tabs():
                with gr.Tab("Side by side"):
                    self.drawing = DrawTab()
                with gr.Tab("Train gates"):
                    self.training = TrainTab(opening)
                with gr.Tab("Export"):
                    self.export = ExportTab()


def theme() -> gr.themes.Base:
    """The page's colours and the machine's own fonts: none is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="violet",
        secondary_hue="violet",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )

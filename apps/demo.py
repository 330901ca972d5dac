"""A page that mixes LoRAs side by side, trains gates and exports them.

    python -m apps.demo
    python -m apps.demo --base ORG/REPOSITORY --loras my/loras --preset my.yaml

It opens on the emoji world and needs no network. Only this machine reaches it unless --host says
otherwise; then LoRAs come from the list and from uploads alone, never by path.
"""

import os
import signal
import socket
import tempfile
from pathlib import Path

import gradio as gr
from jsonargparse import auto_cli

from apps.actions import Actions
from apps.album import ORDINARY_PICTURES, Album
from apps.layout import STYLE, Opening, theme
from apps.page import build
from apps.preset import Preset, read_preset
from apps.session import Session, Sessions
from apps.shelf import Shelf
from apps.studio import Studio, load_pipeline
from apps.training import Trainer
from mole_vl.faults import as_messages, at_least, between, refuse

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# One whose first side by side tells the ways to mix apart.
_SEED = 9


def demo(
    base: str = "worlds/emoji/base",
    loras: Path = Path("worlds/emoji/loras"),
    preset: Path = Path("configs/emoji_subject_style.yaml"),
    host: str = "127.0.0.1",
    port: int = 7860,
    upload: int = 512,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        base: Stable Diffusion 1.x, 2.x or XL in diffusers' format: a folder, or a Hub id.
        loras: Folder of LoRAs that the page lists.
        preset: How gates are trained: a configuration of train_gates.py over pictures.
        host: Address to listen at. Any but this machine's own opens the page to others.
        port: Port to listen at.
        upload: MiB of the largest upload.
    """
    refuse("demo", [between("port", port, 1, 65535), at_least("upload", upload, 1)])
    refuse("demo", [_listening_fault(host, port)])
    with tempfile.TemporaryDirectory(prefix="mole-vl-page-") as folder:
        root = Path(folder)
        # Gradio keeps uploads there; what is in it already it does not copy.
        os.environ["GRADIO_TEMP_DIR"] = str(root)
        page = make_page(
            base, loras, read_preset(preset), root, limit=upload, places=host in _LOOPBACK
        )
        # A plain `kill` ends the program as Ctrl-C does: its files are removed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=upload * 2**20,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            theme=theme(),
            css_paths=STYLE,
        )


def _listening_fault(host: str, port: int) -> str | None:
    """Why nothing can listen there, or None; found before the models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return None
    except OSError as error:
        return f"cannot listen at {host}, port {port} ({error.strerror}): take another port or host"


def make_page(
    base: str, loras: Path, preset: Preset, root: Path, *, limit: int, places: bool
) -> gr.Blocks:
    """The page over a base, to be launched.

    Args:
        base: As for `demo`.
        loras: As for `demo`.
        preset: How gates are trained.
        root: Folder for all files.
        limit: MiB of the largest upload.
        places: Whether LoRAs may be named by path or Hub id.

    Raises:
        FileNotFoundError: No base or no folder of LoRAs there.
        ValueError: A base of another kind.
    """
    pipe = load_pipeline(base)
    studio = Studio(pipe, preset.gate, preset.site, preset.after)
    shelf = Shelf(loras, root / "loras", studio.unet_config)
    own = preset.domain
    folders = {**own.picture_folders, ORDINARY_PICTURES: own.ordinary_folder}
    trainer = Trainer(base, preset, Album(folders, loras.parent, root / "album"))
    sessions = Sessions(root)
    actions = Actions(studio, trainer, shelf, sessions, limit=limit * 2**20, places=places)
    chosen = shelf.first_choice()
    opening = Opening(
        base=base,
        loras=list(shelf),
        chosen=chosen,
        prompt=actions.prompt,
        caption=actions.caption,
        negative=own.negative,
        steps=own.steps,
        guidance=own.loss.guidance,
        seed=_SEED,
        training_steps=preset.fit.steps,
        rows=preset.fit.rows,
        rate=preset.fit.lr,
        places=places,
        limit=limit,
        pictures=actions.pictures(Session(root / "nobody"), chosen),
    )
    return build(actions, opening, root)


if __name__ == "__main__":
    with as_messages("apps", "dreambooth", "pipelines"):
        auto_cli(demo, as_positional=False)

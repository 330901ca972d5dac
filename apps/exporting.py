"""What was drawn, as one ordinary LoRA for tools that know nothing of gates."""

import shutil
from pathlib import Path
from typing import get_args

from apps.session import Session
from apps.studio import Studio
from dreambooth.lora_files import Form
from mole_vl.faults import between, one_of, refuse


def export(
    studio: Studio, session: Session, rank: int, form: Form, name: str = "mixture"
) -> tuple[Path, dict[str, float]]:
    """One LoRA for the gates' weights of the last side by side: mean over its steps.

    Args:
        studio: Whose pipeline writes it.
        session: Where the file goes.
        rank: The most that a layer may have.
        form: The format; a PEFT folder comes as a zip.
        name: The LoRA's.

    Returns:
        The file, and what each component's LoRA misses (see `Kept.export`).

    Raises:
        ValueError: Nothing was drawn yet, or a rank or form that is none.
    """
    drawn = session.drawn
    refuse(
        "export",
        [
            between("rank", rank, 1, 1024),
            one_of("form", form, get_args(Form)),
            "draw first: the LoRA stands for the gates of the last drawing" if not drawn else None,
        ],
    )
    assert drawn is not None
    single = form != "peft"
    path = session.new_path(f"{name}.safetensors" if single else name)
    with session.working(), studio.holding(drawn.loras, drawn.gates) as pipe:
        missed = pipe.export(path, rank, form, weights=drawn.weights)
        if single:
            return path, missed
        zipped = shutil.make_archive(str(path), "zip", root_dir=path.parent, base_dir=path.name)
        return Path(zipped), missed

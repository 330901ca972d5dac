"""Tiny bases of every kind on disk: SD 1, SD 2 (v-prediction, OpenCLIP) and SDXL."""

from dreambooth.candidates import CandidateConfig, CandidatesConfig
from dreambooth.denoise import DenoiseConfig
from dreambooth.drawing import DrawConfig
from mole_vl.training import FitConfig
from tests.dreambooth.toys import SIDE, write_examples
from tests.pipelines.toys import BASES, PLAIN, quiet

KINDS = tuple(BASES)
DRAW = DrawConfig(steps=2, guidance=3.0)


def plain(kind):
    """The pipeline of diffusers over a kind of base."""
    make = BASES[kind]
    return make(PLAIN[type(make())])


def write_kind(folder, kind):
    if not folder.exists():
        plain(kind).save_pretrained(folder)
    return str(folder)


def reload(kind, folder):
    return quiet(PLAIN[type(BASES[kind]())].from_pretrained(folder, safety_checker=None))


def candidates(folder, kind, *, output="loras", fit=None, more=None, **candidate):
    """One LoRA of two pictures over a base of this kind."""
    data = folder / "data"
    if not data.exists():
        write_examples(data, ["a dog", "red dog"])
    settings = {"steps": 4, "rows": 2, "save_every": 2, "log_every": 1, "lr": 0.02, **(fit or {})}
    one = {"name": "dog", "data": data, "rank": 2, "alpha": 3.0, **candidate}
    return CandidatesConfig(
        candidates=(CandidateConfig(**one),),
        base=write_kind(folder / "base", kind),
        output=folder / output,
        fit=FitConfig(output=folder / f"runs-{output}", progress=False, **settings),
        denoise=DenoiseConfig(resolution=SIDE),
        draw=DRAW,
        **(more or {}),
    )

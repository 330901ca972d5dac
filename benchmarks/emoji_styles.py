"""What the LoRA of each held-out style conveys by itself, before it is mixed with anything.

    python benchmarks/emoji_styles.py [--quick]

Subjects that the base was trained on, and that the style's LoRA was shown in its style, are drawn
by the base in that style under the LoRA, and by the base alone in each style that it knows, from
the same noise. Image alignment is that of `composition.py`, to the true drawing in that style.
A LoRA that conveys its style comes nearer to it than the base in any style of its own. The unit is
the subject. No held-out subject is drawn.
"""

import argparse
from collections import defaultdict

import torch

from composition import Judges
from dreambooth.world.candidates import Candidate, load_candidates
from dreambooth.world.captions import with_article
from dreambooth.world.split import base_pairs
from dreambooth.world.world import Pair
from emoji_pairs import CONFIG, WORLD
from pipelines import MoLEStableDiffusionPipeline
from presets import load
from results import FOLDER, ROOT, measured, write_results

STEPS, GUIDANCE, PIXELS = 20, 3.0, 64
EVERY = 8  # Of the subjects that have drawings in all styles.


def drawn(subjects: list[str], style: str, lora: str | None = None) -> torch.Tensor:
    """A picture of each subject in a style, (n, 3, h, w) in [-1, 1]."""
    pipe = MoLEStableDiffusionPipeline.from_pretrained(str(WORLD / "base"))
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_experts([str(WORLD / "loras" / lora)])
    return 2 * torch.cat(
        [
            pipe(
                f"{with_article(subject)} in {style}",
                height=PIXELS,
                width=PIXELS,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(index),
                output_type="pt",
            ).images
            for index, subject in enumerate(subjects)
        ]
    ) - 1  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few subjects, for a look")
    quick = parser.parse_args().quick
    preset = load(CONFIG)
    judges = Judges(preset.domain.judge_name, preset.domain.clip_name)
    world = judges.world
    held_out = [one for one in load_candidates(WORLD) if one.kind == "style"]
    known = list(dict.fromkeys(pair.style.name for pair in base_pairs(world)))

    def pairs_of(subject: str) -> list[Pair]:
        styles = [*known, *(one.name for one in held_out)]
        return [Pair(world.subject(subject), world.style(style)) for style in styles]

    trained = list(dict.fromkeys(pair.subject.name for pair in base_pairs(world)))
    subjects = [name for name in trained if all(pair in judges.place for pair in pairs_of(name))]
    subjects = subjects[:: 60 if quick else EVERY]
    pictures = {f"base, {style}": drawn(subjects, f"{style} style") for style in known}

    def scores(one: Candidate) -> dict[str, dict[str, list[float]]]:
        arms = pictures | {"its LoRA": drawn(subjects, one.phrase, one.name)}
        found: dict[str, dict[str, list[float]]] = defaultdict(dict)
        truth = [judges.place[Pair(world.subject(s), world.style(one.name))] for s in subjects]
        for measure, eye in judges.eyes.items():
            for arm, made in arms.items():
                found[measure][arm] = (eye(made) * judges.seen[measure][truth]).sum(1).tolist()
        return found

    rows = []
    for one in held_out:
        for name, found in scores(one).items():
            measure = f"image alignment, {name} in {one.name}"
            rows += [measured(measure, arm, values) for arm, values in found.items()]
            nearest = max(pictures, key=lambda arm, found=found: sum(found[arm]))
            gained = [a - b for a, b in zip(found["its LoRA"], found[nearest], strict=True)]
            rows.append(measured(measure, f"its LoRA - {nearest}", gained))
    settings = {"steps": STEPS, "guidance": GUIDANCE, "subjects": len(subjects), "quick": quick}
    folder = ROOT / "out/benchmarks" if quick else FOLDER
    write_results("emoji_styles", rows, settings=settings, seeds=[0], folder=folder)


if __name__ == "__main__":
    main()

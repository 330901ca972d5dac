"""Measure a base, LoRAs or a mixture of them on tasks of lm-eval.

    pip install -e '.[evaluate]'
    python -m nlp.evaluate --config configs/text_evaluate.yaml

Writes lm-eval's results, and what was measured, as one JSON file, and prints a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mole_vl import Expert, Mixture, mix, read_peft
from mole_vl.faults import as_messages, at_least, refuse
from mole_vl.files import check_file, check_output_file, new_file
from mole_vl.gates import Average, GateSpec
from mole_vl.program import command
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from nlp.adapter import blocks
from nlp.data import Style, Tokenizer
from nlp.forms import form_of
from nlp.harness_run import Harness
from nlp.mixing import mix_by_file
from nlp.models import BUILT_IN, Bits, load_base


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and by which tasks.

    Args:
        tasks: Names that lm-eval knows (tasks, groups, tags), YAML files of tasks, or folders of
            them; a path has a slash or the end .yaml.
        output: The file of the results, JSON.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        experts: PEFT folders, whose names are the experts'; without any the base is measured.
        gate: What decides the experts' weights; with neither this nor `gates` they are averaged.
        site: Which layers share one gate: matrix, layer, block, network or preview; block if not
            given.
        after: With site network or preview, how many blocks run before the gate reads.
        gates: A file of trained gates, which says its own gate and site.
        encoder: With gates that read sentences, where their encoder is, if it was moved.
        num_fewshot: Worked examples before each question; each task's own number if not given.
        limit: The first so many questions of each task; all of them if not given.
        batch_rows: Rows in one forward.
        style: Questions as they stand (plain), or in the model's chat template (chat).
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    tasks: tuple[str, ...]
    output: Path
    base: str = BUILT_IN
    experts: tuple[Path, ...] = ()
    gate: GateSpec | None = None
    site: SiteKind | None = None
    after: int = 0
    gates: Path | None = None
    encoder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_rows: int = 8
    style: Style = "plain"
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        placed = {"gate": self.gate, "site": self.site, "after": self.after or None}
        given = [name for name, value in placed.items() if value is not None]
        refuse(
            "EvaluateConfig",
            [
                None if self.tasks else "tasks is empty",
                *(
                    f"{name} is given, and gates, whose file says its own: leave one out"
                    for name in given
                    if self.gates is not None
                ),
                *(
                    f"{name} is given, and no experts"
                    for name in [*given, *(["gates"] if self.gates is not None else [])]
                    if not self.experts
                ),
                "encoder is for gates, and none are given"
                if self.encoder is not None and self.gates is None
                else None,
                at_least("after", self.after, 0),
                at_least("num_fewshot", self.num_fewshot, 0),
                at_least("limit", self.limit, 1),
                at_least("batch_rows", self.batch_rows, 1),
            ],
        )


def mixed(
    model: Any, tokenizer: Tokenizer, experts: Sequence[Expert], config: EvaluateConfig
) -> Mixture | None:
    """The model mixed as the configuration says; None where it stays the base.

    Raises:
        FileNotFoundError: No gate file there.
        ValueError: Experts that do not fit, or gates of others.
    """
    if not experts:
        return None
    if config.gates is not None:
        return mix_by_file(model, tokenizer, experts, config.gates, encoder=config.encoder)
    return mix(
        model,
        experts,
        gate=config.gate or Average(),
        site=config.site or "block",
        after=config.after,
        blocks=blocks(model),
        calls=form_of(model).calls,
    )


def measured(config: EvaluateConfig, mixture: Mixture | None) -> dict[str, object]:
    """What was measured: base, experts by their hashes, gate and site."""
    base = {"base": config.base, "quantise": config.quantise, "style": config.style}
    if mixture is None:
        return base
    return {
        **base,
        "experts": dict(zip(mixture.names, mixture.digests, strict=True)),
        "gate": to_data(mixture.spec),
        "site": mixture.layout.kind,
        "after": mixture.layout.after,
        "gates": None if config.gates is None else str(config.gates),
        "features": None if mixture.features is None else mixture.features.name,
    }


def main(config: EvaluateConfig) -> None:
    """Read experts and tasks, load and mix the model, measure, write, print."""
    harness = Harness()
    state = PartialState()
    if state.num_processes > 1:
        raise ValueError(f"evaluation runs in one process, and here are {state.num_processes}")
    check_output_file("output", config.output)
    if config.gates is not None:
        check_file("gates", config.gates, "a file of gates, such as model.safetensors")
    experts = [read_peft(folder) for folder in config.experts]
    tasks = harness.load(config.tasks)
    model, tokenizer = load_base(config.base, quantise=config.quantise)
    mixture = mixed(model, tokenizer, experts, config)
    model.to(state.device)  # pyright: ignore[reportArgumentType]
    found = harness.measure(
        model,
        tokenizer,
        tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_rows=config.batch_rows,
        style=config.style,
    )
    found = {"measured": measured(config, mixture), **found}
    with new_file(config.output) as partial:
        partial.write_text(harness.to_json(found), encoding="utf-8")
    print(harness.table(found))
    print(f"results in {config.output}")


if __name__ == "__main__":
    with as_messages("nlp"):
        main(command(EvaluateConfig))

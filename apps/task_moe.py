"""A shelf of task experts and the classifier that chooses among them, from one YAML file.

    accelerate launch -m apps.task_moe train --config configs/text_classifier.yaml
    python -m apps.task_moe ask --config configs/text_classifier.yaml "Spell out 130 in French."

`train` trains the experts and classifiers that are not there yet: stopped at any moment it goes on
where it was. `ask` shows how probable each task is, and what the mixed experts answer; with
`--hard`, the most probable task's expert alone.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from mole_vl.faults import as_messages
from nlp.task_config import TaskMoEConfig, read_config
from nlp.task_moe import base_of, chosen, load_classifier, train
from pipelines.routed_text import Routed, RoutedText
from pipelines.text_generation import MoLETextGeneration


def load(config: TaskMoEConfig) -> RoutedText:
    """What was trained, ready to be asked.

    Raises:
        FileNotFoundError: An expert or a classifier that was not trained yet.
        ValueError: A classifier of other tasks.
    """
    missing = [str(config.shelf / name) for name in config.tasks
               if not (config.shelf / name).exists()]  # fmt: skip
    if missing:
        raise FileNotFoundError(f"no expert in {', '.join(missing)}: train first")
    kind = chosen(config)
    classifier = load_classifier(config.output / kind, kind)
    model, tokenizer = base_of(config)
    pipe = MoLETextGeneration(model.to(PartialState().device), tokenizer)  # pyright: ignore[reportArgumentType]
    pipe.load_experts([config.shelf / name for name in config.tasks], site="network")
    return RoutedText(pipe, classifier, config.templates())


def shown(one: Routed) -> str:
    """An answer with all that led to it."""
    shares = sorted(one.probabilities.items(), key=lambda item: -item[1])
    adapter = [f"{name} x {weight:.3f}" for name, weight in one.weights.items() if weight >= 5e-4]
    return "\n".join(
        [
            one.question,
            *(f"  {share:7.1%}  {name}" for name, share in shares),
            f"  adapter: {' + '.join(adapter)}",
            f"  answer:  {one.answer}",
        ]
    )


def ask(config: TaskMoEConfig, questions: Sequence[str], *, hard: bool, tokens: int) -> None:
    """Answer questions, and show the probabilities of their tasks."""
    routed = load(config)
    print(f"by the {chosen(config)} classifier")
    for one in routed(questions, hard=hard, max_new_tokens=tokens, do_sample=False):
        print(shown(one))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = ArgumentParser(
        prog="apps.task_moe", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in (("train", "train what is not there yet"), ("ask", "answer questions")):
        command = commands.add_parser(name, help=told)
        command.add_argument("--config", type=Path, required=True, help="the YAML file")
        if name == "ask":
            command.add_argument("--hard", action="store_true", help="one expert alone")
            command.add_argument("--max_new_tokens", type=int, default=64, help="of an answer")
            command.add_argument("questions", nargs="+", help="one or several")
    given = parser.parse_args(arguments)
    config = read_config(given.config)
    if given.command == "train":
        train(config)
    else:
        ask(config, given.questions, hard=given.hard, tokens=given.max_new_tokens)


if __name__ == "__main__":
    with as_messages("nlp", "pipelines"):
        main()

"""MixLoRA by the commands of m-LoRA and MoE-PEFT: create, go on, ask, judge.

    python -m apps.mixlora --base_model BASE --config configs/alpaca_mixlora.json --load_8bit
    python -m apps.mixlora --base_model BASE --config ... --load_8bit --load_adapter
    python -m apps.mixlora --base_model BASE --config ... --load_8bit --inference
    python -m apps.mixlora --base_model BASE --config ... --load_8bit --evaluate

The first trains the adapters of the file that do not stand yet: stopped at any moment it goes on
where it was. The second trains those that stand further. `accelerate launch -m apps.mixlora ...`
trains in several processes.
"""

import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mole_vl.faults import as_messages
from nlp.alpaca import AS_IT_STANDS, read_template
from nlp.evaluate_mixlora import evaluate
from nlp.mixlora_config import MixLoRASettings, read_settings
from nlp.mixlora_place import Adapters, Place
from nlp.train_experts import table
from nlp.train_mixlora import train
from pipelines.text_generation import MoLETextGeneration

ASKED = "INPUT WITHOUT PROMPT: "
QUIT = "QUIT"

_LOG = "each run's metrics.jsonl has its log"
_ATTENTION = "the base has transformers' own attention"
_CACHE = "the base has transformers' own cache"
_REFUSED = {
    "--attn_impl": _ATTENTION,
    "--cache_implementation": _CACHE,
    "--cuda_device": "set CUDA_VISIBLE_DEVICES",
    "--debug": _LOG,
    "--deterministic": "set CUBLAS_WORKSPACE_CONFIG",
    "--device": "accelerate chooses it: set CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=true",
    "--disable_adapter": "--evaluate judges the base alone beside each adapter",
    "--disable_cache": _CACHE,
    "--disable_log": _LOG,
    "--log_file": _LOG,
    "--log_level": _LOG,
    "--sliding_window": _ATTENTION,
    "--tf32": "set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
    "--trace": _LOG,
    "--use_swa": _ATTENTION,
    "--verbose": _LOG,
}


class _Refused(Action):
    """A flag of theirs that is none here."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert option_string is not None
        parser.error(f"{option_string} is not supported: {_REFUSED[option_string]}")


def parser() -> ArgumentParser:
    """The command line."""
    found = ArgumentParser(
        prog="apps.mixlora",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--base_model", required=True, help="a Hub id, a folder, or smollm2-135m-instruct")
    add("--config", type=Path, required=True, help="the JSON file of settings")
    add("--dir", type=Path, default=Path(), help="folder of the adapters")
    add("--load_adapter", action="store_true", help="go on with the adapters that stand there")
    add("--overwrite", action="store_true", help="make them anew")
    doing = found.add_mutually_exclusive_group()
    doing.add_argument("--inference", action="store_true", help="ask the adapters that stand there")
    doing.add_argument("--evaluate", action="store_true", help="judge them on held-out rows")
    weights = found.add_mutually_exclusive_group()
    for name, told in (
        ("8bit", "linear layers of the base in 8 bits"),
        ("4bit", "linear layers of the base in 4 bits"),
        ("16bit", "the base in bf16"),
    ):
        weights.add_argument(f"--load_{name}", action="store_true", help=told)
    precision = found.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="the base in bf16")
    precision.add_argument("--fp16", action="store_true", help="the base in fp16")
    add("--model_type", help="what the base must be, such as llama")
    add("--tokenizer", help="another tokenizer than the base's own")
    add("--seed", type=int, default=42, help="of everything random")
    add("--disable_prompter", action="store_true", help="ask without the template")
    add("--instruction", action="append", help="ask this, and do not wait for lines")
    add("--max_new_tokens", type=int, default=128, help="the most tokens of an answer")
    add("--test_data", help="rows to judge by: a JSON file or a Hub id")
    for name in _REFUSED:
        add(name, action=_Refused, nargs="*", help=SUPPRESS)
    return found


def _check(given: Namespace, found: ArgumentParser) -> None:
    """End the program where a flag would have no effect."""
    asked = given.inference or given.evaluate
    for flag, on, wants in (
        ("--disable_prompter", given.disable_prompter, "--inference"),
        ("--instruction", given.instruction, "--inference"),
        ("--max_new_tokens", given.max_new_tokens != 128, "--inference"),
        ("--test_data", given.test_data, "--evaluate"),
    ):
        if on and not getattr(given, wants[2:]):
            found.error(f"{flag} is for {wants}")
    if given.overwrite and (asked or given.load_adapter):
        found.error("--overwrite makes adapters anew, and they are to be taken as they stand")
    if given.load_16bit and given.fp16:
        found.error("--load_16bit is bf16, and --fp16 is given too")
    if given.max_new_tokens < 1:
        found.error(f"--max_new_tokens is {given.max_new_tokens}, expected at least 1")


def place_of(given: Namespace) -> Place:
    """The base, and where its adapters stand, as a command line says."""
    half = torch.float16 if given.fp16 else torch.bfloat16
    return Place(
        base=given.base_model,
        folder=given.dir,
        quantise="8bit" if given.load_8bit else "4bit" if given.load_4bit else None,
        dtype=half if given.fp16 or given.bf16 or given.load_16bit else torch.float32,
        kind=given.model_type,
        tokenizer=given.tokenizer,
        seed=given.seed,
    )


def lines() -> Iterator[str]:
    """Instructions, a line each, until QUIT or the input's end."""
    while True:
        try:
            line = input(ASKED)
        except EOFError:
            return
        if line.strip() == QUIT:
            return
        if line.strip():
            yield line


def ask(settings: MixLoRASettings, place: Place, given: Namespace) -> None:
    """Answer each instruction by each adapter, its likeliest tokens one after the other."""
    templates = {
        one.name: AS_IT_STANDS
        if given.disable_prompter
        else read_template(f"prompt of {one.name}", one.prompt)
        for one in settings.lora
    }
    adapters = Adapters(settings, place)
    pipe = MoLETextGeneration(adapters.model, adapters.tokenizer)
    for instruction in given.instruction or lines():
        for name, template in templates.items():
            with adapters.speaking(name):
                (answer,) = pipe(
                    template.prompt(instruction),
                    max_new_tokens=given.max_new_tokens,
                    do_sample=False,
                )
            print(f"{name}: {answer}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what a command line says."""
    found = parser()
    given = found.parse_args(arguments)
    _check(given, found)
    settings, place = read_settings(given.config), place_of(given)
    if PartialState().is_main_process:
        for key, why in settings.unused.items():
            print(f"{key} has no effect: {why}", file=sys.stderr)
    if given.inference:
        ask(settings, place, given)
    elif given.evaluate:
        scores = evaluate(settings, place, given.test_data)
        if PartialState().is_main_process:
            print(table(scores))
    else:
        train(settings, place, go_on=given.load_adapter, overwrite=given.overwrite)


if __name__ == "__main__":
    with as_messages("nlp", "pipelines"):
        main()

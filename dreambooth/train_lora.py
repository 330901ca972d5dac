"""Train DreamBooth LoRAs over one base and write each as component folders of PEFT's format.

    accelerate launch -m dreambooth.train_lora --config configs/emoji_loras.yaml

Stopped at any moment it goes on where it was; LoRAs whose folder stands are not trained again.
`--dry_run true` shows what it would cost. Precision is accelerate's: with `--mixed_precision bf16`
the frozen weights are kept in it too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from dreambooth.adapting import adapted, check_candidate
from dreambooth.base import Base
from dreambooth.candidates import CandidateConfig, CandidatesConfig
from dreambooth.class_pictures import check_recipe, class_examples, draw_class, missing_pictures
from dreambooth.cost import cost
from dreambooth.data import Example, read_examples
from dreambooth.denoise import DenoiseTask, Prior
from dreambooth.identifiers import notice, split_identifiers
from dreambooth.lora_files import write_lora
from dreambooth.notices import tell
from dreambooth.samples import sampling_watch
from dreambooth.subjects import expand
from mole_vl import Expert, write_peft
from mole_vl.faults import as_messages
from mole_vl.files import check_output, digest, new_folder
from mole_vl.program import command
from mole_vl.training import FitResult, fit

_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What fp16 cannot hold is no LoRA; all programs read it.
_STORED = torch.float16


def train_candidate(
    base: Base, examples: Sequence[Example], candidate: CandidateConfig, config: CandidatesConfig
) -> FitResult:
    """Train one LoRA on `base`, write its folder, and leave `base` as it was.

    Raises:
        ValueError: A target that names no layer, or one that takes no pair.
    """
    run = replace(
        config.fit,
        output=config.fit.output / candidate.name,
        steps=candidate.steps or config.fit.steps,
    )
    check_candidate(base, candidate)
    prior = None
    if candidate.prior is not None:
        draw_class(base, candidate.prior, config.denoise.resolution, config.draw)
        prior = Prior(class_examples(candidate.prior), candidate.prior.weight)
    lesson = _lesson(base, examples, prior, candidate, config)
    watch = sampling_watch(base, candidate, config)
    set_seed(run.seed)
    with adapted(base, candidate, config.checkpointing) as lora:
        task = DenoiseTask(base, examples, lora.parameters, config.denoise, prior)
        result = fit(task, run, lesson, watch)
        if PartialState().is_main_process:
            _write(lora.experts(candidate.name, base.name), candidate, config)
        PartialState().wait_for_everyone()
    return result


def _lesson(
    base: Base,
    examples: Sequence[Example],
    prior: Prior | None,
    candidate: CandidateConfig,
    config: CandidatesConfig,
) -> dict[str, object]:
    """What decides the weights beside the loop's own settings."""
    return {
        "base": base.name,
        "data": _digest(examples),
        "rank": candidate.rank,
        "alpha": candidate.alpha,
        "targets": candidate.targets,
        "text_encoder": asdict(candidate.text) if candidate.text else None,
        "prior": (prior.weight, _digest(prior.examples)) if prior else None,
        "denoise": asdict(config.denoise),
    }


def _digest(examples: Sequence[Example]) -> str:
    captions = json.dumps([example.text for example in examples]).encode()
    return hashlib.sha256(captions).hexdigest()[:16] + digest(e.file for e in examples)[:16]


def _write(
    experts: dict[str, Expert], candidate: CandidateConfig, config: CandidatesConfig
) -> None:
    files = {"diffusers": LORA_WEIGHT_NAME_SAFE, "kohya": f"{candidate.name}.safetensors"}
    # Where kohya's readers look for the words that call a LoRA.
    words = {"modelspec.trigger_phrase": candidate.prompt} if candidate.prompt else {}
    with new_folder(config.output / candidate.name) as folder:
        for component, expert in experts.items():
            write_peft(expert, folder / component, dtype=_STORED)
        for form in config.also:
            write_lora(experts, folder / files[form], form, metadata=words, dtype=_STORED)


def main(config: CandidatesConfig) -> None:
    """Train the LoRAs that are not there yet."""
    config = replace(config, candidates=expand(config.candidates))
    missing = [c for c in config.candidates if not (config.output / c.name).exists()]
    if not missing:
        print(f"all {len(config.candidates)} LoRAs are in {config.output}")
        return
    check_output("output", config.output)
    check_output("fit.output", config.fit.output)
    # All folders are read before the first step: a fault in the last one shows at once.
    examples = {c.name: read_examples(c.data, c.prompt) for c in missing}
    base = Base.load(config.base, _PRECISION.get(Accelerator().mixed_precision, torch.float32))
    base.check_resolution(config.denoise.resolution)
    for candidate in missing:
        _check(base, candidate, examples[candidate.name], config)
    for candidate in missing:
        _introduce(base, candidate, examples[candidate.name], config)
    if config.dry_run:
        return
    for candidate in missing:
        result = train_candidate(base, examples[candidate.name], candidate, config)
        tell(
            f"{config.output / candidate.name}: {len(examples[candidate.name])} examples, "
            f"{result.step} steps, {result.seconds:.0f} s"
        )


def _check(
    base: Base, candidate: CandidateConfig, examples: Sequence[Example], config: CandidatesConfig
) -> None:
    """Find a candidate's faults before anything is trained."""
    check_candidate(base, candidate)
    prompts = [*(example.text for example in examples), *candidate.samples, config.draw.negative]
    if candidate.prior is not None:
        prompts.append(candidate.prior.prompt)
        check_recipe(base.name, candidate.prior, config.denoise.resolution, config.draw)
        if not missing_pictures(candidate.prior):
            class_examples(candidate.prior)
    base.check_prompts(dict.fromkeys(prompts))


def _introduce(
    base: Base, candidate: CandidateConfig, examples: Sequence[Example], config: CandidatesConfig
) -> None:
    tell(cost(base, candidate, examples, config))
    plain = candidate.prior.prompt if candidate.prior is not None else None
    captions = (example.text for example in examples)
    tell(notice(candidate.name, split_identifiers(base.tokenizer, captions, plain)))


if __name__ == "__main__":
    with as_messages("dreambooth"):
        main(command(CandidatesConfig))

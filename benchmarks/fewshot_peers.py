"""The peers of the few-shot benchmark: what others' code makes of the same shelf.

Every arm puts its adapters on the base and takes them off again. Peers that want adapters of one
shape get exact copies of the experts; peft's merges take the experts as they are.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nevergrad as ng
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fewshot_ablation import PRESET
from fewshot_bench import Bench, Lesson
from peft import LoraConfig, XLoraConfig, get_peft_model, set_peft_model_state_dict

from merges import DENSITY, KINDS, Kind, PeftMerges
from mole_vl import Expert, Factors, write_peft
from mole_vl.files import check_file
from mole_vl.peft_folder import peft_tensors
from nlp.data import TextRow, to_device
from nlp.forms import form_of
from nlp.task import LanguageTask, answer_losses
from results import FOLDER


def of_one_shape(experts: Sequence[Expert]) -> list[Expert]:
    """Exact copies of experts that agree in rank, scale and layers.

    Ranks are padded with zeros to the largest; alpha is folded into B, so that all scales are 1; a
    layer that only others change gets zeros.
    """
    rank = max(factors.rank for expert in experts for factors in expert.layers.values())
    shapes = {path: one.shape for expert in experts for path, one in expert.layers.items()}
    return [
        Expert(
            expert.name,
            {path: _padded(expert.layers.get(path), rank, shapes[path]) for path in sorted(shapes)},
        )
        for expert in experts
    ]


def _padded(factors: Factors | None, rank: int, shape: Sequence[int]) -> Factors:
    if factors is None:
        return Factors(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank), 1.0)
    more = rank - factors.rank
    a, b = factors.a.float(), factors.b.float() * factors.scale
    return Factors(F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)), 1.0)


@contextmanager
def folders_of(experts: Mapping[str, Expert]) -> Iterator[dict[str, Path]]:
    """PEFT folders of experts by adapter, which stand as long as the context."""
    with TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in experts}
        for name, folder in folders.items():
            write_peft(experts[name], folder)
        yield folders


@contextmanager
def merges_of(bench: Bench, task: str) -> Iterator[PeftMerges]:
    """The base under the shelf's adapters, which peft merges; the base alone afterwards."""
    with folders_of({expert.name: expert for expert in bench.experts(task)}) as folders:
        merges = PeftMerges(bench.model, folders)
    try:
        yield merges
    finally:
        merges.model.unload()


@dataclass(frozen=True)
class Merge:
    """An arm of peft's `add_weighted_adapter`, all experts weighed alike.

    Args:
        kind: The merge.
        total: Sum of the weights.
        density: Share of an expert's update that TIES and DARE keep; the others keep all.
    """

    kind: Kind
    total: float
    density: float = DENSITY

    def __call__(self, bench: Bench, lesson: Lesson) -> dict[str, Any]:
        """Merge, then ask."""
        with merges_of(bench, lesson.task) as merges:
            weight = self.total / len(merges.names)
            with merges.merged(self.kind, weight, self.density):
                return bench.judge(lesson.asked, model=merges.model)


def chosen_merges() -> dict[str, Merge]:
    """Each of peft's merges as `fewshot_merges.py` chose it, once, on development tasks.

    Raises:
        FileNotFoundError: It did not choose yet.
    """
    file = FOLDER / "fewshot_merges.json"
    check_file("merges", file, "the choice that python benchmarks/fewshot_merges.py writes")
    chosen = json.loads(file.read_text())["settings"]["chosen"]
    return {f"peft {kind}": Merge(kind, **chosen[kind]) for kind in KINDS}


@dataclass(frozen=True)
class SummedApart:
    """The base under one adapter, whose A and whose B are weighted sums of the experts' own.

    Its update is (sum_e w_e B_e)(sum_e w_e A_e), alphas within B: each weight counts twice, and one
    expert's B meets another's A.

    Args:
        model: The base under peft.
        names: The experts', in order.
        factors: Those of all experts, stacked, by peft's keys.
    """

    model: Any
    names: Sequence[str]
    factors: Mapping[str, torch.Tensor]

    def put(self, weights: Sequence[float]) -> None:
        """Give the experts these weights, in order."""
        state = {
            key: torch.tensordot(torch.tensor(weights).to(stack), stack, 1)
            for key, stack in self.factors.items()
        }
        set_peft_model_state_dict(self.model, state)


@contextmanager
def summed_apart(bench: Bench, task: str) -> Iterator[SummedApart]:
    """The base under a sum of the shelf's adapters, A and B apart; the base alone afterwards."""
    copies = of_one_shape(bench.experts(task))
    tensors = [peft_tensors(copy) for copy in copies]
    factors = {
        f"base_model.model.{key}": torch.stack([one[key] for one in tensors]).to(bench.device)
        for key in tensors[0]
    }
    rank = next(iter(copies[0].layers.values())).rank
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(copies[0].layers),
        task_type=form_of(bench.model).task_type,
    )
    model = get_peft_model(bench.model, config)
    try:
        yield SummedApart(model, [copy.name for copy in copies], factors)
    finally:
        model.unload()


def uniform(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """MTTL's `uniform`: the mean of the experts' A, and that of their B."""
    with summed_apart(bench, lesson.task) as summed:
        summed.put([1 / len(summed.names)] * len(summed.names))
        return bench.judge(lesson.asked, model=summed.model)


def lorahub_objective(
    bench: Bench, summed: SummedApart, few: Sequence[TextRow]
) -> Callable[[Sequence[float]], float]:
    """What LoRAHub's public code minimises: the examples' mean loss, in one batch, by their number.

    Beside it 0.05 times the weights' mean absolute value, so that of 64 examples the loss counts a
    quarter of what it counts of 16.
    """
    rows = form_of(bench.model).rows(bench.encoded(few), bench.tokenizer.pad_token_id)
    batch, autocast = to_device(rows, bench.device), Accelerator().autocast

    def objective(weights: Sequence[float]) -> float:
        summed.put(weights)
        with torch.no_grad(), autocast():
            losses, scored = answer_losses(summed.model, batch)
        mean = float(losses.sum() / scored.sum())
        return mean / len(few) + 0.05 * float(np.abs(weights).mean())

    return objective


def lorahub(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """LoRAHub as its public code has it: A and B summed apart, 40 trials (arXiv 2307.13269)."""
    with summed_apart(bench, lesson.task) as summed:
        objective = lorahub_objective(bench, summed, lesson.few)
        start = time.perf_counter()
        space = ng.p.Array(init=np.zeros(len(summed.names)), lower=-1.5, upper=1.5)
        space.random_state = np.random.RandomState(42)
        search = ng.optimizers.NGOpt(space, budget=40)
        with warnings.catch_warnings():
            # What nevergrad asks of scipy is scipy's to mend, and is mended there.
            warnings.filterwarnings("ignore", "COBYLA: Invalid")
            weights = search.minimize(objective).value
        summed.put(weights)
        seconds = time.perf_counter() - start
        told = {name: round(float(w), 3) for name, w in zip(summed.names, weights, strict=True)}
        found = bench.judge(lesson.asked, model=summed.model)
    return found | {"seconds": seconds, "weights": told}


@contextmanager
def x_lora_of(bench: Bench, task: str) -> Iterator[Any]:
    """The base under peft's X-LoRA of the shelf, untrained; the base alone afterwards."""
    copies = of_one_shape(bench.experts(task))
    config, cached = bench.model.config, bench.model.config.use_cache
    # It demands numbers as names, and a model without cache: its first pass would fill the one that
    # its second reads, and the answers would be others.
    with (
        ExitStack() as undo,
        folders_of({str(i): copy for i, copy in enumerate(copies)}) as folders,
    ):
        undo.callback(setattr, config, "use_cache", cached)
        config.use_cache = False
        torch.manual_seed(0)
        settings = XLoraConfig(
            task_type=form_of(bench.model).task_type,
            hidden_size=config.hidden_size,
            adapters={name: str(folder) for name, folder in folders.items()},
        )
        model = get_peft_model(bench.model, settings)
        undo.callback(model.unload)
        yield model


@dataclass(frozen=True)
class XLora:
    """An arm of peft's X-LoRA class, in its own defaults: one linear layer, softmax, two passes.

    Args:
        lr: Of the classifier; the default is the better of two on development tasks (`xlora.py`).
        steps: Of 16 examples.
    """

    lr: float = 5e-3
    steps: int = PRESET.steps

    def __call__(self, bench: Bench, lesson: Lesson) -> dict[str, Any]:
        """Train the classifier on the examples, then ask."""
        with x_lora_of(bench, lesson.task) as model:
            task = LanguageTask(
                model,
                bench.encoded(lesson.few),
                pad=bench.tokenizer.pad_token_id,
                parameters={name: p for name, p in model.named_parameters() if p.requires_grad},
            )
            seconds = bench.taught(task, steps=self.steps, lr=self.lr)
            return bench.judge(lesson.asked, model=model) | {"seconds": seconds}

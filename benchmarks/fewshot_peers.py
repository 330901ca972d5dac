"""The peers of the few-shot benchmark: what others' code makes of the same shelf.

Every arm puts its adapters on the base and takes them off again. Peers that want adapters of one
shape get exact copies of the experts; peft's merges take the experts as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from fewshot_bench import Bench, Lesson
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from merges import DENSITY, Kind, PeftMerges
from mole_vl import Expert, Factors, write_peft
from mole_vl.peft_folder import peft_tensors
from nlp.forms import form_of


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


@dataclass(frozen=True)
class SummedApart:
    """The base under one adapter, whose A and whose B are weighted sums of the experts' own.

    Its update is (sum_e w_e B_e)(sum_e w_e A_e), alphas within B: each weight counts twice, and one
    expert's B meets another's A.

    Args:
        model: The base under peft.
        factors: Those of all experts, stacked, by peft's keys.
    """

    model: Any
    factors: Mapping[str, torch.Tensor]

    @property
    def experts(self) -> int:
        """How many are summed."""
        return len(next(iter(self.factors.values())))

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
        yield SummedApart(model, factors)
    finally:
        model.unload()


def uniform(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """MTTL's `uniform`: the mean of the experts' A, and that of their B."""
    with summed_apart(bench, lesson.task) as summed:
        summed.put([1 / summed.experts] * summed.experts)
        return bench.judge(lesson.asked, model=summed.model)

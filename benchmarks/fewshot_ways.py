"""All ways to a new task from a few examples, which `fewshot.py` measures side by side.

Ways that learn nothing from the examples: the base; sum; NLA; Arrow (top 4); MTTL's uniform; peft's
merges, as `fewshot_merges.py` chose them; the routers of `shelf_routers.py`, PHATGOOSE (top 2) and
a task classifier's shares. Ways that learn:
the base with the examples before the prompt; the expert that likes them best; LoRAHub's search with
its own settings, exact on Delta-W, and in its own arithmetic; peft's X-LoRA, and X-LoRA in one
pass, whose gate reads each token's state behind a third of the blocks, with learned constants
below; a LoRA trained on the examples alone; gates, the preset that `fewshot_ablation.py` chose.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewshot_ablation import PRESET, XLORA
from fewshot_bench import ROWS, Arm, Bench, Gates, Lesson, asked_within
from fewshot_peers import XLora, chosen_merges, lorahub as lorahub_apart, uniform
from peft import PeftModel
from shelf_routers import PHATGOOSE, STREAM, classified, phatgoose
from text_admission import ALL_LINEAR

from mole_vl.gates import Arrow, Average, GateSpec, LoRAHub, Sum
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from mole_vl.training import FitConfig
from mole_vl.training.search import SearchConfig, search
from nlp.adapter import bound
from nlp.answers import log_likelihood
from nlp.models import BUILT_IN
from nlp.train_experts import LoRA, train_expert

STEPS = {16: 40, 64: 80}
"""Steps of training by the number of examples, for all that are trained."""
GATES = "gates"


def examples_first(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The base, shown the examples with their answers before each prompt: 16 of them at most."""
    solved = "".join(f"{row.prompt} {row.answer}\n" for row in lesson.few[:ROWS])
    return bench.judge([replace(row, prompt=solved + row.prompt) for row in lesson.asked])


def best_expert(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The one expert under which the examples' answers are most likely."""
    mixture = bench.mixed(lesson.task, Average())
    few, liked = bench.encoded(lesson.few), {}
    for name in mixture.names:
        with mixture.pinned({name: 1.0}):
            told = log_likelihood(bench.model, bench.tokenizer, few, around=bound(mixture))
        liked[name] = sum(told)
    best = max(liked, key=lambda name: liked[name])
    with mixture.pinned({best: 1.0}):
        found = bench.judge(lesson.asked, around=bound(mixture))
    mixture.unmix()
    return found | {"expert": best}


def lorahub(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """Constants by LoRAHub's search: 40 trials, on all examples."""
    mixture = bench.mixed(lesson.task, LoRAHub())
    run = bench.out / f"search {time.time_ns()}"
    config = SearchConfig(output=run, rows=len(lesson.few), progress=False)
    start = time.perf_counter()
    search(bench.language(mixture, lesson.few), {"model": mixture}, config)
    seconds = time.perf_counter() - start
    found = bench.judge(lesson.asked, around=bound(mixture)) | {"seconds": seconds}
    mixture.unmix()
    shutil.rmtree(run)
    return found


@dataclass(frozen=True)
class OwnLoRA:
    """A LoRA on all linear layers, trained on the examples, with no expert."""

    steps: int
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-3

    def __call__(self, bench: Bench, lesson: Lesson) -> dict[str, Any]:
        """Train on the examples, then ask."""
        folder = bench.out / f"lora {time.time_ns()}"
        run = FitConfig(
            output=folder / "run", steps=self.steps, rows=ROWS, lr=self.lr, warmup=5, progress=False
        )
        start = time.perf_counter()
        train_expert(
            bench.model,
            bench.encoded(lesson.few),
            LoRA(name="own", rank=self.rank, alpha=self.alpha, targets=ALL_LINEAR),
            run,
            pad=bench.tokenizer.pad_token_id,
            base=BUILT_IN,
            output=folder,
            lesson={},
        )
        seconds = time.perf_counter() - start
        adapted = PeftModel.from_pretrained(bench.model, folder / "own")
        found = bench.judge(lesson.asked, model=adapted) | {"seconds": seconds}
        adapted.unload()
        shutil.rmtree(folder)
        return found


def untouched(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """The base."""
    return bench.judge(lesson.asked)


@dataclass(frozen=True)
class Way:
    """One way to a new task: an arm, and how it is made, which is kept with its cells."""

    arm: Arm
    made: Mapping[str, Any]


def made_by(arm: Callable[[Bench, Lesson], dict[str, Any]], **made: Any) -> Way:
    """A way that is made as its own code says."""
    return Way(arm, {"arm": arm.__name__, **made})


def fixed(gate: GateSpec, site: SiteKind = "network") -> Way:
    """A way whose gates learn nothing."""
    return Way(asked_within(gate, site), {"gate": to_data(gate), "site": site})


def taught(gates: Gates) -> Way:
    """A way whose gates learn from the examples."""
    return Way(gates, gates.settings())


FIXED: Mapping[str, Way] = {
    "base": made_by(untouched),
    "sum": fixed(Sum()),
    "NLA": fixed(Average()),
    "Arrow": fixed(Arrow(top_k=4), "matrix"),
    "MTTL's uniform": made_by(uniform),
    "PHATGOOSE": Way(phatgoose, {"gate": to_data(PHATGOOSE.gate), "steps": PHATGOOSE.fit.steps}),
    "classifier, soft": Way(classified(hard=False), {"trained on": STREAM.name}),
    **{name: Way(merge, asdict(merge)) for name, merge in chosen_merges().items()},
}


def learned(shots: int) -> Mapping[str, Way]:
    """The ways that learn from examples, as they do from this many."""
    steps = STEPS[shots]
    return {
        "base, examples in the prompt": made_by(examples_first, examples=ROWS),
        "best expert": made_by(best_expert),
        "LoRAHub, on Delta-W": made_by(lorahub, trials=SearchConfig.evaluations),
        "LoRAHub, A and B apart": made_by(lorahub_apart, arithmetic="A and B apart"),
        "PEFT's X-LoRA": Way(XLora(steps=steps), asdict(XLora(steps=steps))),
        "X-LoRA in one pass": taught(replace(XLORA, steps=steps)),
        "LoRA of the examples": Way(OwnLoRA(steps), asdict(OwnLoRA(steps))),
        GATES: taught(replace(PRESET, steps=steps)),
    }


LEARNED = tuple(learned(min(STEPS)))

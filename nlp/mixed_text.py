"""Gates over task LoRAs, on a stream of mixed questions or on a few examples of a new task."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from mole_vl import Mixture, mix, read_peft
from mole_vl.arithmetic import without_general
from mole_vl.arms import Arm, arms
from mole_vl.domain import Domain, gate_parameters
from mole_vl.experts import check_names
from mole_vl.faults import at_least, refuse
from mole_vl.files import new_file
from mole_vl.gates import GateSpec
from mole_vl.losses import balanced
from mole_vl.sites import SiteKind
from mole_vl.training import Task
from nlp.adapter import blocks, bound
from nlp.answers import exact_match
from nlp.conditioning import sentence
from nlp.data import EncodedRow, Style, TextRow, digest_rows
from nlp.dataset import RowSource, rows_of
from nlp.forms import form_of
from nlp.models import BUILT_IN, Bits, load_base
from nlp.task import LanguageTask

ORACLE = "oracle"


class MixedText(Domain):
    """Task LoRAs over one language model; gates learn from answers, no task name given.

    Args:
        experts: PEFT folders; an expert's name is its folder's.
        train: Rows that the gates learn from: JSON lines of prompt, answer and task, or a dataset
            with its templates (`nlp.dataset.DatasetRows`).
        test: Held-out rows for the report, as `train`. Where their tasks are experts' names, the
            report asks the oracle, each row's own expert; where no task is one, each expert alone.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        batch_rows: Rows generated at once for the report.
        asked: Held-out rows of each task that the report asks; all of them if not given.
        general: PEFT folders of LoRAs of what every task needs: their mean update is taken from
            each expert's (`mole_vl.arithmetic.without_general`). The gates are for what remains.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
        encoder: A sentence encoder whose view of each prompt the gate reads too, for site preview:
            a Hub id, a folder, or all-minilm-l6-v2 (by pip).
    """

    def __init__(
        self,
        experts: list[Path],
        train: RowSource,
        test: RowSource,
        base: str = BUILT_IN,
        style: Style = "plain",
        context: int = 1024,
        batch_rows: int = 32,
        asked: int | None = None,
        general: Sequence[Path] = (),
        quantise: Bits | None = None,
        encoder: str | None = None,
    ) -> None:
        counts = {"context": (context, 2), "batch_rows": (batch_rows, 1), "asked": (asked, 1)}
        refuse("MixedText", [at_least(name, *count) for name, count in counts.items()])
        self.experts = experts
        self.train = train
        self.test = test
        self.base = base
        self.style: Style = style
        self.context = context
        self.batch_rows = batch_rows
        self.asked = asked
        self.general = general
        self.quantise: Bits | None = quantise
        self.encoder = encoder

    def mix(self, gate: GateSpec, site: SiteKind, after: int = 0) -> Mapping[str, Mixture]:
        """Load base, rows and experts, and mix."""
        train = rows_of("train", self.train)
        test = first_of_each(rows_of("test", self.test), self.asked)
        general = [read_peft(folder) for folder in self.general]
        experts = [read_peft(folder) for folder in self.experts]
        check_names(experts)
        experts = without_general(experts, general)
        self._check_tasks(test, [expert.name for expert in experts])
        # The built-in base is converted into the cache at its first use: by one process.
        with PartialState().main_process_first():
            self.model, self.tokenizer = load_base(self.base, quantise=self.quantise)
        form = form_of(self.model)
        self.train_rows, self.test_rows = (
            form.encode_rows(
                rows, self.tokenizer, style=self.style, context=self.context, source=source
            )
            for rows, source in ((train, f"train: {self.train}"), (test, f"test: {self.test}"))
        )
        self.mixture = mix(
            self.model,
            experts,
            gate=gate,
            site=site,
            after=after,
            blocks=blocks(self.model),
            features=sentence(self.encoder, self.model, self.tokenizer),
        )
        return {"model": self.mixture}

    def _check_tasks(self, rows: Sequence[TextRow], names: Sequence[str]) -> None:
        tasks = {row.task for row in rows}
        strange = sorted(tasks - set(names))
        if strange and strange != sorted(tasks):
            raise ValueError(
                f"test: in {self.test} a row's task is {strange[0]!r}, and no expert has that name "
                f"({', '.join(names)}): name the expert's folder so, or leave such rows out"
            )

    def lesson(self) -> dict[str, object]:
        """The base, the rows and how they are shown."""
        quantise = {"quantise": self.quantise} if self.quantise else {}
        return {
            "base": self.base,
            **quantise,
            "train": digest_rows(row.row for row in self.train_rows),
            "style": self.style,
            "context": self.context,
        }

    def task(self, balance: float) -> Task:
        """Language modelling of the answers."""
        return LanguageTask(
            self.model,
            self.train_rows,
            pad=self.tokenizer.pad_token_id,
            parameters=gate_parameters({"model": self.mixture}),
            around=bound(self.mixture, balanced(balance)),
        )

    def hits(self, names: Sequence[str] | None = None) -> dict[str, list[bool]]:
        """Exact match of each held-out row by arm; `oracle` takes each row's own expert.

        Args:
            names: The arms wanted; if not given, the base, the merges, the gates, and the oracle,
                or each expert where there is none.
        """
        table = arms([self.mixture])
        experts = self.mixture.names
        known = any(row.row.task in experts for row in self.test_rows)
        found = {}
        for name in names or ["base", "sum", "NLA", "gates", *([ORACLE] if known else experts)]:
            found[name] = self._oracle() if name == ORACLE else self._hits(table[name])
        return found

    def _hits(self, arm: Arm, rows: Sequence[EncodedRow] | None = None) -> list[bool]:
        """Every process asks its part of the rows; all of them learn all hits."""
        rows = self.test_rows if rows is None else rows
        state = PartialState()
        with arm():
            mine = exact_match(
                self.model,
                self.tokenizer,
                rows[state.process_index :: state.num_processes],
                batch_rows=self.batch_rows,
                around=bound(self.mixture),
            )
        hits = [False] * len(rows)
        for process, part in enumerate(gather_object([mine])):
            hits[process :: state.num_processes] = part
        return hits

    def _oracle(self) -> list[bool]:
        table = arms([self.mixture])
        hits = [False] * len(self.test_rows)
        for task in sorted({row.row.task for row in self.test_rows}):
            places = [i for i, row in enumerate(self.test_rows) if row.row.task == task]
            found = self._hits(table[task], [self.test_rows[place] for place in places])
            for place, hit in zip(places, found, strict=True):
                hits[place] = hit
        return hits

    def report(self, folder: Path) -> str:
        """Exact match by task and arm; the rows' hits are left in `hits.json`."""
        hits = self.hits()
        tasks = [row.row.task for row in self.test_rows]
        if PartialState().is_main_process:
            with new_file(folder / "hits.json") as partial:
                partial.write_text(json.dumps({"task": tasks, **hits}))
        return table(tasks, hits)


def first_of_each(rows: Sequence[TextRow], count: int | None) -> list[TextRow]:
    """The first `count` rows of each task, in their order; all rows for None."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.task] += 1
        if count is None or seen[row.task] <= count:
            kept.append(row)
    return kept


def table(tasks: Sequence[str], hits: Mapping[str, Sequence[bool]]) -> str:
    """Exact match by task and arm, in Markdown."""
    lines = [f"| exact match | {' | '.join(hits)} |", "|---" * (len(hits) + 1) + "|"]
    for task in [*sorted(set(tasks)), None]:
        cells = []
        for arm in hits.values():
            picked = [hit for hit, own in zip(arm, tasks, strict=True) if task in (own, None)]
            cells.append(f"{sum(picked) / len(picked):.3f}")
        lines.append(f"| {task or '**all**'} | {' | '.join(cells)} |")
    return "\n".join(lines)

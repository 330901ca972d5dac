"""How the stream's gates do in wordings that they were not taught: what their preset was chosen by.

    python benchmarks/stream_wordings.py            # --quick: few rows, for a look

Five folds over the wordings of `shelf_train`, 12 to 23 a task: a gate learns from the rows of four,
as it does in `mixed_stream.py` (but that its centre is the mean of all of them), and routes those
of the fifth. The unit is the wording, its rows averaged. Two measures: how many rows go to their
own expert, and the likelihood of their answers under the expert that they go to, over that under
their own. What the experts say of each row is asked once for all variants.
"""

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fewshot_bench import WORLD, Bench
from mixed_stream import ALONE, GATES, LEARNED, Learned, over_oracle
from torch import Tensor

from mole_vl.gates import Hidden, MoLE
from mole_vl.gates.gate import Previewed
from mole_vl.gates.scores import HiddenScore, Pooled
from mole_vl.specs import to_data
from mole_vl.training import FitConfig, fit
from mole_vl.training.choice import ChoiceTask
from mole_vl.training.survey import Survey, asked
from nlp.data import TextRow, digest_rows, read_rows
from nlp.world.tasks import SHELF
from results import FOLDER, ROOT, Measurement, measured, write_results

FOLDS = 5
PRESET = LEARNED[GATES]


def variant(*pool: Pooled, after: int = 24, shown: Previewed = "average") -> Learned:
    """Gates of the states alone with other parts pooled, another depth, or another preview."""
    return replace(ALONE, gate=MoLE(score=Hidden(pool=pool), preview=shown), after=after)


def reading(how: Learned, decay: float) -> Learned:
    """The same gates that read the sentence too, at another weight decay."""
    return replace(how, encoder=PRESET.encoder, weight_decay=decay)


WHOLE = variant("mean", "max", "last")
VARIANTS = {
    "sentence; mean, max, last; 24; decay 3": reading(WHOLE, 3.0),
    "sentence; mean, max, last; 24; decay 1": reading(WHOLE, 1.0),
    "sentence; mean, max, last; 24": reading(WHOLE, 0.0),
    "sentence; mean, last; 24; decay 3": reading(variant("mean", "last"), 3.0),
    "sentence; mean; 24; decay 3": reading(variant("mean"), 3.0),
    "sentence; mean, max, last; 27; decay 3": reading(
        variant("mean", "max", "last", after=27), 3.0
    ),
    "mean, max, last; 24; decay 3": replace(WHOLE, weight_decay=3.0),
    "mean, max, last; 24": WHOLE,
    "mean, last; 24": variant("mean", "last"),
    "mean; 24": variant("mean"),
    "last; 24": variant("last"),
    "mean, max, last; 18": variant("mean", "max", "last", after=18),
    "mean, max, last; 27": variant("mean", "max", "last", after=27),
    "mean, last; 27": variant("mean", "last", after=27),
    "mean, max, last; 24, base": variant("mean", "max", "last", shown="base"),
    "mean; 24, base": variant("mean", shown="base"),
}


def wording_of(row: TextRow) -> int:
    """Which of its task's wordings a row of the stream has.

    Raises:
        ValueError: None of them.
    """
    (wordings,) = (source.wordings["gates"] for source in SHELF if source.name == row.task)
    for place, wording in enumerate(wordings):
        if re.fullmatch(re.sub(r"\\{[^}]*\\}", ".+", re.escape(wording)), row.prompt):
            return place
    raise ValueError(f"{row.prompt!r} is in none of the wordings of {row.task}")


def folds_of(wordings: Sequence[tuple[str, int]]) -> Tensor:
    """The fold of each row, by its task and wording: each task's wordings are dealt out in turn."""
    dealt = {}
    for task in sorted({task for task, _ in wordings}):
        mine = sorted({wording for own, wording in wordings if own == task})
        random.Random(f"folds of {task}").shuffle(mine)
        dealt |= {(task, wording): place % FOLDS for place, wording in enumerate(mine)}
    return torch.tensor([dealt[one] for one in wordings])


def routed(
    survey: Survey, folds: Tensor, how: Learned, bench: Bench, run: Path, rows: str
) -> Tensor:
    """The place of the expert that each row goes to, by gates that never saw its wording, (N,).

    Args:
        survey: Of all rows.
        folds: The fold of each.
        how: The gates, and how they learn.
        bench: The base and the shelf.
        run: Folder of the folds' runs.
        rows: What the rows are known by: a run of others is not gone on with.
    """
    mixture = bench.mixed("", how.gate, how.site, how.after, how.encoder)
    fresh = mixture.gates.state_dict()
    fresh = {key: value.clone() for key, value in fresh.items()}
    found = torch.zeros(len(folds), dtype=torch.long)
    for fold in range(FOLDS):
        mixture.gates.load_state_dict(fresh)
        mine = folds != fold
        task = ChoiceTask("model", mixture, survey.at(mine))
        score = task.gate.score
        assert isinstance(score, HiddenScore)
        with torch.no_grad():
            score.centre.copy_(score.features(survey.read[mine]).mean(0))
        steps = round(how.steps * float(mine.float().mean()))
        config = FitConfig(
            output=run / f"fold {fold}",
            steps=steps,
            rows=how.rows,
            lr=how.lr,
            weight_decay=how.weight_decay,
            progress=False,
        )
        fit(task, config, to_data(how) | {"experts": mixture.digests, "rows": rows})
        with torch.no_grad():
            asked_of = survey.at(~mine).to(score.weight.device)
            logits = task.gate.logits(asked_of.read, asked_of.features, ())
            found[~mine] = logits.argmax(-1).cpu()
    mixture.unmix()
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few rows, for a look")
    options = parser.parse_args()
    out = ROOT / "out/benchmarks/stream_wordings" / ("quick" if options.quick else "full")
    rows = read_rows(WORLD / "data/shelf_train.jsonl")[: 200 if options.quick else None]
    wordings = [(row.task, wording_of(row)) for row in rows]
    folds, bench = folds_of(wordings), Bench(out)
    names = [expert.name for expert in bench.experts("")]
    own = torch.tensor([names.index(row.task) for row in rows])
    units, known = sorted(set(wordings)), digest_rows(rows)
    told: Tensor | None = None
    chosen: dict[str, tuple[list[float], list[list[float]]]] = {}
    for name, how in VARIANTS.items():
        mixture = bench.mixed("", how.gate, how.site, how.after, how.encoder)
        survey = asked(
            mixture, bench.language(mixture, rows), names if told is None else (), rows=how.rows
        )
        mixture.unmix()
        told = survey.told if told is None else told
        found = routed(replace(survey, told=told), folds, how, bench, out / "runs" / name, known)
        of_own, of_found = (told.exp()[range(len(rows)), place] for place in (own, found))
        hits, pairs = [], []
        for unit in units:
            mine = torch.tensor([one == unit for one in wordings])
            hits.append(float((found == own)[mine].float().mean()))
            pairs.append([float(of_found[mine].mean()), float(of_own[mine].mean())])
        chosen[name] = hits, pairs
        print(f"{name}: {np.mean(hits):.3f}, {over_oracle(np.array(pairs)):.3f}", flush=True)
    table: list[Measurement] = []
    first = np.array(next(iter(chosen.values()))[0])
    for name, (hits, pairs) in chosen.items():
        table.append(measured("rows to their own expert", name, hits))
        table.append(
            measured(
                "likelihood over own expert's", name, np.array(pairs).tolist(), centre=over_oracle
            )
        )
        table.append(
            measured(
                "rows to their own expert, less the first", name, (np.array(hits) - first).tolist()
            )
        )
    settings = {name: to_data(how) for name, how in VARIANTS.items()}
    results = out if options.quick else FOLDER
    write_results("stream_wordings", table, settings=settings, seeds=(0,), folder=results)


if __name__ == "__main__":
    main()

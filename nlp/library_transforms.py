"""What a base and rows tell of a library's experts: centroids, cross-expert norms, PHATGOOSE.

Each is kept in the library, by expert and kind. Those that hang on how prompts are put are kept by
style, and those of a base that is not the experts' own by that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mole_vl import mix
from mole_vl.cross_norms import CrossNorms
from mole_vl.faults import at_least, refuse
from mole_vl.files import check_output, check_replaceable
from mole_vl.gates import Average
from mole_vl.library.seals import sha256
from mole_vl.library.transforms import keep, kept
from mole_vl.training import FitConfig
from mole_vl.updates import faults_of_dora
from nlp.adapter import blocks
from nlp.centroids import hidden_centroid
from nlp.classifier import HEADER, Labelled
from nlp.cross_norms import cross_norms
from nlp.data import Style
from nlp.dataset import RowSource
from nlp.embedding_classifier import HEAD, train_embedding
from nlp.encoders import BUILT_IN_ENCODER, Embedder
from nlp.shelf import (
    Shelf,
    ShelfConfig,
    encoded_by_name,
    load_shelf_base,
    open_shelf,
    rows_by_expert,
)
from nlp.task_sources import open_tasks
from nlp.train_phatgoose import AloneConfig, learned_directions, train_alone

NORMS = "norms"


def centroids_kind(shelf: Shelf, style: Style) -> str:
    """The kind of data that centroids are kept as."""
    return f"centroids-{style}{on_another_base(shelf)}"


def phatgoose_kind(shelf: Shelf, style: Style) -> str:
    """The kind of data that PHATGOOSE's directions are kept as."""
    return f"phatgoose-{style}{on_another_base(shelf)}"


def on_another_base(shelf: Shelf) -> str:
    """What tells data of this base from those of the one that the experts were trained on."""
    told = {info.base for info in shelf.infos if info.base is not None}
    return "" if told == {shelf.base} else f"-on-{sha256(shelf.base.encode())[:12]}"


@dataclass(frozen=True, kw_only=True)
class RowsConfig(ShelfConfig):
    """Experts of a library, and rows of their tasks.

    Args:
        data: Address of a library of tasks (nlp.prepare_tasks); or where each task's rows come
            from, by task: files of JSON lines with prompt, answer and task, or datasets with their
            templates (`nlp.dataset.DatasetRows`). Rows that the experts were trained on are meant.
        limit: The first so many rows of each task.
    """

    data: str | Mapping[str, RowSource]
    limit: int | None = 256

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [*super().faults(), at_least("limit", self.limit, 1)]


@dataclass(frozen=True, kw_only=True)
class CentroidsConfig(RowsConfig):
    """Where the prompts of each expert's tasks lie in the base's states, kept in the library.

    The route `nearest` reads them. Experts that have theirs are left alone.

    Args:
        anew: Whether those that experts have are made anew, of these rows.
    """

    anew: bool = False


@dataclass(frozen=True, kw_only=True)
class NormsConfig(RowsConfig):
    """How loud each expert is on each expert's rows (cross-expert norms), kept in the library."""


@dataclass(frozen=True, kw_only=True)
class PhatgooseLibraryConfig(RowsConfig):
    """Train a gate for each expert alone (PHATGOOSE), kept in the library.

    The route `phatgoose` reads them. Experts that have theirs are left alone.

    Args:
        fit: The training of one expert's gate; the paper's has some 100 steps.
        anew: Whether those that experts have are trained anew.
    """

    fit: FitConfig
    anew: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RowsConfig):
    """Train a classifier of the experts' tasks, for the routes `classifier` and `task_predictor`.

    Args:
        output: The classifier's folder.
        encoder: The sentence encoder: a Hub id, a folder, or all-minilm-l6-v2 (by pip).
    """

    output: Path
    encoder: str = BUILT_IN_ENCODER


def centroids(config: CentroidsConfig) -> dict[str, dict[str, Tensor]]:
    """The mean direction of the base's states at the entry of each block, by expert, by block."""
    shelf, tasks = open_shelf(config), open_tasks("data", config.data)

    def make(missing: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        infos = [info for info in shelf.infos if info.name in missing]
        rows = rows_by_expert(infos, tasks, config.limit)
        model, tokenizer = load_shelf_base(config, shelf)
        at = list(blocks(model))
        return {
            name: hidden_centroid(
                model, own, at, pad=tokenizer.pad_token_id, batch_rows=config.batch_rows
            )
            for name, own in encoded_by_name(rows, config, model, tokenizer).items()
        }

    return _made("centroids", centroids_kind(shelf, config.style), shelf, make, anew=config.anew)


def _made(
    what: str,
    kind: str,
    shelf: Shelf,
    make: Callable[[Sequence[str]], Mapping[str, dict[str, Tensor]]],
    *,
    anew: bool,
) -> dict[str, dict[str, Tensor]]:
    """Data that are made where they are missing, or anew; what was there already is told."""
    new: list[str] = []

    def noted(missing: Sequence[str]) -> Mapping[str, dict[str, Tensor]]:
        new.extend(missing)
        return make(missing)

    found = kept(shelf.library, kind, shelf.names, noted, anew=anew)
    print(f"{what} of {', '.join(found)} are in {shelf.library.address}")
    stood = [name for name in found if name not in new]
    if stood:
        print(f"those of {', '.join(stood)} were there, and are left alone (anew true makes new)")
    return found


def norms(config: NormsConfig) -> CrossNorms:
    """The cross-expert norms of a shelf; each expert's row is kept, with whom it was beside."""
    shelf, tasks = open_shelf(config), open_tasks("data", config.data)
    rows, experts = rows_by_expert(shelf.infos, tasks, config.limit), shelf.experts()
    refuse("norms", faults_of_dora(experts))
    model, tokenizer = load_shelf_base(config, shelf)
    encoded = encoded_by_name(rows, config, model, tokenizer)
    mixture = mix(model, experts, gate=Average(), site="network", blocks=blocks(model))
    found = cross_norms(mixture, encoded, pad=tokenizer.pad_token_id, batch_rows=config.batch_rows)
    among = dict(zip(shelf.names, mixture.digests, strict=True))
    versions = {info.name: info.version for info in shelf.infos}
    keep(shelf.library, NORMS, _by_expert(found, among), versions)
    heard = found.mean.tolist()
    for name, own, relative in zip(found.names, heard, found.relative.tolist(), strict=True):
        loud = ", ".join(f"{other} {v:.3g}" for other, v in zip(found.names, own, strict=True))
        print(f"on rows of {name}: {loud}; {name} is {relative:.2f} times the others' mean")
    return found


def _by_expert(found: CrossNorms, among: Mapping[str, str]) -> dict[str, object]:
    relative, mean = found.relative, found.mean.tolist()
    return {
        name: {
            "among": dict(among),
            # JSON knows no NaN: an expert that nobody else speaks beside has no ratio.
            "relative": float(relative[place]) if bool(relative[place].isfinite()) else None,
            "mean": dict(zip(found.names, mean[place], strict=True)),
            "by_layer": {
                path: dict(zip(found.names, norms[place].tolist(), strict=True))
                for path, norms in found.by_layer.items()
            },
        }
        for place, name in enumerate(found.names)
    }


def phatgoose(config: PhatgooseLibraryConfig) -> dict[str, dict[str, Tensor]]:
    """What each expert's gate learned alone, by expert, by layer."""
    check_output("fit.output", config.fit.output)
    shelf, tasks = open_shelf(config), open_tasks("data", config.data)

    def make(missing: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        infos = [info for info in shelf.infos if info.name in missing]
        rows = rows_by_expert(infos, tasks, config.limit)
        model, tokenizer = load_shelf_base(config, shelf)
        found = {}
        for name, own in rows.items():
            expert = shelf.library[name].expert
            # A run of another version's gate is in another folder.
            place = config.fit.output / name / expert.digest[:12]
            alone = AloneConfig(
                fit=replace(config.fit, output=place),
                base=shelf.base,
                style=config.style,
                context=config.context,
                quantise=config.quantise,
            )
            train_alone(model, tokenizer, expert, own, alone)
            found[name] = learned_directions(model, expert, alone)
        return found

    kind = phatgoose_kind(shelf, config.style)
    return _made("PHATGOOSE's directions", kind, shelf, make, anew=config.anew)


def classifier(config: ClassifierConfig) -> None:
    """Train a classifier whose tasks are the experts' names, and write its folder."""
    check_replaceable("output", config.output, (HEADER, HEAD), "a classifier")
    shelf, tasks = open_shelf(config), open_tasks("data", config.data)
    rows = rows_by_expert(shelf.infos, tasks, config.limit)
    examples = [Labelled(row.prompt, name) for name, own in rows.items() for row in own]
    train_embedding(Embedder(config.encoder), examples, shelf.names).save(config.output)
    print(f"a classifier of {', '.join(shelf.names)} is in {config.output}")

"""How a library's experts are routed among, by a word: what MTTL calls merge_or_route."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mole_vl import Expert, Mixture, mix
from mole_vl.faults import at_least, one_of, refuse, some
from mole_vl.files import read_object
from mole_vl.gates import (
    Average,
    Constants,
    GateSpec,
    KeptArrow,
    Nearest,
    Phatgoose,
    take_directions,
)
from mole_vl.library.transforms import library_prototypes
from mole_vl.sites import SiteKind
from nlp.adapter import blocks, bound
from nlp.around import Around, ExtraTerms
from nlp.centroids import route_by_centroids
from nlp.classifier import HEADER, Classifier
from nlp.data import TextBatch, Tokenizer, words_of
from nlp.forms import form_of
from nlp.library_transforms import centroids_kind, phatgoose_kind
from nlp.shelf import Shelf, ShelfConfig
from nlp.task_moe import load_classifier

Route = Literal[
    "uniform", "weighted", "arrow", "phatgoose", "nearest", "classifier", "task_predictor"
]
_COUNTING = ("arrow", "phatgoose", "nearest", "classifier")
_READING = ("classifier", "task_predictor")


@dataclass(frozen=True, kw_only=True)
class RouteConfig(ShelfConfig):
    """Experts of a library, and how they are routed among.

    Args:
        route: uniform (their mean), weighted (a sum by `weights`), arrow (each position by the
            experts' prototypes, computed once and kept in the library), phatgoose (by gates that
            `mole transform phatgoose` trained), nearest (each prompt by centroids that
            `mole transform centroids` made), classifier (each prompt by a classifier's
            probabilities), task_predictor (by its most probable expert alone).
        top_k: How many experts get weights, with arrow (3 if not given), phatgoose (2), nearest (1)
            and classifier (all).
        weights: With weighted, what each expert counts, by name.
        classifier: With classifier and task_predictor, the folder of a classifier that
            `mole transform classifier` or `apps.task_moe` trained.
        keep: With arrow, whether prototypes that were computed are kept in the library, which asks
            for the right to write.
    """

    route: Route = "uniform"
    top_k: int | None = None
    weights: Mapping[str, float] | None = None
    classifier: Path | None = None
    keep: bool = True

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            *super().faults(),
            one_of("route", self.route, get_args(Route)),
            at_least("top_k", self.top_k, 1),
            self._only("top_k", self.top_k, _COUNTING),
            self._only("weights", self.weights, ("weighted",)),
            self._only("classifier", self.classifier, _READING),
            self._only("keep", None if self.keep else False, ("arrow",)),
            "route is weighted, and weights are not given"
            if self.route == "weighted" and self.weights is None
            else None,
            f"route is {self.route}, and classifier is not given"
            if self.route in _READING and self.classifier is None
            else None,
            "style is chat, and a classifier reads prompts as they stand: take style plain"
            if self.route in _READING and self.style == "chat"
            else None,
        ]

    def _only(self, name: str, value: object, routes: Sequence[str]) -> str | None:
        if value is None or self.route in routes:
            return None
        return f"{name} is for {' and '.join(routes)}, and route is {self.route}"


def routed(
    model: Any, tokenizer: Tokenizer, shelf: Shelf, config: RouteConfig
) -> tuple[Mixture, Around]:
    """A base mixed with a shelf's experts, and what is entered around each of its batches.

    Raises:
        FileNotFoundError: There is no such classifier.
        DamagedExpertError: An expert, or what is kept of it, is damaged.
        ValueError: Experts that do not fit the base; weights or a classifier of others; what a
            route reads and the library lacks.
    """
    mixture = _ROUTES[config.route](model, shelf, config)
    if config.route not in _READING:
        return mixture, bound(mixture)
    assert config.classifier is not None
    own = _read_classifier(config.classifier)
    return mixture, _by_classifier(mixture, tokenizer, own, shelf, config)


def _mixed(
    model: Any, experts: Sequence[Expert], gate: GateSpec, site: SiteKind, after: int = 0
) -> Mixture:
    calls = form_of(model).calls
    return mix(model, experts, gate=gate, site=site, after=after, blocks=blocks(model), calls=calls)


def _average(model: Any, shelf: Shelf, config: RouteConfig) -> Mixture:
    return _mixed(model, shelf.experts(), Average(), "network")


def _weighted(model: Any, shelf: Shelf, config: RouteConfig) -> Mixture:
    given = config.weights or {}
    refuse(
        "weights",
        [
            *(f"none for {name}" for name in shelf.names if name not in given),
            *(f"one for {name}, which is none of {some(shelf.names)}"
              for name in given if name not in shelf.names),
        ],
    )  # fmt: skip
    return _mixed(model, shelf.experts(), Constants(weights=dict(given)), "network")


def _arrow(model: Any, shelf: Shelf, config: RouteConfig) -> Mixture:
    prototypes = library_prototypes(shelf.library, shelf.names, store=config.keep)
    gate = KeptArrow() if config.top_k is None else KeptArrow(top_k=config.top_k)
    return _directed(_mixed(model, shelf.experts(), gate, "matrix"), prototypes)


def _phatgoose(model: Any, shelf: Shelf, config: RouteConfig) -> Mixture:
    learned = _kept(shelf, phatgoose_kind(shelf, config.style), "phatgoose")
    gate = Phatgoose() if config.top_k is None else Phatgoose(top_k=config.top_k)
    return _directed(_mixed(model, shelf.experts(), gate, "matrix"), learned)


def _nearest(model: Any, shelf: Shelf, config: RouteConfig) -> Mixture:
    centroids = _kept(shelf, centroids_kind(shelf, config.style), "centroids")
    gate = Nearest() if config.top_k is None else Nearest(top_k=config.top_k)
    # Where the base has read half of its blocks it tells tasks apart, and experts are still to come
    # in all of them.
    mixture = _mixed(model, shelf.experts(), gate, "preview", after=len(blocks(model)) // 2)
    route_by_centroids(mixture, centroids)
    return mixture


_ROUTES: Mapping[str, Callable[[Any, Shelf, RouteConfig], Mixture]] = {
    "uniform": _average, "weighted": _weighted, "arrow": _arrow, "phatgoose": _phatgoose,
    "nearest": _nearest, "classifier": _average, "task_predictor": _average,
}  # fmt: skip


def _directed(mixture: Mixture, directions: Mapping[str, Mapping[str, Tensor]]) -> Mixture:
    gates = {site: mixture.gate(site) for site in mixture.sites}
    take_directions(gates, mixture.names, directions)
    return mixture


def _kept(shelf: Shelf, kind: str, transform: str) -> dict[str, Any]:
    found = shelf.library.auxiliary.each(kind, shelf.names)
    missing = [name for name in shelf.names if name not in found]
    if missing:
        raise ValueError(
            f"{shelf.library.address} keeps no {kind} of {some(missing)} over {shelf.base}: make "
            f"them with mole transform {transform}"
        )
    return found


def _read_classifier(folder: Path) -> Classifier:
    file = folder / HEADER
    if not file.is_file():
        raise FileNotFoundError(
            f"classifier: {folder} holds no {HEADER}: train one with mole transform classifier"
        )
    kind = read_object(file).get("kind")
    if kind not in ("bert", "embedding"):
        raise ValueError(f"{file}: the kind is {kind!r}, expected 'bert' or 'embedding'")
    return load_classifier(folder, kind)


def _by_classifier(
    mixture: Mixture,
    tokenizer: Tokenizer,
    classifier: Classifier,
    shelf: Shelf,
    config: RouteConfig,
) -> Around:
    """Each prompt by what a classifier says of it: the classifier's tasks are experts' names."""
    odd = sorted(set(classifier.tasks) ^ set(shelf.names))
    if odd:
        raise ValueError(
            f"classifier: it tells {some(classifier.tasks)} apart, and the experts are "
            f"{some(shelf.names)}: {', '.join(odd)} are not both"
        )
    order = [classifier.tasks.index(name) for name in mixture.names]
    top = 1 if config.route == "task_predictor" else config.top_k

    @contextmanager
    def around(batch: TextBatch) -> Iterator[ExtraTerms]:
        texts = words_of(batch["input_ids"], batch["prompt_mask"], tokenizer)
        weights = _highest(classifier.probabilities(texts)[:, order], top)
        with bound(mixture)(batch) as terms, mixture.pinned(weights):
            yield terms

    return around


def _highest(shares: Tensor, k: int | None) -> Tensor:
    """The k highest shares of each row, which sum to 1 again; ties go to the lower index."""
    if k is None or k >= shares.shape[1]:
        return shares
    places = shares.argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = torch.zeros_like(shares).scatter(1, places, shares.gather(1, places))
    return kept / kept.sum(1, keepdim=True)

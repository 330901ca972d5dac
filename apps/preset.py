"""How gates are trained from the page: a configuration of `train_gates.py`, read as it does."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from dreambooth.subject_style import SubjectStyle
from mole_vl.files import check_file
from mole_vl.gates import GateSpec, MoLE
from mole_vl.sites import SiteKind
from mole_vl.training import FitConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of `train_gates.py`; the page replaces base, LoRAs, words and pictures.

    Args:
        domain: What is mixed, and what judges it.
        fit: The training loop.
        gate: What decides the weights.
        site: Which layers share one gate.
        after: How many blocks run before a network's gate reads.
        balance: Factor of the balance loss.
        centring: Batches that the gates' features are centred over.
        report: For the program alone: the page draws side by side.
    """

    domain: SubjectStyle
    fit: FitConfig
    gate: GateSpec = MoLE()
    site: SiteKind = "block"
    after: int = 0
    balance: float = 0.0
    centring: int = 4
    report: bool = True


def read_preset(file: Path) -> Preset:
    """Read a configuration whose domain is dreambooth.subject_style.SubjectStyle.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A setting that is not known, or impossible.
    """
    check_file("preset", file, "a configuration of train_gates.py")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Preset)
    try:
        found = parser.instantiate(parser.parse_path(file))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"preset {file}: {error}") from error
    return Preset(**found)

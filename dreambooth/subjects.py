"""Candidates for many folders at once, such as those of the DreamBooth dataset.

google/dreambooth holds `dataset/SUBJECT/*.jpg`, and beside the folders prompts_and_classes.txt
with lines such as `dog6,dog`.
"""

from collections.abc import Iterable
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from dreambooth.candidates import CandidateConfig

CLASSES = "prompts_and_classes.txt"
_FOLDER, _CLASS = "{folder}", "{class}"


def expand(candidates: Iterable[CandidateConfig]) -> tuple[CandidateConfig, ...]:
    """One candidate for each folder, its `{folder}` and `{class}` filled in.

    Raises:
        FileNotFoundError: A pattern that matches no folder, `{class}` without the file of classes.
        ValueError: A folder of which that file does not speak.
    """
    return tuple(
        _filled(candidate, folder) for candidate in candidates for folder in _folders(candidate)
    )


def _folders(candidate: CandidateConfig) -> list[Path]:
    pattern = str(candidate.data)
    if not has_magic(pattern) or candidate.data.is_dir():
        return [candidate.data]
    root = Path(candidate.data.anchor)
    matches = root.glob(str(candidate.data.relative_to(root)))
    found = sorted(path for path in matches if path.is_dir())
    if not found:
        raise FileNotFoundError(f"data of {candidate.name}: {pattern} matches no folder")
    return found


def _filled(candidate: CandidateConfig, folder: Path) -> CandidateConfig:
    def fill(text: str) -> str:
        text = text.replace(_FOLDER, folder.name)
        return text.replace(_CLASS, class_of(folder)) if _CLASS in text else text

    prior = candidate.prior
    if prior is not None:
        prior = replace(prior, prompt=fill(prior.prompt), pictures=Path(fill(str(prior.pictures))))
    return replace(
        candidate,
        name=fill(candidate.name),
        data=folder,
        prompt=None if candidate.prompt is None else fill(candidate.prompt),
        prior=prior,
        samples=tuple(map(fill, candidate.samples)),
    )


def class_of(folder: Path) -> str:
    """What the file of classes beside a folder calls its subject.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It does not speak of the folder.
    """
    file = folder.parent / CLASSES
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, which says the {_CLASS} of {folder.name}: write it, with lines "
            f"such as {folder.name},dog, or write the class itself"
        )
    for line in file.read_text(encoding="utf-8").splitlines():
        name, comma, kind = line.partition(",")
        if comma and name.strip() == folder.name:
            return kind.strip()
    raise ValueError(f"{file} has no line for {folder.name}, expected {folder.name},CLASS")

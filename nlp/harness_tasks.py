"""Tasks of lm-eval: by the names that it knows, or from YAML files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from yaml import YAMLError

from mole_vl.faults import refuse
from nlp.tables import loading

# What a YAML's mistakes raise: its syntax, a missing function or package, a wrong split or key.
_MISTAKES = (YAMLError, ImportError, LookupError, AttributeError, TypeError)


def load_tasks(asked: Sequence[str]) -> list[Any]:
    """Tasks and groups with their data, as `lm_eval.simple_evaluate` takes them.

    Args:
        asked: Names that lm-eval knows, of tasks, groups or tags (it takes half a minute to list
            them); YAML files; or folders, for all their YAML files but those that others include,
            whose names begin with an underscore. A name with a slash or with the end .yaml is a
            path.

    Raises:
        FileNotFoundError: No such file or folder, or no YAML in it; data that is not there.
        ValueError: Unknown names; a YAML that is no task; data that cannot be read; a task twice.
    """
    files = {place: _yamls(Path(place)) for place in asked if "/" in place or _is_yaml(place)}
    names = [name for name in asked if name not in files]
    index = TaskManager(include_defaults=bool(names))
    refuse("tasks", [_fault(name, index.all_tasks) for name in names])
    tasks, owner = {}, {}
    for entry in asked:
        loaded = _from_files(*files[entry]) if entry in files else _loaded(index, entry, entry)
        twice = [f"{name} is in {owner[name]} and in {entry}" for name in loaded if name in owner]
        refuse("tasks", twice[:3])
        owner |= dict.fromkeys(loaded, entry)
        tasks |= loaded
    inside = {name for item in tasks.values() for name in _members(item)}
    return [item for name, item in tasks.items() if name not in inside]


def _is_yaml(name: str) -> bool:
    return name.endswith(".yaml")


def _yamls(place: Path) -> tuple[Path, list[Path]]:
    """The folder where files find what they name, and the files."""
    if place.is_file() and _is_yaml(place.name):
        return place.parent, [place]
    if not place.is_dir():
        raise FileNotFoundError(f"tasks: there is no folder and no YAML file {place}")
    found = sorted(file for file in place.rglob("*.yaml") if not file.name.startswith("_"))
    if not found:
        raise FileNotFoundError(f"tasks: {place} holds no YAML of a task (*.yaml)")
    return place, found


def _fault(name: str, known: Sequence[str]) -> str | None:
    if name in known:
        return None
    near = get_close_matches(name, known)
    meant = f"did you mean {', '.join(near)}?" if near else "a folder is written with a slash"
    return f"lm-eval knows no task, group or tag {name!r}; {meant}"


def _from_files(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    index = TaskManager(include_path=root, include_defaults=False)
    name_of = {entry.yaml_path: name for name, entry in index.task_index.items()}
    found = {}
    for file in files:
        # The index leaves out what is no task, in silence; asked for by its path, that is told.
        found |= _loaded(index, name_of.get(file, str(file)), str(file))
    return found


def _loaded(index: TaskManager, spec: str, where: str) -> dict[str, Any]:
    """Tasks and groups by name, those inside of groups too."""
    with _told(f"tasks: {where}"), loading(f"tasks: {where}"):
        found = index.load(spec)
    return {**found["tasks"], **found.get("groups", {})}


def _members(item: Any) -> list[str]:
    if not isinstance(item, Group):
        return []
    tasks = [task.task_name for task in item.get_all_tasks()]
    return tasks + [group.name for group in item.get_all_groups()]


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except _MISTAKES as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where}, was not loaded: {type(error).__name__}: {said}") from error

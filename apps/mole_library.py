"""The commands of `mole library`: look at a library of experts, and change it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from apps.columns import columns
from mole_vl import read_peft
from mole_vl.cluster_map import cluster_map
from mole_vl.clustering import Over, cluster as cluster_updates, cluster_flattened
from mole_vl.clusters import Clusters
from mole_vl.faults import refuse
from mole_vl.files import check_output_file, new_file
from mole_vl.library import ExpertInfo, ExpertLibrary
from mole_vl.library.differences import Changed, expert_difference, library_difference
from mole_vl.library.names import check_word
from mole_vl.library.transforms import members
from mole_vl.svg import standalone
from nlp.task_sources import listed


def show(library: str, expert: str | None = None) -> None:
    """List the experts of a library, or tell all that is known of one.

    Args:
        library: Address of the library.
        expert: Name of the one; all of them if not given.
    """
    opened = ExpertLibrary.open(library)
    if expert is not None:
        _show_one(opened, expert)
        return
    found = opened.list()
    rows = [
        [
            info.name, info.task, info.base, ", ".join(map(str, info.ranks)), info.layers,
            f"{info.bytes / 1024:.0f}", info.version[:12],
        ]
        for info in found.experts.values()
    ]  # fmt: skip
    print(columns(["name", "task", "base", "ranks", "layers", "KiB", "version"], rows))
    for said in found.damaged.values():
        print(f"damaged: {said}")
    for name, pointer in found.removed.items():
        went = f"is {pointer.other} now" if pointer.act == "rename" else "was removed"
        print(f"{name} {went}, {pointer.at}")


def _show_one(library: ExpertLibrary, name: str) -> None:
    info = library.get(name).info
    told: dict[str, Any] = {
        "name": info.name, "version": info.version, "digest": info.digest, "task": info.task,
        "base": info.base, "licence": info.licence, "created": info.created,
        "layers": info.layers, "ranks": list(info.ranks), "training": dict(info.training),
        "files": {file: stored.bytes for file, stored in info.files.items()},
        "auxiliary": library.auxiliary.kinds(name),
        "history": [f"{one.at} {one.act} {one.version[:12]}" for one in library.history(name)],
    }  # fmt: skip
    print(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100), end="")


def best(
    library: str, task: str, measure: str = "exact_match", order: Literal["high", "low"] = "high"
) -> None:
    """Tell the experts that have a score for a task, best first; `mole transform scores` asks them.

    Args:
        library: Address of the library.
        task: The task.
        measure: What was measured.
        order: Whether high or low scores are good.
    """
    scores = ExpertLibrary.open(library).scores
    found = scores.ranked(task, measure, highest=order == "high")
    print(columns(["name", measure], [[name, f"{score:.4g}"] for name, score in found.items()]))


def check(library: str) -> None:
    """Read every file of a library, and tell each that is not as it was written.

    Args:
        library: Address of the library.
    """
    report = ExpertLibrary.open(library).check()
    for leftover in report.leftovers:
        print(f"left over: {leftover}")
    if report.faults:
        raise ValueError(f"{len(report.faults)} faults: {'; '.join(report.faults)}")
    print("every file is as it was written")


def add(
    library: str,
    folder: Path,
    expert: str | None = None,
    task: str | None = None,
    licence: str | None = None,
    replace: bool = False,
) -> None:
    """Add a PEFT LoRA folder to a library, which is begun where there is none.

    Args:
        library: Address of the library.
        folder: The PEFT folder.
        expert: Its name in the library; the folder's if not given.
        task: What it was trained for; several tasks with commas between.
        licence: The terms it comes under.
        replace: Whether it takes the place of the expert of its name, which stays in the history.
    """
    one = read_peft(folder, expert)
    check_word("expert", one.name)
    opened = ExpertLibrary.open(library, create=not replace)
    info = opened.import_peft(folder, one.name, replace=replace, task=task, licence=licence)
    print(f"{info.name} is in {opened.address}, version {info.version[:12]}")


def export(library: str, expert: str, folder: Path) -> None:
    """Write an expert of a library as a PEFT LoRA folder.

    Args:
        library: Address of the library.
        expert: Its name.
        folder: The folder to be written; another expert's there is replaced.
    """
    ExpertLibrary.open(library).export_peft(expert, folder)
    print(f"{expert} is in {folder}")


def remove(library: str, expert: str) -> None:
    """Remove an expert; `restore` brings it back.

    Args:
        library: Address of the library.
        expert: Its name.
    """
    opened = ExpertLibrary.open(library)
    opened.remove(expert)
    print(f"{expert} is removed from {opened.address}; restore brings it back")


def restore(library: str, expert: str, version: str | None = None) -> None:
    """Bring a removed expert back, or an older version in place of the present one.

    Args:
        library: Address of the library.
        expert: Its name.
        version: The version, or its beginning, as `show --expert` tells them; the last if not
            given.
    """
    opened = ExpertLibrary.open(library)
    opened.restore(expert, version)
    print(f"{expert} is in {opened.address}, version {opened.get(expert).info.version[:12]}")


def rename(library: str, expert: str, to: str) -> None:
    """Give an expert another name; its history and what was computed from it go with it.

    Args:
        library: Address of the library.
        expert: Its name.
        to: Its new name.
    """
    opened = ExpertLibrary.open(library)
    opened.rename(expert, to)
    print(f"{expert} is {to} in {opened.address}")


def clone(library: str, to: str, experts: str = "") -> None:
    """Copy experts, with what was computed from them, to another address.

    Args:
        library: Address of the library.
        to: The other address; a library is begun where there is none.
        experts: Names with commas between; all of them if not given.
    """
    copy = ExpertLibrary.open(library).clone(to, names=listed(experts) or None)
    print(f"{copy.address} has {len(copy)} experts")


def cluster(
    library: str,
    k: int = 10,
    output: Path = Path("out/mbc.json"),
    experts: str = "",
    by: Literal["updates", "factors"] = "updates",
    over: Over = "all",
    seed: int = 42,
) -> None:
    """Cluster the experts of a library (MBC): as JSON, as a picture, and as experts to be trained.

    Beside the JSON file stand a picture (.svg) and one expert a cluster with its tasks (.yaml),
    which nlp.private_library trains: --config private.yaml --config FILE.yaml --library ADDRESS.

    Args:
        library: Address of the library.
        k: How many clusters.
        output: The JSON file.
        experts: Names with commas between; all but merges if not given.
        by: What is compared: the updates Delta-W, or the flattened factors as in the paper, which
            asks for experts of one shape.
        over: With updates, the layers that are compared: all, or those that all experts change.
        seed: Of the search.
    """
    refuse(
        "cluster",
        [
            None if output.suffix == ".json" else f"output is {output}, expected a .json file",
            "over is for updates" if by == "factors" and over != "all" else None,
        ],
    )
    for suffix in (".json", ".svg", ".yaml"):
        check_output_file("output", output.with_suffix(suffix))
    opened = ExpertLibrary.open(library)
    infos = members(opened, listed(experts))
    own = [opened[info.name].expert for info in infos]
    found = (
        cluster_flattened(own, k, seed=seed)
        if by == "factors"
        else cluster_updates(own, k, over=over, seed=seed)
    )
    found.save(output)
    _write(output.with_suffix(".svg"), standalone(cluster_map(found)))
    wanted = {"experts": cluster_experts(found, infos)}
    _write(output.with_suffix(".yaml"), yaml.safe_dump(wanted, sort_keys=False, width=1000))
    for number, group in enumerate(found.groups, start=1):
        print(f"cluster {number}: {', '.join(group)}")
    print(f"in {output}, {output.stem}.svg and {output.stem}.yaml")


def cluster_experts(found: Clusters, infos: Sequence[ExpertInfo]) -> dict[str, str]:
    """One expert for each cluster: the tasks of its members, with commas between, by its name."""
    tasks = {info.name: listed(info.task or "") or (info.name,) for info in infos}
    return {
        f"cluster_{number}_of_{len(found.groups)}": ",".join(
            dict.fromkeys(task for name in group for task in tasks[name])
        )
        for number, group in enumerate(found.groups, start=1)
    }


def diff(
    library: str,
    other: str | None = None,
    expert: str | None = None,
    version: str | None = None,
    other_version: str | None = None,
) -> None:
    """Tell what two libraries differ in, or two versions of an expert.

    Experts are compared by the hashes of their files; of those that differ: what is said of them,
    the norms of Delta-W before and now, their cosine, and the norm of what changed.

    Args:
        library: Address of the library.
        other: Address of the other one, to which the first is compared.
        expert: Name of an expert, to compare it alone.
        version: With an expert, its version before, or the beginning of it; of a removed expert
            too.
        other_version: With an expert, its version now; the present one if not given.
    """
    refuse(
        "diff",
        [
            "other is not given, and no version: compare with another library, or two versions"
            if other is None and version is None
            else None,
            *(
                f"{name} is given, and no expert"
                for name, value in (("version", version), ("other_version", other_version))
                if value is not None and expert is None
            ),
        ],
    )
    before = ExpertLibrary.open(library)
    now = before if other is None else ExpertLibrary.open(other)
    if expert is not None:
        changed = expert_difference(before.get(expert, version), now.get(expert, other_version))
        print("\n".join(_told(expert, changed)))
        return
    found = library_difference(before, now)
    lines = [
        *(f"removed  {name}" for name in found.removed),
        *(f"added    {name}" for name in found.added),
        *(f"renamed  {old} to {new}" for old, new in found.renamed.items()),
        *(line for name, changed in found.changed.items() for line in _told(name, changed)),
        *(f"damaged  {said}" for said in found.damaged.values()),
        f"{len(found.same)} the same",
    ]
    print("\n".join(lines))


def _told(name: str, changed: Changed) -> list[str]:
    lines = [f"         {said}" for said in changed.said]
    if changed.why is not None:
        return [f"changed  {name}: other weights; {changed.why}", *lines]
    if changed.distance == 0:
        return [f"{'changed' if lines else 'same':8} {name}: the same weights", *lines]
    before, now = changed.sizes or (0.0, 0.0)
    cosine = "none" if changed.cosine is None else f"{changed.cosine:.4f}"
    apart = "" if changed.distance is None else f", changed by {changed.distance:.4f} of it"
    head = f"changed  {name}: norm {before:.4g}, now {now:.4g}, cosine {cosine}{apart}"
    return [head, *lines]


def _write(file: Path, text: str) -> None:
    with new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


COMMANDS = {
    "_help": "Look at a library of experts, and change it.",
    "show": show, "best": best, "check": check, "add": add, "export": export, "remove": remove,
    "restore": restore, "rename": rename, "clone": clone, "cluster": cluster, "diff": diff,
}  # fmt: skip

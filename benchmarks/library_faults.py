"""What is lost when a library's writers are killed, its files damaged, or two write at once.

    python benchmarks/library_faults.py         # --quick: a few of each, for a look

On disk and on Azurite (`npm install azurite@3.35.0 --prefix out/azurite`), each: a process that
adds, removes, restores, replaces, renames and clones experts at random is killed (SIGKILL) at a
random moment of a change, 100 times; two processes change the same names for a minute. On disk, one
file of a library is damaged at random, 50 times. The unit is one kill, one file, one change.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from azurite import ACCOUNT, INSTALL, azurite_program, azurite_server
from library_writers import (
    ACTS,
    NAMES,
    Place,
    Shelf,
    Step,
    change,
    expert,
    write_for,
    write_till_killed,
)
from mole_vl.library import DamagedExpertError, ExpertLibrary
from results import ROOT, Measurement, measured, write_results

# A child begins with everything imported, and with none of this process's threads.
PROCESSES = multiprocessing.get_context("forkserver")


@contextmanager
def child(work: Any, *given: Any) -> Iterator[tuple[Any, Connection]]:
    """A process that does this work, and what it tells."""
    listened, told = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(*given, told), daemon=True)
    process.start()
    told.close()
    try:
        yield process, listened
    finally:
        process.kill()
        process.join()
        listened.close()


def found(library: ExpertLibrary) -> Shelf:
    """What a library's names stand for, each expert read and its hashes checked."""
    listing = library.list()
    present = {name: library[name].expert.digest for name in library}
    assert present.keys() == listing.experts.keys() and not listing.damaged
    return Shelf(present, dict.fromkeys(listing.removed, ""))


@dataclass(frozen=True)
class Death:
    """A writer's end: what the shelf is now, the change it died in, whether that came about.

    `sound` is whether all that was told is there, and the last change whole or absent.
    """

    shelf: Shelf
    step: Step | None
    came_about: bool
    sound: bool


def killed(place: Place, shelf: Shelf, seed: int, act: str, within: float) -> Death:
    """Kill a writer in a change, which is made again if it did not come about."""
    chance = random.Random(seed)
    with child(write_till_killed, place, shelf, seed, (act, act, *ACTS)) as (process, listened):
        assert listened.recv() == "ready"
        time.sleep(chance.uniform(0, within))
        process.kill()
        process.join()
        step = None
        while listened.poll():
            try:
                told = listened.recv()
            except EOFError:
                break
            if told == "done":
                assert step is not None
                shelf, step = shelf.after(step), None
            else:
                step = told
    library = place.open()
    now = found(library)
    outcomes = [shelf] if step is None else [shelf, shelf.after(step)]
    sound = now.present in [outcome.present for outcome in outcomes]
    came_about = now.present != shelf.present
    if step is not None and step.act == "clone":
        clone = place.open(clone=f"clone{step.seed}")
        copied = found(clone).present
        came_about = bool(copied)
        sound &= copied in ({}, now.present)
        change(library, place, step)
        sound &= found(clone).present == now.present
    elif step is not None and not came_about:
        change(library, place, step)
        sound &= found(library).present == shelf.after(step).present
    return Death(outcomes[-1], step, came_about, sound)


def kills(place: Place, arm: str, count: int) -> tuple[list[Measurement], dict[str, Any]]:
    """Kill writers until so many of them died in a change."""
    shelf, lost = Shelf(), []
    during, came_about = Counter(), 0
    library, began = place.open(), time.monotonic()
    for number, name in enumerate(NAMES[:6]):
        step = Step("add", name, number, "")
        change(library, place, step)
        shelf = shelf.after(step)
    # About as long as three changes take.
    within = (time.monotonic() - began) / 2
    seed = 0
    while len(lost) < count:
        seed += 1
        death = killed(place, shelf, seed, ACTS[seed % 4], within)
        shelf = death.shelf
        if death.step is not None or not death.sound:
            lost.append(float(not death.sound))
            during[death.step.act if death.step else "none"] += 1
            came_about += death.came_about and death.step is not None
            print(f"{arm}: {len(lost)} kills, {lost.count(1.0)} with a loss", end="\r", flush=True)
    report = place.open().check()
    lost[-1] = max(lost[-1], float(bool(report.faults)))
    return [measured("kills after which something was lost or torn", arm, lost)], {
        "killed within seconds": round(within, 3), "killed during": dict(during),
        "came about all the same": came_about, "leftovers": len(report.leftovers),
    }  # fmt: skip


def damages(folder: Path, count: int) -> list[Measurement]:
    """Damage one file of a library, again and again."""
    place = Place(f"local://{folder}/sound")
    library = place.open()
    for seed, name in enumerate(NAMES[:8]):
        library.add(expert(name, seed))
    library.auxiliary.put("prototypes", {name: {"v": torch.ones(4)} for name in NAMES[:8]})
    for old, new in zip(NAMES[:3], NAMES[8:11], strict=True):
        library.rename(old, new)
    library.replace(expert(NAMES[4], 99))
    shelf, sound = found(library).present, folder / "sound/library"
    untold, lost, errors = [], [], []
    files = sorted(path for path in sound.rglob("*") if path.is_file() and path.name != "README.md")
    for seed in range(count):
        chance = random.Random(seed)
        file = chance.choice(files).relative_to(sound)
        harmed = folder / "harmed/library"
        shutil.rmtree(harmed, ignore_errors=True)
        shutil.copytree(sound, harmed)
        harm(harmed / file, chance)
        told, others = report(Place(f"local://{folder}/harmed"), shelf, str(file))
        untold.append(float(not told))
        lost.append(float(sum(shelf[name] != digest for name, digest in others.items())))
        errors.append(float(len(shelf) - len(others)))
    return [
        measured("damaged files that no error names", "disk", untold),
        measured("experts that loaded as something else", "disk", lost),
        measured("experts that a damaged file keeps from loading", "disk", errors),
    ]


def harm(file: Path, chance: random.Random) -> None:
    """Cut, change, empty, overwrite or delete a file."""
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    match chance.choice(["cut", "bit", "empty", "noise", "delete"]):
        case "cut":
            file.write_bytes(content[:place])
        case "bit":
            content[place] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "noise":
            file.write_bytes(chance.randbytes(len(content)))
        case _:
            file.unlink()


def report(place: Place, shelf: dict[str, str], file: str) -> tuple[bool, dict[str, str]]:
    """Whether an error names the file or its folder, and the experts that load all the same."""
    try:
        library = ExpertLibrary.open(place.beside(""))
    except (ValueError, FileNotFoundError) as error:
        # What says that this is a library at all.
        return file == "library.json" and file in str(error), shelf
    loaded, errors = {}, []
    for name in library:
        try:
            loaded[name] = library[name].expert.digest
            library.auxiliary.get("prototypes", name)
        except DamagedExpertError as error:
            errors.append(str(error))
    checked = library.check()
    texts = [*errors, *checked.faults, *checked.leftovers]
    # Of a deleted pointer or fate, what it pointed to is left.
    if not (Path(library.address.removeprefix("local://")) / file).exists():
        return bool(texts), loaded
    return any(file in text for text in texts), loaded


def minute(place: Place, arm: str, seconds: float) -> tuple[list[Measurement], dict[str, int]]:
    """Two processes change the same names; each change that was told is in a name's history."""
    with (
        child(write_for, place, seconds, 1) as (_, first),
        child(write_for, place, seconds, 2) as (_, second),
    ):
        told = [listened.recv() for listened in (first, second)]
    library = place.open()
    steps = Counter((step.act, step.name) for done, _ in told for step in done)
    pointers: Counter[tuple[str, str]] = Counter()
    for name in {*library, *library.list().removed}:
        for pointer in library.history(name):
            # A rename is told of the name that it takes the expert from.
            if pointer.act != "rename" or not pointer.present:
                pointers[pointer.act, name] += 1
    sound = not library.check().faults and found(library) is not None
    lost = (steps - pointers).total() + (pointers - steps).total() + (not sound)
    changes = steps.total()
    units = [1.0] * lost + [0.0] * max(changes - lost, 0)
    refused = sum(count for _, count in told)
    return [measured("changes that were lost or made up, of two writers", arm, units)], {
        "changes": changes, "refused": refused,
    }  # fmt: skip


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few of each, for a look")
    quick = parser.parse_args().quick
    count, files, seconds = (4, 10, 5.0) if quick else (100, 50, 60.0)
    if azurite_program() is None:
        raise FileNotFoundError(f"Azurite is not installed: {INSTALL}")
    # Python 3.11's server of children passes over what it cannot find on its own path.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    PROCESSES.set_forkserver_preload(["library_writers", "adlfs"])
    torch.set_num_threads(1)
    rows: list[Measurement] = []
    settings: dict[str, Any] = {"kills": count, "damaged files": files, "seconds": seconds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with azurite_server(folder / "azurite") as connection:
            for arm in ("disk", "Azurite"):
                uri = f"local://{folder}" if arm == "disk" else f"az://{ACCOUNT}/faults"
                token = None if arm == "disk" else connection
                found_rows, deaths = kills(Place(f"{uri}/kills", token), arm, count)
                rows += found_rows
                found_rows, writers = minute(Place(f"{uri}/minute", token), arm, seconds)
                rows += found_rows
                settings[arm] = {**deaths, "two writers": writers}
                print(arm, settings[arm], flush=True)
            rows += damages(folder, files)
    where = {"folder": ROOT / "out/benchmarks/library_faults"} if quick else {}
    write_results("library_faults", rows, settings=settings, seeds=[0], **where)


if __name__ == "__main__":
    main()

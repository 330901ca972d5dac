"""Units of a long benchmark: what is measured once is kept, and never made again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mole_vl.files import new_file


class Units:
    """What was found for each unit: a file for each, which processes share, and one of all.

    Args:
        folder: Where each unit has its file; it begins with what was gathered before.
        gathered: The file of all units, a unit a line.
        settings: How every unit is made. Units that were made otherwise are not these.

    Raises:
        ValueError: What was gathered was made with other settings.
    """

    def __init__(self, folder: Path, gathered: Path, settings: Mapping[str, Any]) -> None:
        told = json.dumps(settings, sort_keys=True)
        self.folder = folder / hashlib.sha256(told.encode()).hexdigest()[:12]
        self.gathered, self.settings = gathered, json.loads(told)
        if gathered.exists():
            content = json.loads(gathered.read_text())
            for key in sorted(self.settings.keys() | content["settings"].keys()):
                here, there = self.settings.get(key), content["settings"].get(key)
                if here != there:
                    raise ValueError(
                        f"{gathered} was made with {key} = {there}, not {here}; "
                        "delete it to measure anew"
                    )
            for name, found in content["units"].items():
                self._write(name, found)

    def has(self, name: str) -> bool:
        """Whether a unit was made."""
        return (self.folder / f"{name}.json").exists()

    def get(self, name: str, make: Callable[[], Any], own: Mapping[str, Any] | None = None) -> Any:
        """What was found for a unit, as JSON has it, made here if nobody made it before.

        Args:
            name: The unit's.
            make: Makes it.
            own: How this unit is made, beside what holds for all; it is kept with the unit.

        Raises:
            ValueError: The unit was made otherwise.
        """
        if not self.has(name):
            found = make()
            self._write(name, found if own is None else {"made with": own, "found": found})
        kept = json.loads((self.folder / f"{name}.json").read_text())
        if own is None:
            return kept
        if kept["made with"] != json.loads(json.dumps(own)):
            raise ValueError(
                f"{name} in {self.gathered} was made with {kept['made with']}, not {own}; delete "
                f"it there and in {self.folder} to measure it anew"
            )
        return kept["found"]

    def gather(self) -> None:
        """Write all units, whoever made them, into the one file."""
        files = {
            file.relative_to(self.folder).as_posix().removesuffix(".json"): file
            for file in self.folder.rglob("[!.]*.json")
        }
        units = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(json.loads(files[name].read_text()))}"
            for name in sorted(files)
        )
        told = json.dumps(self.settings, sort_keys=True)
        with new_file(self.gathered) as partial:
            partial.write_text(f'{{\n "settings": {told},\n "units": {{\n{units}\n }}\n}}\n')

    def _write(self, name: str, found: Any) -> None:
        with new_file(self.folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(found))

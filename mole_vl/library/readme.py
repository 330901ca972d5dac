"""The list of experts for people: `README.md`, derived from the rest and read by no program."""

from collections.abc import Mapping

from mole_vl.library.errors import DamagedExpertError
from mole_vl.library.info import ExpertInfo

# The Hub reads the first lines.
_HEAD = """---
library_name: mole-vl
tags:
- lora
- peft
---

# Expert library

{count}. Each folder `experts/NAME/VERSION/` is a PEFT LoRA. From Python:

```python
from mole_vl.library import ExpertLibrary

library = ExpertLibrary.open("ADDRESS")  # of this folder, container or repository
expert = library["NAME"].expert
```

| name | task | base | ranks | layers | KiB | licence | version |
|---|---|---|---|---|---|---|---|
"""


def readme(experts: Mapping[str, ExpertInfo | DamagedExpertError]) -> bytes:
    """The list, one expert a line."""
    count = f"{len(experts)} expert{'' if len(experts) == 1 else 's'}"
    lines = [_line(name, experts[name]) for name in sorted(experts)]
    return (_HEAD.format(count=count) + "\n".join(lines) + "\n").encode()


def _line(name: str, info: ExpertInfo | DamagedExpertError) -> str:
    if isinstance(info, DamagedExpertError):
        cells = [name, "damaged", *[""] * 6]
    else:
        ranks = ", ".join(map(str, info.ranks))
        cells = [
            name, info.task, info.base, ranks, info.layers, f"{info.bytes / 1024:.0f}",
            info.licence, info.version[:12],
        ]  # fmt: skip
    # A cell ends at a bar or a new line.
    texts = ["" if cell is None else " ".join(str(cell).split()) for cell in cells]
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

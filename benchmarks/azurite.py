"""Azurite, Microsoft's stand-in for Azure's blobs, as a process of its own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
ACCOUNT = "devstoreaccount1"
# The key that every Azurite has; it opens nothing else.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
INSTALL = "npm install azurite@3.35.0 --prefix out/azurite"


def azurite_program() -> Path | None:
    """MOLE_VL_AZURITE, or where `npm install azurite --prefix out/azurite` puts it, or None."""
    own = os.environ.get("MOLE_VL_AZURITE")
    places = [Path(own)] if own else [ROOT / "out/azurite/node_modules/.bin/azurite-blob"]
    return next((place for place in places if place.exists()), None)


@contextmanager
def azurite_server(folder: Path) -> Iterator[str]:
    """Its connection string, while it runs and keeps its blobs in a folder."""
    command = [str(azurite_program()), "--blobPort", "0", "--location", str(folder), "--silent"]
    flags = ["--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        lines = process.stdout or ()
        line = next(line for line in lines if "successfully listens on" in line)
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={_KEY};"
            f"BlobEndpoint={line.split()[-1]}/{ACCOUNT};"
        )
    finally:
        process.terminate()
        process.communicate()

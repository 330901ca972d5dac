"""Azurite, Microsoft's stand-in for Azure's blobs, as a process of its own."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]
ACCOUNT = "devstoreaccount1"
# The key that every Azurite has; it opens nothing else.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def azurite_program():
    """MOLE_VL_AZURITE, or where `npm install azurite --prefix out/azurite` puts it, or None."""
    own = os.environ.get("MOLE_VL_AZURITE")
    places = [Path(own)] if own else [ROOT / "out/azurite/node_modules/.bin/azurite-blob"]
    return next((place for place in places if place.exists()), None)


@contextmanager
def azurite_server(folder):
    """Its connection string, while it runs."""
    command = [str(azurite_program()), "--blobPort", "0", "--location", str(folder), "--silent"]
    flags = ["--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if "successfully listens on" in line)
        address = line.split()[-1]
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={_KEY};"
            f"BlobEndpoint={address}/{ACCOUNT};"
        )
    finally:
        process.terminate()
        process.communicate()

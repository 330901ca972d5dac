"""Libraries of LoRAs from the command line: look, change, cluster, transform, route, measure.

    mole library show --library local://out/library
    mole library cluster --library local://out/library --k 4 --output out/mbc_4.json
    mole transform ties --library local://out/library --to voted --rank 8
    mole evaluate --library local://out/library --route arrow --top_k 4 --data local://out/held_out

An address is a folder (local://FOLDER or a path), hf://USER/REPO, az://ACCOUNT/CONTAINER,
s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. Credentials are never typed here: they are those that the
Hub's login (HF_TOKEN), Azure (AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_CONNECTION_STRING), AWS
(AWS_ACCESS_KEY_ID) and Google keep in the environment.
"""

import sys
from importlib import import_module

from apps import mole_library
from mole_vl.faults import as_messages
from mole_vl.library.messages import faults_of_libraries
from mole_vl.program import command


def main() -> None:
    """Run the command that is typed."""
    with as_messages("nlp", "apps"), faults_of_libraries():
        # To look at a library no base is asked for, and what loads one takes seconds to import.
        if sys.argv[1:2] == ["library"]:
            command({"library": mole_library.COMMANDS}, "mole", __doc__)
        else:
            import_module("apps.mole_programs").run("mole", __doc__)


if __name__ == "__main__":
    main()

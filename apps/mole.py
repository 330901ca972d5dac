"""Libraries of experts from the command line: look, change, cluster, compare.

    mole library show --library local://out/library
    mole library cluster --library local://out/library --k 4 --output out/mbc_4.json

An address is a folder (local://FOLDER or a path), hf://USER/REPO, az://ACCOUNT/CONTAINER,
s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. Credentials are never typed here: they are those that the
Hub's login (HF_TOKEN), Azure (AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_CONNECTION_STRING), AWS
(AWS_ACCESS_KEY_ID) and Google keep in the environment.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from apps import mole_library
from mole_vl.faults import as_messages
from mole_vl.library import ContendedError, MissingExpertError
from mole_vl.program import command

COMMANDS = {"library": mole_library.COMMANDS}


@contextmanager
def _faults_of_libraries() -> Iterator[None]:
    """What a library says of names, writers and extras, as the faults of a command."""
    try:
        yield
    except (MissingExpertError, ContendedError, ModuleNotFoundError) as error:
        raise ValueError(str(error)) from error


def main() -> None:
    """Run the command that is typed."""
    with as_messages("nlp", "apps"), _faults_of_libraries():
        command(COMMANDS, "mole", __doc__)


if __name__ == "__main__":
    main()

import uuid
from dataclasses import dataclass, field

import pytest
from huggingface_hub import close_session, constants
from moto.server import ThreadedMotoServer

from benchmarks.azurite import ACCOUNT, INSTALL, azurite_program, azurite_server
from mole_vl.library import ExpertLibrary
from tests.mole_vl.library.hub_server import hub_server


def pytest_collection_modifyitems(items):
    for item in items:
        # huggingface_hub hands its own client a large file in a way that this has grown out of.
        if "hub" in item.fixturenames or "new_place" in item.fixturenames:
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@dataclass
class Place:
    """An address of which nothing is known yet, and how it is reached."""

    uri: str
    how: dict = field(default_factory=dict)

    def begin(self):
        return ExpertLibrary.open(self.uri, create=True, **self.how)

    def open(self):
        return ExpertLibrary.open(self.uri, **self.how)


@pytest.fixture(scope="session")
def s3():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"options": {"endpoint_url": f"http://{host}:{port}", "key": "ann", "secret": "ann"}}
    server.stop()


@pytest.fixture(scope="session")
def azure(tmp_path_factory):
    if azurite_program() is None:
        pytest.skip(f"Azurite is not installed: {INSTALL}")
    with azurite_server(tmp_path_factory.mktemp("azurite")) as connection:
        yield {"token": connection}


@pytest.fixture
def hub(monkeypatch):
    # The tests are offline; the server on this machine is not.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with hub_server() as (server, address):
        server.address = address
        yield server
    close_session()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLE_VL_CACHE", str(tmp_path / "cache"))


KINDS = ["disk", "memory", "s3", "azure", "hub"]


@pytest.fixture
def new_place(request, tmp_path):
    """Makes an address of a kind of store that holds nothing yet."""

    def make(kind):
        word = uuid.uuid4().hex
        if kind == "disk":
            return Place(f"local://{tmp_path / word}")
        if kind == "memory":
            return Place(f"virtual://{word}")
        if kind == "s3":
            return Place(f"s3://bucket{word}/shelf", request.getfixturevalue("s3"))
        if kind == "azure":
            return Place(f"az://{ACCOUNT}/{word}", request.getfixturevalue("azure"))
        options = {"endpoint": request.getfixturevalue("hub").address}
        return Place(f"hf://ann/{word}", {"options": options})

    return make


@pytest.fixture(params=KINDS)
def place(request, new_place):
    return new_place(request.param)

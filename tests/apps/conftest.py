import pytest

from tests.apps.toys import toy


@pytest.fixture
def page(tmp_path):
    return toy(tmp_path)

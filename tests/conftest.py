"""Fixtures that more than one test file uses."""
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def data():
    """Folder of the small reference numbers kept in the repository."""
    return HERE / "data"


@pytest.fixture(scope="session")
def shared():
    """Folder of the large reference material beside the checkout, where there is one."""
    path = HERE.parents[1] / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared with the large reference material is not here")
    return path

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.indexed import STORES
from zonebundle.store.index import Index


@pytest.fixture
def index_path(tmp_path: Path) -> Path:
    """Where an index is made."""
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(index_path: Path) -> Iterator[Index]:
    """A new index, open."""
    index = Index.open(index_path, STORES)
    yield index
    index.close()

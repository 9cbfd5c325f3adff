from pathlib import Path

import pytest
from hub_fetch import write_repositories
from hub_server import Hub, closed_port


@pytest.fixture(scope="session")
def repos(tiny_model, tmp_path_factory) -> dict[str, dict[str, Path]]:
    return write_repositories(tmp_path_factory.mktemp("repos"), tiny_model)


@pytest.fixture
def hub(repos):
    with Hub(repos) as hub:
        yield hub


@pytest.fixture
def home(tmp_path) -> Path:
    """An empty cache of the hub client."""
    return tmp_path / "home"


@pytest.fixture
def no_hub() -> str:
    """An endpoint that refuses connections."""
    return f"http://127.0.0.1:{closed_port()}"

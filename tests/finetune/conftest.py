"""Names and sizes of layers are claimed here: of models as large as the pocket models."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_sd3(pocket_sd3: Path) -> Path:
    return pocket_sd3


@pytest.fixture(scope="session")
def tiny_sd15(pocket_sd15: Path) -> Path:
    return pocket_sd15

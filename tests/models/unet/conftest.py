"""Pipelines of three families as folders and as single files, made once for the module."""

import os
from pathlib import Path
from typing import Any

import pytest

from dojo.models.unet.single_file import vocabulary

from . import tiny
from .tiny import Source


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of caches of this module's own."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tokenizers, of CLIP's whole vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabulary.write(folder / "tokenizer")
    vocabulary.write(folder / "tokenizer_2", pad="!")
    return folder


@pytest.fixture(scope="module", params=list(tiny.PARTS))
def source(
    request: pytest.FixtureRequest, tokenizers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Source:
    return Source(request.param, tmp_path_factory.mktemp(request.param), tokenizers)


@pytest.fixture(scope="module")
def sd1(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source("sd1", tmp_path_factory.mktemp("one"), tokenizers)

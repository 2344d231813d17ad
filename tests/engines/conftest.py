"""Tiny models for the tests of the llama engine, made once a run; their tests are skipped where llama.cpp is missing."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from meshserve.engines.llama.context import LlamaContext
    from meshserve.engines.llama.model import LlamaModel

KINDS_WITH_BLOCKS, KINDS_WITH_STATES = ("dense", "moe", "sliding-window"), ("hybrid", "recurrent")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GGUF file of each kind of model."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    pytest.importorskip("gguf")
    from tests.engines.tiny_models import MODELS, make_model

    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / f"{kind}.gguf", model) for kind, model in MODELS.items()}


@pytest.fixture(scope="session")
def tiny_models(tiny_files: dict[str, Path]) -> "Iterator[dict[str, LlamaModel]]":
    """The models of those files that generate text."""
    from meshserve.engines.llama.model import LlamaModel

    loaded = {kind: LlamaModel(path) for kind, path in tiny_files.items() if kind != "embedding"}
    yield loaded
    for model in loaded.values():
        model.close()


@pytest.fixture
def contexts(tiny_models: "dict[str, LlamaModel]") -> "Iterator[Callable[..., LlamaContext]]":
    """Makes contexts that are closed after the test, twice; of a kind of model, with small sizes unless told otherwise."""
    from meshserve.engines.llama.context import LlamaContext, probe

    made = []

    def make(kind: str = "dense", **options: Any) -> LlamaContext:
        settings = {"num_cells": 512, "num_sequences": 6, "max_batch": 64, "max_outputs": 8, "num_threads": 1, **options}
        made.append(LlamaContext(tiny_models[kind], **settings))
        assert probe(made[-1]) == ""
        return made[-1]

    yield make
    for context in made:
        context.close()
        context.close()

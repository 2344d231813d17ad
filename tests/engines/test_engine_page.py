"""The example in docs/engines.md is an engine."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.conformance import CHECKS, Subject, check_engine
from meshserve.engines.protocol import Engine, EngineOptions

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


@pytest.fixture(scope="module")
def toy_engine() -> Callable[[EngineOptions], Engine]:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    factory: Callable[[EngineOptions], Engine] = names["ToyEngine"]
    return factory


def test_the_page_s_example_keeps_all_rules(toy_engine: Callable[[EngineOptions], Engine]) -> None:
    report = asyncio.run(check_engine(Subject(lambda: toy_engine(EngineOptions()), range(256))))
    assert report.is_conformant, str(report)
    assert report.named("skipped") == ["an_end_of_the_model_ends_the_output", "log_probabilities_come_with_their_tokens"]
    assert len(report.results) == len(CHECKS)

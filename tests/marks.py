"""Which cases of a test are slow ones."""

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(values: Iterable[Any], count: int = 1) -> list[Any]:
    """The first cases are tested each time, the others with the slow tests: they cost much and seldom tell more."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=[] if n < count else pytest.mark.slow) for n, case in enumerate(cases)]

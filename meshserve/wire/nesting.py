"""How deep plain data goes: what recurses over it later must not be led to the end of its stack. Pure."""

from typing import Any

MAX_NESTING = 64
"""Levels of maps and lists in tools, schemas and arguments."""


def is_shallow(value: Any, max_levels: int = MAX_NESTING) -> bool:
    """Whether maps and lists are in each other no deeper than this. Takes no stack itself."""
    level = [value]
    for _ in range(max_levels):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return True
    return False


def _children(parent: Any) -> Any:
    return parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ()

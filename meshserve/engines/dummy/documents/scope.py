"""Schemas made flat: references followed, `allOf` merged, every keyword known and well formed; and what that may cost. Pure."""

from typing import Any
from urllib.parse import unquote

from meshserve.engines.dummy.documents.keywords import PARAM, checked, is_annotation, malformed
from meshserve.engines.dummy.documents.merging import Schema, are_disjoint, have_no_common_value, merged, with_const
from meshserve.errors import InvalidRequest, Unsupported

_MOST_STEPS = 1000
"""What one schema may cost to read: a step is 5 to 10 us."""
_VALUES_A_STEP = 8
_CHARACTERS_A_VALUE = 32
MOST_SCHEMAS_NESTED = 64
_MOST_VALUES, _MOST_VALUES_NESTED = 8192, 2 * MOST_SCHEMAS_NESTED + 32


class Scope:
    """The schema document that references lead into, and how much of it may still be looked at."""

    def __init__(self, root: Any) -> None:
        """Raises Unsupported for a document that is too large or too deep to be looked at by recursion."""
        self._root = root
        self._num_steps = 0
        level, num_values = [root], 0
        for _ in range(_MOST_VALUES_NESTED):
            num_values += len(level)
            level = [value for found in level if isinstance(found, (dict, list)) for value in _within(found)]
            if not level:
                return
            if num_values > _MOST_VALUES:
                break
        raise Unsupported("the schema has too many parts, or nests too deep", param=PARAM)

    def count(self, num_values: int = 0) -> None:
        """One step more, and some for what it has to look at. Raises Unsupported when they are too many."""
        self._num_steps += 1 + num_values // _VALUES_A_STEP
        if self._num_steps > _MOST_STEPS:
            raise Unsupported(f"the schema is too large: reading it takes more than {_MOST_STEPS} steps", param=PARAM)

    @staticmethod
    def is_only_reference(schema: Schema) -> bool:
        """Whether it says nothing but `$ref`, so that what it refers to stands for it."""
        return all(key == "$ref" or is_annotation(key) for key in schema)

    def resolve(self, reference: str, nested: int) -> Any:
        """What a reference leads to. Raises InvalidRequest if nothing is there, Unsupported if it leads out of the schema."""
        self._check_depth(nested)
        if reference != "#" and not reference.startswith("#/"):
            raise Unsupported(f"the schema refers to {reference!r:.80}; only '#' and '#/...' can be followed", param=PARAM)
        found = self._root
        for part in reference.split("/")[1:]:
            self.count()
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and len(key) < 5 and int(key) < len(found):
                found = found[int(key)]
            else:
                raise InvalidRequest(f"the schema refers to {reference!r:.80}, which is not there", param=PARAM)
        return found

    def flat(self, schema: Any, nested: int) -> Schema | None:
        """The schema in one piece; None for one that allows nothing. Raises InvalidRequest, Unsupported."""
        self._check_depth(nested)
        if isinstance(schema, bool):
            return {} if schema else None
        if not isinstance(schema, dict):
            raise malformed("part", schema)
        if "$id" in schema and schema is not self._root:
            raise Unsupported("the schema has an $id within, which changes what its references mean", param=PARAM)
        own = {key: checked(key, value) for key, value in schema.items() if not is_annotation(key)}
        self.count(_cost(own))
        parts = own.pop("allOf", [])
        if "$ref" in own:
            parts = [self.resolve(own.pop("$ref"), nested), *parts]
        found: Schema | None = with_const(own) if "const" in own else own
        for part in parts:
            found = self.merged(found, self.flat(part, nested + 1))
        return found

    def merged(self, one: Schema | None, other: Schema | None) -> Schema | None:
        """What both allow; None if that is nothing. Raises Unsupported where one schema cannot say it."""
        self.count(_cost(one or {}) + _cost(other or {}))
        return merged(one, other)

    def check_exclusive(self, branches: list[Schema | None]) -> None:
        """Raises Unsupported unless it is plain that no document is valid under two of these."""
        costs = [_cost(branch or {}) for branch in branches]
        self.count(sum(costs))
        if have_no_common_value(branches):
            return
        for index, one in enumerate(branches):
            for number in range(index):
                self.count((costs[index] + costs[number]) // 2)
                if not are_disjoint(one, branches[number]):
                    raise Unsupported("the schema has a oneOf whose branches cannot be told apart; anyOf would do", param=PARAM)

    def _check_depth(self, nested: int) -> None:
        if nested > MOST_SCHEMAS_NESTED:
            raise Unsupported(f"the schema nests more than {MOST_SCHEMAS_NESTED} levels deep", param=PARAM)


def _cost(schema: Schema) -> int:
    """How much there is to look at in a flat schema: what is within its properties is looked at, and counted, by itself."""
    num_values = 0
    for key, value in schema.items():
        if key in ("enum", "const"):
            num_values += _num_values(value)
        elif isinstance(value, (dict, list)):
            num_values += len(value)
    return num_values


def _num_values(value: Any) -> int:
    if isinstance(value, str):
        return 1 + len(value) // _CHARACTERS_A_VALUE
    return 1 + sum(map(_num_values, _within(value))) if isinstance(value, (dict, list)) else 1


def _within(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value

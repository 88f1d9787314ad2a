"""JSON that can be read in one way only: what two parsers understand differently is refused.

JSON leaves open what an object with a repeated key means; a verifier that takes the last value and an app that takes
the first would not see the same document.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!a} stands twice in one object")
    return value


def parse(model: type[Model], raw: bytes) -> Model:
    """UTF-8 JSON as `model`, by the model's own rules; no object in it has a key twice.

    Raises:
        ValueError: not JSON, a repeated key, or not the model; the text names the places and quotes no values.
    """
    try:
        value = model.model_validate_json(raw)  # first: its parser bounds the nesting
        json.loads(raw, object_pairs_hook=_unique)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)
        listed = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}" for item in problems)
        raise ValueError(listed.encode("ascii", "backslashreplace").decode()) from None
    return value

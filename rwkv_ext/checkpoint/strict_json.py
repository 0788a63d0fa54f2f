"""strict_json: JSON in which no object has a name twice; the usual readers keep the last one and say nothing."""

import json


class DuplicateName(ValueError):
    """An object has this name twice."""

    def __init__(self, name: str):
        super().__init__(f"{name} is there twice")
        self.name = name


def parse(content: bytes) -> object:
    """Return the value; DuplicateName, or another ValueError where the content is no JSON."""
    return json.loads(content, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = {}
    for name, item in pairs:
        if name in value:
            raise DuplicateName(name)
        value[name] = item
    return value

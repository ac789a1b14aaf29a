"""A YAML file whose errors can say where: every key's line, and no key twice.

PyYAML takes the last of two equal keys without a word; a matcher would vanish.
"""

from __future__ import annotations

import yaml


class DuplicateKey(ValueError):
    """A mapping holds a key twice; the message names the key and both lines."""


def read_yaml(text: str) -> tuple[object, dict[tuple[str, ...], int]]:
    """Parse YAML with plain values.

    Returns:
        What it says, and the line (from 1) of every key, by its path of keys.

    Raises:
        yaml.YAMLError: it is no YAML, or asks for objects of Python.
        DuplicateKey: a mapping holds a key twice.
    """
    lines: dict[tuple[str, ...], int] = {}
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    _walk(node, (), lines)
    return yaml.safe_load(text), lines


def _walk(node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if not isinstance(node, yaml.MappingNode) or len(path) > 3:  # an alias may hold itself
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            raise DuplicateKey(f"key {here[-1]!r} stands twice, in line {lines[here]} and in line {line}")
        lines[here] = line
        _walk(value, here, lines)

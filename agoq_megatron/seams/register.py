"""Whether Megatron's internals are those that this project reaches for, seam by seam, at start.

``compat.py`` rebinds names, other modules subclass, read results by position or do over what a stock function
does. A patch release may change any of these without a word, and the run would train wrongly or fail late. So
each is looked at in the functions as they are loaded, some 30 ms in all; what differs is named, and nothing
starts. ``register.toml`` has them all, by module.

Of a function may be said:

    takes     its parameters, in order: where ours takes its place or passes them by position
    uses      names that it must look up: functions of ours are bound under them, or it reads and sets them
    returns   names at positions of every tuple that it returns: ours read them by position
    copied    a checksum of its text: ours does over, in other words, what it does. Comments do not count.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import textwrap
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType

FILE = Path(__file__).with_name("register.toml")
_TORN = (OSError, SyntaxError, IndexError, ValueError, AttributeError)  # while a function's text is read


@dataclass(frozen=True)
class Seam:
    """A function, class or other name of Megatron's; see above.

    Attributes:
        module, name: where it is defined; "Class.method" too.
        why: which of our modules reaches for it.
    """

    module: str
    name: str
    why: str
    takes: str | None = None
    uses: str = ""
    returns: Mapping[str, str] = field(default_factory=dict)
    copied: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _found(seam: Seam):
    """What stands there now; functions without what decorates them.

    Raises:
        ImportError, KeyError: nothing does.
    """
    found = importlib.import_module(seam.module)
    for part in seam.name.split("."):
        found = vars(found)[part]  # of a class what it defines itself, nothing that it inherits
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    return inspect.unwrap(found) if callable(found) and not isinstance(found, type) else found


def _codes(found) -> Iterator[CodeType]:
    """Of a function, with those within it; of a class, of all its methods."""
    if isinstance(found, type):
        for member in vars(found).values():
            if isinstance(member, FunctionType):
                yield from _codes(inspect.unwrap(member))
        return
    waiting = [found.__code__]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _names(found) -> set[str]:
    names = set(getattr(found, "__dataclass_fields__", ()))
    for code in _codes(found):
        names.update(code.co_names, code.co_varnames, (c for c in code.co_consts if isinstance(c, str)))
    return names


def _text(found: FunctionType) -> str:
    """Its source, from the first decorator on."""
    first = found.__code__.co_firstlineno
    last = max(line for code in _codes(found) for *_, line in code.co_lines() if line)
    lines = linecache.getlines(found.__code__.co_filename)
    indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
    while last < len(lines) and lines[last].strip() and not lines[last][: indent + 1].strip():
        last += 1  # brackets that close on lines of their own
    return "".join(lines[first - 1 : last])


def checksum(found: FunctionType) -> str:
    """Of a function's text, without comments on lines of their own, empty lines and indentation."""
    lines = (line.strip() for line in _text(found).splitlines())
    return f"{zlib.crc32(chr(10).join(x for x in lines if x and not x.startswith('#')).encode()):08x}"


def _parameters(found) -> str:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(marks.get(p.kind, "") + p.name for p in inspect.signature(found).parameters.values())


def _returned(found: FunctionType) -> Iterator[list[str]]:
    """Of every tuple that the function returns, the elements as they are written."""
    own = ast.parse(textwrap.dedent(_text(found))).body[0]
    waiting: list[ast.AST] = list(own.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield [ast.unparse(element) for element in node.value.elts]
        waiting += ast.iter_child_nodes(node)


def _problem(seam: Seam) -> str | None:
    """What is wrong with a seam, or None."""
    try:
        found = _found(seam)
    except (ImportError, KeyError):
        return "is missing"
    if seam.takes is not None and (takes := _parameters(found)) != seam.takes:
        return f"takes ({takes}) instead of ({seam.takes})"
    if seam.uses and (missing := sorted(set(seam.uses.split()) - _names(found))):
        return f"does not look up or set {', '.join(missing)}"
    try:
        if seam.returns:
            tuples = list(_returned(found))
            for position, names in seam.returns.items():
                for elements in tuples:
                    at = elements[int(position)] if int(position) < len(elements) else "nothing"
                    if at not in names.split("|"):
                        return f"returns {at} at position {position} instead of {names.replace('|', ' or ')}"
            if not tuples:
                return "returns no tuple any more"
        if seam.copied and (text := checksum(found)) not in seam.copied.split():
            return f"does something else (its text has the checksum {text})"
    except _TORN:
        return "cannot be read"
    return None


OF_ITS_LOOP = (
    "megatron.training.", "megatron.core.datasets", "megatron.core.dist_checkpointing",
    "megatron.core.distributed", "megatron.core.optimizer", "megatron.core.rerun_state_machine",
)  # fmt: skip
"""Beginnings of modules that stay as they are where Megatron's own loop trains with our layers (--spec)."""


OF_TRAINING = (
    "megatron.training.", "megatron.core.datasets", "megatron.core.dist_checkpointing",
    "megatron.core.rerun_state_machine",
)  # fmt: skip
"""Those of Megatron's loop, of which ``agoq_megatron.enable`` reads nothing."""


def all_seams() -> list[Seam]:
    """Those of the file."""
    modules = tomllib.loads(FILE.read_text())
    return [Seam(module, name, **rest) for module, of in modules.items() for name, rest in of.items()]


def problems(seams: Iterable[Seam]) -> list[str]:
    """What is wrong, a sentence a seam, with its name and who reaches for it."""
    return [f"{seam} {wrong} ({seam.why})" for seam in seams if (wrong := _problem(seam))]

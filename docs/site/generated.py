"""Parts of pages that are read off the code, and off stored results, when the site is built.

    python docs/site/generated.py flags       # prints one: flags, layers, results

The code is parsed, not imported: the site builds where neither torch nor Megatron is installed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROUPS = {
    "Activations": ("agoq_activations", "agoq_rounding", "agoq_seed"),
    "Loss": ("agoq_loss",),
    "Sequences over ranks": ("agoq_context",),
    "Gradients": ("agoq_grad",),
    "Optimizer states": ("agoq_optimizer", "agoq_master"),
}
"""Titles of the flags page, with the beginnings of the fields below each; other fields follow."""
REST = "The run"


@dataclass(frozen=True)
class Flag:
    """A field of ``AGoQConfig``.

    Attributes:
        field: its name.
        values: what it takes, in words; empty for a switch.
        default: as written in the class.
        text: its docstring, in one paragraph.
    """

    field: str
    values: str
    default: str
    text: str

    @property
    def name(self) -> str:
        """As typed."""
        return "--" + ("no-" if self.default == "True" else "") + self.field.replace("_", "-")


def flags(source: str) -> list[Flag]:
    """Every field of the dataclass in ``config.py``, in order.

    Args:
        source: text of that file.

    Raises:
        ValueError: a field without a docstring.
    """
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = []
    for field, text in zip(body, body[1:] + [None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        if not (isinstance(text, ast.Expr) and isinstance(getattr(text.value, "value", None), str)):
            raise ValueError(f"config.py, line {field.lineno}: {field.target.id} has no docstring")
        words = " ".join(text.value.value.split())
        values = _values(field.annotation)
        found.append(Flag(field.target.id, values, ast.unparse(field.value), words))
    return found


def _values(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.BinOp):  # T | None
        return _values(annotation.left)
    if isinstance(annotation, ast.Subscript):  # Literal[...]
        items = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return " / ".join(str(item.value) for item in items)
    return {"str": "text", "int": "whole number", "float": "number", "bool": ""}[annotation.id]


def _markdown(text: str) -> str:
    """A docstring's words: what is special to Markdown is shown as it stands, flags as code."""
    text = re.sub(r"([*_<])", r"\\\1", text)
    return re.sub(r"--[a-z][\w\\-]*", lambda flag: f"`{flag[0].replace(chr(92), '')}`", text)


def flags_page(root: Path) -> str:
    """The flags by group: name, values, default, meaning."""
    groups: dict[str, list[Flag]] = {title: [] for title in (*GROUPS, REST)}
    for flag in flags((root / "agoq_megatron/config.py").read_text()):
        titles = [title for title, starts in GROUPS.items() if flag.field.startswith(starts)]
        groups[titles[0] if titles else REST].append(flag)
    lines = []
    for title, members in groups.items():
        lines += [f"## {title}", ""] if members else []
        for flag in members:
            values = f" `{flag.values}`" if flag.values else ""
            default = {"False": "off", "None": "none"}.get(flag.default, flag.default.strip("'\""))
            lines += [f"### {flag.name}", "", f"`{flag.name}`{values}, default: `{default}`", ""]
            lines += [_markdown(flag.text), ""]
    return "\n".join(lines)


def summary(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    words = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", words)[0].rstrip(".:;").replace("``", "`")
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", sentence)


def layers_table(root: Path) -> str:
    """The layers of imports in pyproject.toml, uppermost first, and what each module is."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    lines = ["| | module of `agoq_megatron` | what it is |", "|---|---|---|"]
    for number, layer in enumerate(contract["layers"]):
        for name in re.findall(r"\w+", layer):
            path = root / "agoq_megatron" / name
            modules = sorted(p for p in path.rglob("*.py") if p.stem != "__init__") if path.is_dir() else []
            if not modules:
                modules = [path.with_suffix(".py")]
                if not modules[0].is_file():  # the contract may name what is not there
                    continue
            single = not path.is_dir()
            what = "<br>".join(("" if single else f"{_named(p, path)}: ") + summary(p) for p in modules)
            lines.append(f"| {number + 1} | `{name}` | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _named(module: Path, room: Path) -> str:
    """A module of a room, behind its folder in there if it has one."""
    return "".join(f"{folder}/" for folder in module.relative_to(room).parts[:-1]) + f"`{module.stem}`"


def results_page(root: Path) -> str:
    """Every file of raw numbers in docs/results, newest first: machine, command, and the medians of step
    times where it holds some."""
    lines = []
    for path in sorted((root / "docs/results").glob("*.json"), reverse=True):
        data = json.loads(path.read_text())
        # Several calls of a bench may lie in one file, by what they differ in.
        parts = {k: v for k, v in data.items() if isinstance(v, dict) and "medians" in v} or {"": data}
        first = next(iter(parts.values()))
        machine = first.get("card") or first.get("cards") or first.get("machine") or "see its page"
        lines += [f"### {path.stem}", "", f"[{path.name}](results/{path.name}), {machine}.", ""]
        for name, part in parts.items():
            lines += [f"{name}:", ""] if name else []
            for key in ("train command", "study command", "command"):
                lines += [f"    {part[key]}", ""] if key in part else []
            if "medians" in part:
                lines += [*_medians(part["medians"]), ""]
    return "\n".join(lines)


def _medians(rows: list[dict]) -> list[str]:
    lines = ["| run | runs | ms a step | against the first | peak (MiB) |", "|---|---|---|---|---|"]
    for row in rows:
        if row.get("step_ms") is None:
            lines.append(f"| {row['name']} | 0 | failed | | |")
            continue
        ratio = row["step_ms"] / rows[0]["step_ms"] if rows[0].get("step_ms") else None
        peak = max(row.get("peaks_mib", {}).values(), default=row.get("peak_allocated_mib"))
        against = f"{ratio:.3f}" if ratio else ""
        memory = f"{peak:,.0f}" if peak else ""
        lines.append(f"| {row['name']} | {row['runs']} | {row['step_ms']:.1f} | {against} | {memory} |")
    return lines


GENERATED: dict[str, Callable[[Path], str]] = {
    "flags": flags_page,
    "layers": layers_table,
    "results": results_page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a generated part of the documentation.")
    parser.add_argument("part", choices=GENERATED)
    print(GENERATED[parser.parse_args().part](Path(__file__).resolve().parents[2]))


if __name__ == "__main__":
    main()

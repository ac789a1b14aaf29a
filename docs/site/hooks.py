"""What mkdocs is told beside mkdocs.yml: the order of the pages, the front page, what is generated.

- The navigation lists the pages that exist: :data:`SECTIONS` where they are named, the others at its end.
- README.md is the front page.
- A line ``<!-- generated: NAME -->`` is replaced by what ``generated.py`` makes of the code.
- Links to folders, and to files of the repository outside docs/, become their paths: the site does not hold
  them. One that leads nowhere is an error.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file without its folder's

from generated import GENERATED  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

SECTIONS = {
    "Start": ["index", "quickstart", "how-it-works", "megatron-lm"],
    "Use": [
        *("flags", "policies", "planner", "auto", "checkpoints", "watching", "slurm", "faults"),
        *("accelerators", "support", "troubleshooting"),
    ],
    "Results": ["results", "performance", "convergence", "format-study", "state-study"],
    "Inside": ["design", "architecture", "contributing", "checks", "log"],
}
"""Pages by their names without ``.md``; those that are not there (yet) are left out."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def navigation(pages: set[str]) -> list[dict[str, list[str]]]:
    """The sections with the pages that there are; what no section names comes under "More".

    Args:
        pages: names without ``.md``.
    """
    named = {page for section in SECTIONS.values() for page in section}
    sections = SECTIONS | {"More": sorted(pages - named)}
    found = {title: [f"{p}.md" for p in section if p in pages] for title, section in sections.items()}
    return [{title: section} for title, section in found.items() if section]


def on_config(config):
    """Called before files are collected."""
    config.nav = navigation({path.stem for path in DOCS.glob("*.md")} | {"index"})
    return config


def on_files(files: Files, config) -> Files:
    """Adds the front page."""
    files.append(File.generated(config, "index.md", content=front_page((ROOT / "README.md").read_text())))
    return files


def front_page(readme: str) -> str:
    """README.md as a page of the site: what it links to in docs/ lies beside it there."""
    return readme.replace("](docs/", "](")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called with each page's text."""
    where = page.file.src_uri
    return MARK.sub(lambda mark: insert(mark[1], where), outside_links(markdown, where))


def insert(name: str, where: str) -> str:
    if name not in GENERATED:
        raise PluginError(f"{where}: {name!r} is not generated; {', '.join(GENERATED)} are")
    return GENERATED[name](ROOT)


def outside_links(markdown: str, where: str) -> str:
    """``[text](../path)`` as text and path, where the repository has that file.

    Raises:
        PluginError: it has not.
    """

    def plain(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(where), link[2]))
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            return link[0]  # mkdocs knows these
        if not (ROOT / path).exists():
            raise PluginError(f"{where}: {link[0]} leads to {path}, which does not exist")
        name = link[1].strip("`").rstrip("/")
        return f"`{path}`" if name in (path, posixpath.basename(path)) else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)

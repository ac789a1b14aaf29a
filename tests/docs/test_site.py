"""The documentation builds, strictly, and its generated parts say what the code says."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docs/site/mkdocs.yml"

builds = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason='mkdocs is not installed: pip install -e ".[docs]"'
)


def module(name: str):
    """A file of docs/site, as mkdocs runs it."""
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", ROOT / f"docs/site/{name}.py")
    it = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = it  # its dataclasses look themselves up there
    spec.loader.exec_module(it)
    return it


generated = module("generated")


def build(folder: Path, config: Path = CONFIG) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", config, "--site-dir", folder]
    # Where torch and Megatron cannot be imported: the site needs neither.
    blocked = folder.parent / "blocked"
    for name in ("torch", "megatron", "agoq_megatron", "agoq_kernels"):
        (blocked / name).mkdir(parents=True, exist_ok=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not for the documentation')\n")
    path = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )


@builds
def test_it_builds_without_a_warning(tmp_path):
    """Broken links, unknown anchors and pages that the navigation lacks are warnings, which are failures."""
    built = build(tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    front = (tmp_path / "site/index.html").read_text()
    for page in pages - {"404", "search"}:
        assert f'href="{page}.html"' in front or page == "index", f"{page} is not in the navigation"
    for path in (tmp_path / "site").glob("*.html"):
        assert "<!-- generated" not in path.read_text(), path


@builds
@pytest.mark.parametrize("text, words", [
    ("[there](nowhere.md)", "nowhere.md"),
    ("[there](flags.md#no-such-flag)", "no-such-flag"),
    ("[there](../no/such/file.py)", "no/such/file.py"),
    ("![picture](figures/none.svg)", "figures/none.svg"),
    ("\n<!-- generated: nothing -->\n", "nothing"),
])  # fmt: skip
def test_what_leads_nowhere_fails(tmp_path, text, words):
    docs = tmp_path / "repository/docs"
    docs.parent.mkdir()
    for name in ("README.md", "pyproject.toml", "agoq_megatron", "scripts", "tests", "kernels"):
        (docs.parent / name).symlink_to(ROOT / name)
    docs.mkdir()
    for path in (ROOT / "docs").iterdir():
        if path.is_dir() and path.name == "site":
            (docs / "site").mkdir()
            for part in ("mkdocs.yml", "extra.css", "hooks.py", "generated.py"):
                # Copies: hooks.py looks for its root by where it lies.
                (docs / "site" / part).write_text((path / part).read_text())
        else:
            (docs / path.name).symlink_to(path)
    page = docs / "more.md"
    page.write_text(f"# More\n\n{text}\n")
    built = build(tmp_path / "site", docs / "site/mkdocs.yml")
    assert built.returncode != 0 and words in built.stderr, built.stderr
    page.write_text("# More\n\n[there](flags.md)\n")
    built = build(tmp_path / "site", docs / "site/mkdocs.yml")
    assert built.returncode == 0, built.stderr


def test_every_flag_is_on_the_page():
    """As Megatron's parser knows it: name, choices, default, help."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    from agoq_megatron.config import AGoQConfig

    page = generated.flags_page(ROOT)
    sections = {text.split("\n")[0]: text for text in page.split("\n### ")[1:]}
    parser = argparse.ArgumentParser(add_help=False)
    ArgumentGroupFactory(AGoQConfig).build_group(parser, "AGoQ")
    actions = {action.option_strings[0]: action for action in parser._actions}
    assert set(sections) == set(actions) and len(actions) == len(dataclasses.fields(AGoQConfig))
    for name, action in actions.items():
        section = sections[name]
        for choice in action.choices or ():
            assert str(choice) in section.split("\n")[2], name
        default = {"None": "none", "False": "off"}.get(str(action.default), str(action.default))
        assert f"default: `{default}`" in section, name
        plain = " ".join(section.split("\n## ")[0].replace("`", "").replace("\\", "").split())
        assert plain.endswith(" ".join(action.help.split())), name


def test_a_flag_without_words_is_an_error():
    source = (ROOT / "agoq_megatron/config.py").read_text()
    undocumented = re.sub(r'(agoq_seed: .*\n)    """.*\n', r"\1", source)
    assert undocumented != source
    with pytest.raises(ValueError, match="agoq_seed has no docstring"):
        generated.flags(undocumented)


def test_every_module_is_in_the_table_of_layers():
    page = generated.layers_table(ROOT)
    for path in (ROOT / "agoq_megatron").rglob("*.py"):
        if path.stem != "__init__":
            assert f"`{path.stem}`" in page, path
            assert generated.summary(path), f"{path} has no docstring"


def test_stored_medians_are_printed():
    import json

    page = generated.results_page(ROOT)
    for path in (ROOT / "docs/results").glob("*.json"):
        assert path.name in page
        for row in json.loads(path.read_text()).get("medians", ()):
            if row.get("step_ms") is not None:
                assert f"| {row['name']} | {row['runs']} | {row['step_ms']:.1f} |" in page


def test_the_navigation_takes_what_is_there():
    hooks = pytest.importorskip("mkdocs") and module("hooks")
    nav = hooks.navigation({"index", "design", "a-new-page"})
    assert nav == [{"Start": ["index.md"]}, {"Inside": ["design.md"]}, {"More": ["a-new-page.md"]}]
    links = "[a](../README.md), [`b`](../scripts/test.sh), [c](results/), [d](flags.md), ![e](../x.png)"
    assert hooks.outside_links(links, "page.md") == (
        "a (`README.md`), `b` (`scripts/test.sh`), c (`docs/results`), [d](flags.md), ![e](../x.png)"
    )


# --- Figures --------------------------------------------------------------------------------------


def test_the_timeline_is_the_schedule():
    """Peaks are those of Schedule.counts, every stage ends with nothing and takes as long as its work."""
    import docs_figures

    from agoq_megatron.planning.in_flight import Schedule

    for schedule in (Schedule(4, 8, 2), Schedule(4, 8), Schedule(3, 5), Schedule(1, 3), Schedule(2, 5, 2, 3)):
        lines = docs_figures.timeline(schedule)
        peaks = [max(n for _, n in line) for line in lines]
        assert peaks == [schedule.counts(stage) for stage in range(schedule.stages)]
        work = schedule.micro_batches * schedule.chunks * (docs_figures.FORWARD + docs_figures.BACKWARD)
        for line in lines:
            times = [time for time, _ in line]
            assert line[0][1] == line[-1][1] == 0 and times[-1] >= work
    # 1F1B of p equal stages and m micro-batches takes (m + p - 1) forwards and backwards.
    ends = [line[-1][0] for line in docs_figures.timeline(Schedule(4, 8))]
    assert max(ends) == (8 + 4 - 1) * (docs_figures.FORWARD + docs_figures.BACKWARD)


@pytest.mark.slow
def test_figures_show_what_the_code_computes(tmp_path):
    """The stored ones: the sums beside their bars."""
    run = subprocess.run(
        [sys.executable, ROOT / "scripts/docs/docs_figures.py", "--output", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("layer", "pipeline", "memory"):
        stored, drawn = (labels(folder / f"how-{name}.svg") for folder in (ROOT / "docs/figures", tmp_path))
        assert stored == drawn and len(drawn) > 10
    assert re.search(r"^agoq: 3\.6\dU", run.stdout, re.M) and re.search(r"^off: 17\.\d\dU", run.stdout, re.M)


def labels(path: Path) -> list[str]:
    """All words in a figure."""
    tree = xml.etree.ElementTree.parse(path)
    return [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]

"""The file of sensitivities: its reader, what is refused, and what goes into it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from agoq_megatron.modules.sites import FC1_OUTPUT, KEY, LAYER_INPUT, NORM1_INPUT, NORM2_INPUT, QUERY


def content() -> dict:
    """A small file's."""
    four, eight = ({"own": 0.3, "flowing": 0.4, "bits": 4.125}, {"own": 0.01, "flowing": 0, "bits": 8.25})
    sites = {
        "mlp.linear_fc1.output": {"4": four, "8": eight},
        "self_attention.core_attention.query": {"8": eight},
    }
    return {
        "version": 2,
        "model": {"layers": 2, "hidden_size": 128},
        "formats": {"4": "nf4 g64 s8", "8": "int8 g64 s16"},
        "layers": {"1": sites, "2": copy.deepcopy(sites)},
    }


def read(folder: Path, data):
    from agoq_megatron.planning.sensitivity import load_sensitivities

    (folder / "some.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return load_sensitivities(folder / "some.json")


def test_cost(tmp_path):
    from agoq_kernels.formats import Format

    data = content()
    data["layers"]["2"]["mlp.linear_fc1.output"]["4"] |= {"own": 0.6, "format": "nf4 g32 s8"}
    it = read(tmp_path, data)
    assert it.cost(1, FC1_OUTPUT, 4) == pytest.approx(0.25)
    assert it.cost(2, "mlp.linear_fc1.output", 4) == pytest.approx(0.52)
    assert it.widths(1, FC1_OUTPUT) == (4, 8) and it.widths(1, QUERY) == (8,)
    assert it.format(1, FC1_OUTPUT, 4) == Format(4, "nf4", 64, 8)
    assert it.format(2, FC1_OUTPUT, 4) == Format(4, "nf4", 32, 8)
    for layer, site, width, wrong in (
        (3, QUERY, 8, "layers 1 to 2, and no layer 3"),
        (1, KEY, 8, "core_attention.key of layer 1 was not measured"),
        (1, QUERY, 4, "not measured in 4 bits; it was in 8"),
    ):
        with pytest.raises(ValueError, match=f"some.json.*{wrong}"):
            it.cost(layer, site, width)


def test_layers_of_another_depth(tmp_path):
    it = read(tmp_path, content())
    it.data["model"]["layers"] = 8
    assert [it.relative_layer(n, 8) for n in range(1, 9)] == list(range(1, 9))
    found = [it.relative_layer(n, 32) for n in range(1, 33)]
    assert found == sorted(found) and set(found) == set(range(1, 9))
    assert (found[0], found[2], found[-3], found[-1]) == (1, 1, 8, 8)
    assert [it.relative_layer(n, 3) for n in (1, 2, 3)] == [1, 5, 8]  # 4.5 is between two
    assert it.relative_layer(1, 1) == 1
    it.data["model"]["layers"] = 1
    assert [it.relative_layer(n, 5) for n in range(1, 6)] == [1] * 5


def test_another_model_is_refused(tmp_path):
    it = read(tmp_path, content())
    it.require(layers=2, hidden_size=128)
    with pytest.raises(ValueError, match="some.json: measured on a model with layers 2, but this one has 3"):
        it.require(hidden_size=128, layers=3)


def broken(*path_and_value) -> dict:
    """The content with a value at a path replaced, or without it where the value is None."""
    *path, last, value = path_and_value
    place = data = content()
    for key in path:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


ENTRY = ("layers", "2", "mlp.linear_fc1.output", "4")


@pytest.mark.parametrize("data,wrong", [
    ("{", "not a readable JSON file"), ("[]", "no sensitivities of version 2"),
    (broken("version", 1), r"version 2 \(its version: 1\)"), (broken("model", None), "'model' is missing"),
    (broken("layers", []), "'layers' is missing"),
    (broken("layers", "2", None), "2 layers, and measured are 1"),
    (broken("model", "layers", 3), "3 layers, and measured are 1, 2"),
    (broken("formats", "4", "nf5"), "format 'nf5' of 4 bits"),
    (broken("formats", "4", "int8 g64 s16"), "format 'int8 g64 s16' of 4 bits"),
    (broken("formats", "4", None), "layer 1, mlp.linear_fc1.output, 4 bits: that width has no format"),
    (broken("layers", "2", {}), "layer 2: it must map"), (broken(*ENTRY[:3], 7), "layer 2: it must map"),
    (broken("layers", "2", "mlp.input", {}), "layer 2: tensor 'mlp.input' is unknown"),
    (broken(*ENTRY, "own", math.nan), "layer 2, mlp.linear_fc1.output, 4 bits: own, flowing and bits"),
    (broken(*ENTRY, "flowing", -0.1), "finite numbers"), (broken(*ENTRY, "own", "0.1"), "finite numbers"),
    (broken(*ENTRY, "bits", None), "finite numbers"), (broken(*ENTRY, 0.1), "finite numbers"),
    (broken(*ENTRY, "format", "nf4"), "format 'nf4' is unknown"),
    (broken(*ENTRY, "format", "int8 g64 s16"), "format 'int8 g64 s16' is unknown"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, data, wrong):
    with pytest.raises(ValueError, match=f"some.json: .*{wrong}"):
        read(tmp_path, data)


def test_a_file_that_is_not_there(tmp_path):
    from agoq_megatron.planning.sensitivity import load_sensitivities

    with pytest.raises(ValueError, match="none.json: not a readable JSON file"):
        load_sensitivities(tmp_path / "none.json")


def test_groups_that_do_not_divide():
    from agoq_kernels.formats import Format

    from agoq_megatron.planning.sensitivity import BEST_FORMATS, format_for

    assert all(format_for(KEY, width, 128) == best for width, best in BEST_FORMATS.items())
    for site, outliers in (
        (KEY, 0),
        (NORM1_INPUT, 1),
        (NORM2_INPUT, 1),
        (LAYER_INPUT, 1),
    ):
        assert format_for(site, 4, 96) == Format(4, "nf4", 32, 8, outliers=outliers)
        assert format_for(site, 2, 96) == BEST_FORMATS[2]
        assert format_for(site, 4, 48) is None and format_for(site, 2, 80) is None


def test_entries_name_other_formats_and_leave_out_what_is_not_finite():
    from agoq_megatron.planning.replay import OneTensor
    from agoq_megatron.planning.sensitivity import format_for, layer_entry, table

    formats = [(KEY, 2), (KEY, 4), (KEY, 8), (QUERY, 3)]
    tried = [OneTensor(site, format_for(site, width, 96)) for site, width in formats]
    entry = layer_entry(tried, [(math.inf, 1), (0.123456789, 0.5), (0.01, 0.02), (0.1, math.nan)])
    assert entry == {
        KEY.value: {
            "4": {"own": 0.123457, "flowing": 0.5, "bits": 4.25, "format": "nf4 g32 s8"},
            "8": {"own": 0.01, "flowing": 0.02, "bits": 8.5, "format": "int8 g32 s16"},
        },
        QUERY.value: {},
    }
    lines = list(table({"1": entry, "2": layer_entry(tried[1:2], [(0.2, 0.3)]) | {QUERY.value: {}}}))
    assert lines[2].split() == [KEY.value, *"- - 0.16 / 0.4 - - 0.01 / 0.02 - -".split()]
    assert lines[3].split() == [QUERY.value, *"--------"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    from agoq_megatron.planning.sensitivity import write_atomically

    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udcff")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"

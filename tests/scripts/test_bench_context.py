"""The bench of context parallelism runs on two ranks; bytes that it counts are those that are planned."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench_context as bench
import pytest
import torch
from launch import spawn_ranks

from agoq_megatron.planning.context import context_traffic

TOKENS, HEADS, GROUPS, DIM = 64, 4, 2, 64


def planned(kind: str, way: str) -> tuple[float, float]:
    rules, bits, plain = bench.WAYS[way]
    if plain:
        rules = bench.WAYS["BF16"][0]
    by_site = dict(zip(bench.ATTENTION_SITES, rules, strict=True))
    config = SimpleNamespace(
        params_dtype=torch.bfloat16, context_parallel_size=2, cp_comm_type=kind, kv_channels=DIM,
        hierarchical_context_parallel_sizes=None, num_attention_heads=HEADS, num_query_groups=GROUPS,
        tensor_model_parallel_size=1, agoq_context_grad_bits=bits,
        agoq=SimpleNamespace(rule=lambda site, number: by_site[site]),
    )  # fmt: skip
    return context_traffic(config, 1, TOKENS)


def test_counted_bytes_are_the_planned_ones(tmp_path):
    sizes = f"--tokens {TOKENS} --heads {HEADS} --groups {GROUPS} --head-dim {DIM} --hidden 32 --repeats 1"
    args = bench.parse_arguments([*sizes.split(), "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    spawn_ranks(2, bench.spawned, args, str(tmp_path))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["kind"], row["way"]) for row in rows} == {
        (kind, way) for kind in bench.KINDS for way in bench.WAYS if kind != "a2a" or way in ("BF16", "codes")
    }
    common = 4 * (HEADS + 2 * GROUPS) * DIM  # vectors that are averaged, which the planner leaves out
    for row in rows:
        forward, backward = planned(row["kind"], row["way"])
        if row["kind"] != "a2a" and row["way"] != "BF16":
            forward += common
        assert row["forward bytes"] == pytest.approx(forward, rel=1e-6)
        assert row["backward bytes"] == pytest.approx(backward, rel=1e-6)
    assert "p2p, codes, 8 bits" in bench.table(rows)
    sent = {row["way"]: row["backward bytes"] for row in rows if row["kind"] == "p2p"}
    assert sent["codes, 8 bits"] / sent["BF16"] < 0.55

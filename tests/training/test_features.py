"""Features of Megatron's that reach into our layers or loss, each compared with stock Megatron in FP32."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from launch import TINY

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")
STEPS = 6
GROWING = 1 + 1 + 2 + 2 + 4 + 4
"""Samples of so many steps of the growing batch."""
MODEL = [flag for flag in TINY if flag != "--bf16"]

# name: Megatron's flags
FEATURES = {
    "no positions": "--position-embedding-type none",
    "half of the head rotated, the first layer's alone": "--rotary-percent 0.5 --no-rope-freq [0,1]",
    "neighbours rotated": "--rotary-interleaved",
    "scaled rotation": "--use-rope-scaling --rope-scaling-factor 4 --rotary-base 500000",
    "YaRN": """--position-embedding-type yarn --rotary-scaling-factor 40 --yarn-beta-fast 4
        --yarn-beta-slow 0.5 --yarn-original-max-position-embeddings 24 --mscale 1.5 --mscale-all-dim 0.25
        --rotary-base 100 --no-yarn-correction-range-round-to-int""",
    "fused cross entropy": "--cross-entropy-loss-fusion",
    "growing batch": "--step-batch-size-schedule '0:1 128:2 384:4'",
}


@pytest.mark.supports(
    "no positions", "part of the head rotated", "interleaved rotation", "LLaMA-3.1's scaled rotary positions",
    "YaRN", "fused cross entropy", "growing batch size",
)  # fmt: skip
@pytest.mark.parametrize("feature", FEATURES)
def test_trains_as_stock(launcher, tmp_path, seed, feature):
    """Equal losses with 'off', near ones with 'agoq', and not those of the model without the feature."""
    report = tmp_path / "stock.json"
    flags = [*MODEL, "--train-iters", STEPS, "--seed", seed % 10000 + 1]
    with_it = [*flags, *shlex.split(FEATURES[feature])]
    if feature == "growing batch":  # which takes the place of a constant one
        at = with_it.index("--global-batch-size")
        del with_it[at : at + 2]
    by_stock = list(with_it)
    if feature == "growing batch":  # by iterations Megatron's own schedules end too early
        at = by_stock.index("--train-iters")
        by_stock[at : at + 2] = ["--train-samples", GROWING]
    stock = launcher.run(*by_stock, tiny=False, entry=STOCK, env={"STOCK_REPORT": str(report)})
    assert stock.ok, stock.log[-4000:]
    reference = {int(i): values for i, values in json.loads(report.read_text()).items()}

    off = launcher.run(*with_it, "--agoq-activations", "off", tiny=False)
    assert off.ok, off.log[-4000:]
    assert off.losses().keys() == set(reference)
    for iteration, (loss, norm) in reference.items():
        assert off.losses()[iteration] == pytest.approx(loss, rel=1e-5), iteration
        assert off.grad_norms()[iteration] == pytest.approx(norm, rel=1e-4), iteration

    agoq = launcher.run(*with_it, tiny=False)
    assert agoq.ok, agoq.log[-4000:]
    for iteration, loss in agoq.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=2e-3), iteration
    plain = launcher.run(*flags, "--agoq-activations", "off", tiny=False)
    assert plain.ok
    if feature == "growing batch":
        assert off.report["tokens"] == GROWING * 64
    if feature != "fused cross entropy":  # the same function of the same numbers
        assert plain.losses() != off.losses()

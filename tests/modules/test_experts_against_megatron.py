"""With ``off`` in FP32 our mixtures of experts are Megatron's local ones: the start, gradients, 20 steps."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compare_experts.py"
MODELS = (
    "mixtral", "all-gather, FP32 router", "deepseek", "gated shared experts, GELU", "dropped tokens",
    "jitter", "activation again", "padded to capacity", "one expert has all", "sinkhorn",
    "latents", "latents with q-LoRA, sigmoid", "gpt-oss", "squared ReLU, zero-centred norms",
)  # fmt: skip


@pytest.fixture(scope="module")
def results():
    seed = random.randrange(1, 2**31)
    print("seed", seed)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(seed), "20", *MODELS], capture_output=True, text=True, timeout=280
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.supports("mixture of experts")
@pytest.mark.parametrize("model", MODELS)
def test_equal(results, model):
    """Parameters as they are made; gradients of the first step; losses (with --moe-input-jitter-eps too); and
    all modules with parameters are called (Megatron waits there for the gather of their weights,
    --overlap-param-gather)."""
    result = results[model]
    errors = result["gradient_errors"]
    worst = max(errors, key=errors.get)
    print(f"{model}: gradients {errors[worst]:.2e} ({worst}), losses {result['loss_error']:.2e}")
    assert result["same_start"]
    assert errors[worst] < 1e-5
    assert result["loss_error"] < 1e-4
    assert len(set(result["losses"])) == 20  # it trained: no two steps gave the same loss
    assert result["silent"] == []
    real, planned = result["parameters"]
    assert real == planned

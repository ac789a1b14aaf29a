"""With ``off`` in FP32 our layers are Megatron's local layers: gradients and 20 steps of training."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compare_with_megatron.py"


ARCHITECTURES = (
    "llama", "gpt", "qwen3", "gpt, norms of heads", "llama, norms without weights", "squared ReLU", "GEGLU",
    "gpt-oss", "zero-centred LayerNorm", "zero-centred RMSNorm", "llama, windows", "llama, sinks",
    "gpt, off by one in windows", "llama, YaRN", "qwen3, YaRN", "llama, two tokens more",
    "gpt, a token more, no positions", "qwen3, gates", "gpt, gates, sinks in windows, a token more",
    "deepseek", "deepseek, q-LoRA, yarn", "latents, GPT", "latents without norms, q-LoRA",
)  # fmt: skip


@pytest.fixture(scope="module")
def results():
    seed = random.randrange(1, 2**31)
    print("seed", seed)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(seed), *ARCHITECTURES], capture_output=True, text=True, timeout=280
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.supports("norms on queries and keys", "squared ReLU", "quick GEGLU")
@pytest.mark.supports("clamped and offset gates", "zero-centred norms", "YaRN", "multi-token prediction")
@pytest.mark.supports("windows in some of the layers", "attention sinks")
@pytest.mark.supports("multi-latent attention", "gated attention")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_gradients_equal(results, architecture):
    errors = results[architecture]["gradient_errors"]
    worst = max(errors, key=errors.get)
    print(f"{architecture}: worst gradient error {errors[worst]:.2e} ({worst})")
    assert errors[worst] < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twenty_losses_equal(results, architecture):
    result = results[architecture]
    print(f"{architecture}: worst loss error of 20 steps {result['loss_error']:.2e}")
    assert result["loss_error"] < 1e-4
    assert len(set(result["losses"])) == len(result["losses"]) >= 20  # it trained: no two were alike


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_with_parameters_are_called(results, architecture):
    """Megatron waits for the gather of a module's weights (--overlap-param-gather) when it is called."""
    assert results[architecture]["silent"] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planner_counts_the_parameters(results, architecture):
    real, planned = results[architecture]["parameters"]
    assert real == planned


def test_sinks_count_in_the_norm_of_gradients(results):
    """Megatron takes what is not marked for the same on all tensor-parallel ranks, and counts it on one."""
    assert results["llama, sinks"]["sinks"] == [True] * 3

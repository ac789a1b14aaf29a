"""``--agoq-grad-bits 16`` is Megatron's ``--grad-reduce-in-bf16``."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.supports("gradients reduced in BF16")
def test_is_megatrons_bf16(launcher):
    overlap = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    runs = [
        launcher.run(*overlap, *flags, "--train-iters", 6, ranks=2)
        for flags in (["--agoq-grad-bits", "16"], ["--grad-reduce-in-bf16"], [])
    ]
    assert all(run.ok for run in runs), runs[0].log[-4000:]
    ours, megatrons, fp32 = ((run.losses(), run.grad_norms()) for run in runs)
    assert ours == megatrons and len(set(ours[0].values())) == 6
    assert ours != fp32  # else equality says nothing

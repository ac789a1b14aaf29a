"""Batches without a token that counts: they add nothing to loss and gradients, wherever they come."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from launch import ROOT, covering

EIGHT = "--agoq-grad-bits 8 --agoq-optimizer-bits 8 --use-distributed-optimizer".split()
RUNS = {"a mean of micro-batches": [], "a mean of tokens": ["--calculate-per-token-loss", *EIGHT]}


@pytest.mark.parametrize("name", covering(RUNS, {"a mean of tokens"}))
def test_masked_batches(launcher, tmp_path, name):
    """See ``masked_entry.py`` for which."""
    path = tmp_path / "report.json"
    run = launcher.run(
        *"--train-iters 6 --eval-interval 3 --eval-iters 1 --lr-warmup-iters 0".split(), *RUNS[name],
        "--agoq-report", path, ranks=2, entry=ROOT / "tests" / "training" / "masked_entry.py",
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    report = json.loads(path.read_text())
    losses = [entry["lm loss"] for entry in report["train"]]
    norms = [entry["grad norm"] for entry in report["train"]]
    assert losses[0] == losses[2] == norms[0] == norms[2] == 0
    assert all(4 < losses[i] < 6 and 0.1 < norms[i] < 10 for i in (1, 3, 4, 5)), (losses, norms)
    assert [4 < entry["lm loss"] < 6 for entry in report["validation"]] == [False, True, True]
    assert report["validation"][0]["lm loss"] == 0
    # Megatron's own lines, too.
    assert len(run.printed()) == 6
    assert not re.search(r"(lm loss|lm loss value|PPL|grad norm): nan|nan iterations: +[1-9]", run.log, re.I)


def test_what_is_logged(rng, monkeypatch):
    """Against sums in FP64, over micro-batches and ranks with and without tokens, as Megatron adds them."""
    from agoq_megatron.entries import training

    args = SimpleNamespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=False)
    machine = SimpleNamespace(validate_result=lambda result, rejection_func, **_: None)
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "get_rerun_state_machine", lambda: machine)
    for masked in (0.0, 0.3, 1.0):
        mask = (torch.rand(5, 3, 7, generator=rng) >= masked).long()
        mask[2] = 0
        output = (9 * torch.rand(5, 3, 7, generator=rng)).requires_grad_()
        found = [training.loss_func(m, out) for m, out in zip(mask, output, strict=True)]
        total, count = torch.vstack([logged[training.LOSS].view(-1) for *_, logged in found]).sum(0)
        exact = (output.double() * mask).sum() / mask.sum().clamp(min=1)
        torch.testing.assert_close((total / count).double(), exact, rtol=1e-6, atol=0)
        assert [tokens.item() for _, tokens, _ in found] == mask.flatten(1).sum(1).tolist()
        sum(loss for loss, *_ in found).backward()
        assert torch.equal(output.grad, mask.float())


def test_the_loss_that_a_second_run_is_compared_with_stays_whole(rng, monkeypatch):
    """Megatron's rerun machine keeps the very tensor, and its schedules divide the loss in place."""
    from agoq_megatron.entries import training

    kept = []
    args = SimpleNamespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    machine = SimpleNamespace(
        validate_result=lambda result, **_: kept.append(result), is_unexpectedly_large=max
    )
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "get_rerun_state_machine", lambda: machine)
    output = torch.rand(3, 7, generator=rng, requires_grad=True)
    loss, tokens, _ = training.loss_func(torch.ones(3, 7), output)
    exact = loss.item()
    loss /= tokens
    assert [it.item() for it in kept] == [exact] * 3

"""`auto` within a GPU's memory: what the planner needs for the chosen widths, against the budget.

Run as a script, this file plans; what makes Megatron run on a CPU changes a process for good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agoq_megatron.sizes import parse_size

LONG = "--seq-length 32768 --micro-batch-size 1 --mlp-chunks-for-training 4 --agoq-loss-chunks 8"
LONGER = (
    "--seq-length 65536 --max-position-embeddings 65536 --micro-batch-size 1 --agoq-loss-chunks 8 "
    "--mlp-chunks-for-training 4 --agoq-grad-bits 8 --agoq-optimizer-bits 8"
)
FITS = [
    *((LONG, memory) for memory in ("44GiB", "45GiB", "46GiB", "48GiB", "54GiB")),
    *((LONGER, memory) for memory in ("32GiB", "44GiB")),
    ("", "44GiB"),
    ("", "48GiB"),  # FC1's output in 16 bits, the norm's input in codes: an MLP's forward is the worst moment
]
"""Eight layers of LLaMA-3-8B: (flags, memory)."""
DOES_NOT_FIT = LONG, "42GiB"


def plan_all() -> dict:
    """In the script: of each case needed and saved bytes, with and without rounds; and the refusal."""
    from agoq_megatron import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from agoq_megatron import plan
    from agoq_megatron.planning import auto
    from agoq_megatron.planning.knapsack import Knapsack
    from agoq_megatron.planning.shipped import sensitivities_of
    from agoq_megatron.refusals import UsageError

    sys.path.append(str(Path(__file__).parent))
    from test_plan import measured_flags

    def parse(flags: str, memory: str):
        flags = f"{flags} --agoq-activations auto --agoq-gpu-memory {memory}"
        return plan.parse(["--gpus", "1", *measured_flags("llama3-8b", flags)])[1]

    def solved(flags: str, memory: str) -> list[float]:
        args = parse(flags, memory)
        planner = plan.Planner(args)
        (row,) = planner.footprints(**planner.kinds()["these flags"])
        return [row.needed, row.parts["saved activations"]]

    found = {"rounds": [solved(*case) for case in FITS]}
    rounds, auto.ROUNDS = auto.ROUNDS, 0
    found["bound"] = [solved(*case) for case in FITS]
    auto.ROUNDS = rounds
    try:
        parse(*DOES_NOT_FIT)
    except UsageError as problem:
        found["refusal"] = str(problem)
    # The fewest bits, as any policy: what they need of the card.
    args = parse(DOES_NOT_FIT[0], "60GiB")
    knapsack = Knapsack(args, sensitivities_of(args))
    (row,) = auto.footprints_of(args, knapsack, knapsack.narrowest())
    return found | {"narrowest": row.needed}


@pytest.fixture(scope="module")
def planned(tmp_path_factory, launcher) -> dict:
    out = tmp_path_factory.mktemp("budget") / "budget.json"
    launcher.script(__file__, out, timeout=200)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", range(len(FITS)), ids=lambda i: f"{FITS[i][1]} {FITS[i][0][:18]}".strip())
def test_within_the_gpus_memory(planned, case):
    """With the moments of the widths that were chosen, and using the memory; the bound beforehand is safe
    too, and never leaves more to the widths."""
    (needed, saved), (bound, less) = planned["rounds"][case], planned["bound"][case]
    budget = parse_size(FITS[case][1])
    print(f"needed {needed / 2**30:.3f}GiB, with the bound {bound / 2**30:.3f}, of {FITS[case][1]}")
    assert 0.997 * budget < needed <= budget
    assert bound <= budget and less <= saved


def test_missing_bytes_are_those_of_the_fewest_bits(planned):
    """With that much more memory, and the part of it that fragmentation takes, they fit."""
    over = planned["narrowest"] - parse_size(DOES_NOT_FIT[1])
    words = planned["refusal"]
    assert "even with the fewest bits everywhere the budget is exceeded on stage 0" in words
    missing = int(words[: words.index(" bytes)")].rsplit("(", 1)[1])
    assert over > 0 and missing * 1.03 == pytest.approx(over, abs=4)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(plan_all()))

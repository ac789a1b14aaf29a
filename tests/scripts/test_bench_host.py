"""The host's time of operators is measured where there is no GPU, too."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def test_ways_to_call_an_operator():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench_host.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    taken = dict(re.findall(r"^operator: (.+?) +([\d.]+) us$", done.stdout, re.M))
    assert len(taken) == 4 and float(taken["a function"]) < float(taken["torch.library.custom_op"])

"""The batch scripts: what they refuse, what they start (with a stand-in for srun), and that presets fit.

scripts/slurm/try_one_machine.sh tries them on a real SLURM; it takes a quarter of an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "scripts" / "slurm"
FLAGS = """
# A model  # and a remark
--num-layers 2   --data-path 'a path' # comment
--name=a#b --lr 1e-3
"""


@pytest.fixture
def cluster(tmp_path):
    """SLURM's commands as scripts that note how they are called."""
    commands = {
        "scontrol": 'case "$1" in show) echo node1; echo node2;; *) echo "$@" >> $CALLS/scontrol;; esac',
        "scancel": 'echo "$@" >> $CALLS/scancel; kill -USR1 $(cat $CALLS/task)',
        # Options end where the task's own command begins.
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "squeue": "echo ${STATE:-RUNNING}",
        "sleep": "exit 0",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    return tmp_path


def python(cluster: Path, text: str) -> None:
    """What a rank runs instead of Python."""
    path = cluster / "venv" / "bin" / "python"
    path.write_text(f"#!{sys.executable}\nimport os, sys, time, signal\n{text}\n")
    path.chmod(0o755)


def batch(cluster: Path, script: str, *words: object, **more: str) -> subprocess.Popen:
    (cluster / "tiny.flags").write_text(FLAGS)
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "CALLS": str(cluster), "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
        "AGOQ_VENV": str(cluster / "venv"), **more,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(SLURM / script), *map(str, words)], env=environment, cwd=cluster, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


NOTE = "open(os.environ['CALLS'] + '/argv', 'w').write(chr(10).join(sys.argv[1:]))\n"


def test_a_job_that_ends_by_itself(cluster):
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"
    python(cluster, NOTE + f"print(*(os.environ[name] for name in {names}))")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "ck pt", "--lr", "2e-3")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    assert out.split() == ["3", "1", "4", "node1"]
    script, *flags = (cluster / "argv").read_text().split("\n")
    assert script == str(ROOT / "pretrain_gpt_agoq.py")
    assert flags == [
        "--num-layers", "2", "--data-path", "a path", "--name=a#b", "--lr", "1e-3", "--save", "ck pt",
        "--lr", "2e-3", "--load", "ck pt", "--exit-signal-handler", "--exit-signal", "SIGUSR1",
    ]  # fmt: skip
    assert not (cluster / "scontrol").exists() and "ended with status 0" in err


@pytest.mark.parametrize("flags, given, queues", [
    ([], None, "8"), (["--tensor-model-parallel-size", "2"], None, "1"),
    (["--context-parallel-size=2"], None, "1"),
    (["--tensor-model-parallel-size", "2"], "16", "16"),
])  # fmt: skip
def test_hardware_queues(cluster, monkeypatch, flags, given, queues):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    more = {} if given is None else {"CUDA_DEVICE_MAX_CONNECTIONS": given}
    python(cluster, "print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save=x", *flags, **more)
    out, err = job.communicate(timeout=30)
    assert out.split() == [queues], err


def test_a_job_that_fails_is_not_requeued(cluster):
    python(cluster, "sys.exit(3)")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save=x", "--load=y")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 3 and not (cluster / "scontrol").exists(), err


SAVE = """
os.makedirs("x", exist_ok=True)
open("x/latest_checkpointed_iteration.txt", "w").write("40")
sys.exit(3)
"""


@pytest.mark.parametrize(
    "started_from, state, requeued",
    [("", "RUNNING", True), ("20", "RUNNING", True), ("40", "RUNNING", False), ("20", "COMPLETING", False)],
)
def test_a_job_that_fails_after_a_save(cluster, started_from, state, requeued):
    """It goes on, but for one that comes to the same end again, and one that was cancelled."""
    if started_from:
        (cluster / "x").mkdir()
        (cluster / "x" / "latest_checkpointed_iteration.txt").write_text(started_from)
    python(cluster, SAVE)
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x", STATE=state)
    _, err = job.communicate(timeout=30)
    assert (cluster / "scontrol").exists() == requeued, err
    if requeued:
        assert (cluster / "scontrol").read_text().split() == ["requeue", "17"]
        assert "ended with status 3; iteration 40 was saved since the start: requeued" in err
    else:
        assert job.returncode == 3 and "requeued" not in err


HANDLER = "left = []\nsignal.signal(signal.SIGUSR1, lambda *_: left.append(1))\n"
TELL = """
open(os.environ["CALLS"] + "/task.new", "w").write(str(os.getpid()))
os.rename(os.environ["CALLS"] + "/task.new", os.environ["CALLS"] + "/task")
"""


def signalled(cluster: Path, job: subprocess.Popen) -> str:
    """What a job says that gets SLURM's signal once its rank runs."""
    for _ in range(200):
        if (cluster / "task").exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    return job.communicate(timeout=30)[1]


@pytest.mark.parametrize(
    "name, more",
    [
        ("17", {}),
        # The last task of an array has the array's own id: with it all tasks would be meant.
        ("17_3", {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}),
    ],
)
def test_a_job_near_its_limit_saves_and_is_requeued(cluster, name, more):
    python(cluster, HANDLER + TELL + """
while not left: time.sleep(0.05)
time.sleep(0.5)
os.makedirs("x")
open("x/latest_checkpointed_iteration.txt", "w").write("40")
""")  # fmt: skip
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x", **more)
    err = signalled(cluster, job)
    assert (cluster / "x" / "latest_checkpointed_iteration.txt").exists(), err  # the script waited for it
    assert (cluster / "scancel").read_text().split() == ["--signal=USR1", name]
    assert (cluster / "scontrol").read_text().split() == ["requeue", name]
    assert "cut with status 0; requeued" in err


@pytest.mark.parametrize("earlier", [False, True])
def test_a_job_near_its_limit_that_is_still_starting(cluster, earlier):
    """It goes on once where it has ever come to save; else it would start for ever."""
    if earlier:
        (cluster / "x").mkdir()
        (cluster / "x" / "latest_checkpointed_iteration.txt").write_text("40")
    python(cluster, TELL + "time.sleep(30)")  # dies of the signal
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x")
    err = signalled(cluster, job)
    assert (cluster / "scontrol").exists() == earlier, err
    if earlier:
        assert "cut with status 138; requeued" in err
        for name in ("scontrol", "task"):
            (cluster / name).unlink()
        job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x")
        err = signalled(cluster, job)
        assert not (cluster / "scontrol").exists(), err
    assert job.returncode == 2 and "cut with status 138 before anything was saved: --time" in err
    assert not list(cluster.glob("x/.cut*"))  # who starts it again starts anew


def test_a_signal_before_the_ranks_are_started(cluster):
    """With a time limit below the signal's lead it comes at once, and would after each requeue."""
    python(cluster, NOTE)
    show = 'case "$1" in show) kill -USR1 $PPID; echo node1;; *) echo "$@" >> $CALLS/scontrol;; esac'
    (cluster / "bin" / "scontrol").write_text(f"#!/bin/bash\n{show}\n")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2 and "--time must be longer than --signal's lead" in err
    assert not (cluster / "argv").exists() and not (cluster / "scontrol").exists()


def test_each_rank_gets_its_cores(cluster):
    (cluster / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > $CALLS/srun\n')
    python(cluster, "")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "x", SLURM_CPUS_PER_TASK="8")
    assert job.wait(30) == 0
    assert "--cpus-per-task=8" in (cluster / "srun").read_text().split("\n")


def test_unbalanced_quotes(cluster):
    """Not a run with the flags before them."""
    python(cluster, NOTE)
    (cluster / "bad.flags").write_text("--num-layers 2 --name 'a\n--lr 1\n")
    job = batch(cluster, "train.sbatch", "bad.flags", "--save", "x")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2 and "cannot be split into words" in err
    (cluster / "table").write_text("one --name 'a\n")
    job = batch(cluster, "ablations.sbatch", "table", "tiny.flags", "--save", "x", SLURM_ARRAY_TASK_ID="1")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2 and "cannot be split into words" in err


@pytest.mark.parametrize(
    "words, more, said",
    [
        (["tiny.flags"], {}, "give --save DIR"),
        (["missing.flags", "--save", "x"], {}, "must be a file of flags"),
        ([], {}, "must be a file of flags"),
        (["tiny.flags", "--save", "x"], {"AGOQ_ROOT": "/nowhere"}, "is not this repository"),
        (["tiny.flags", "--save", "x"], {"AGOQ_VENV": "/nowhere"}, "run scripts/setup.sh first"),
        (["tiny.flags", "--save", "x"], {"SLURM_JOB_ID": ""}, "this is a batch script"),
    ],
)
def test_refusals(cluster, words, more, said):
    job = batch(cluster, "train.sbatch", *words, **more)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2 and said in err


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_containers(cluster, runtime):
    (cluster / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > $CALLS/srun\n')
    more = {"AGOQ_CONTAINER": "image.sif", "AGOQ_RUNTIME": runtime, "AGOQ_MOUNTS": "/data,/models"}
    (cluster / "elsewhere").mkdir()
    (cluster / "link").symlink_to("elsewhere")
    job = batch(cluster, "train.sbatch", "tiny.flags", "--save", "link", **more)
    assert job.wait(30) == 0
    words = (cluster / "srun").read_text().split("\n")
    # What is saved outlives the container, under the name that --save gives; relative paths stay as they are.
    mounts = list(map(str, (ROOT, cluster, cluster / "link", "/data", "/models")))
    if runtime == "pyxis":
        assert "--container-image=image.sif" in words
        pairs = ",".join(f"{path}:{path}" for path in mounts)
        assert f"--container-mounts={pairs}" in words and f"--container-workdir={cluster}" in words
    else:
        at = words.index("apptainer")
        options = ["--nv", "--bind", ",".join(mounts), "--pwd", str(cluster), "image.sif"]
        assert words[at : at + 8] == ["apptainer", "exec", *options]
    assert words[words.index("rank") + 1 :][:2] == ["python3", str(ROOT / "pretrain_gpt_agoq.py")]


def test_ablations(cluster):
    python(cluster, NOTE)
    (cluster / "table").write_text("# NAME FLAGS\none --lr 1\n\ntwo --lr 2 --opt 'b c' # the second\n")
    words = ["table", "tiny.flags", "--save", "all", "--lr", "9"]
    job = batch(cluster, "ablations.sbatch", *words, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="17")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    flags = (cluster / "argv").read_text().split("\n")
    assert flags[-17:-4] == [
        "--lr", "9", "--save", "all/two", "--tensorboard-dir", "all/two/tensorboard",
        "--wandb-exp-name", "two", "--lr", "2", "--opt", "b c", "--load",
    ]  # fmt: skip
    refused = ("3", words, "no line 3"), ("1", words[:2], "give --save"), ("1", words[:1], "TABLE")
    for task, given, said in refused:
        job = batch(cluster, "ablations.sbatch", *given, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_JOB_ID="17")
        _, err = job.communicate(timeout=30)
        assert job.returncode == 2 and said in err


@pytest.mark.parametrize("preset, gpus", [("llama3_8b", 8), ("llama3_70b", 64)])
def test_presets_fit(launcher, preset, gpus):
    text = re.sub(r"(^|\s)#.*", "", (SLURM / f"{preset}.flags").read_text(), flags=re.MULTILINE)
    flags = f"--gpus {gpus} --gpu-memory 80GiB {text} --mock-data --tokenizer-type NullTokenizer"
    run = launcher.plan(*flags.split(), "--vocab-size", 128000)
    assert run.ok, run.log[-2000:]
    mine = re.search(r"^ +these flags +([\d.]+) .*? yes ", run.log, re.MULTILINE)
    assert mine and float(mine[1]) < 75


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(path) for path in SLURM.iterdir() if path.suffix in (".sbatch", ".sh"))
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout

#!/usr/bin/env python3
"""Measure what a policy costs in loss, by a protocol that can tell the cost from noise.

    convergence.py base     --out DIR       train one model with `off`, and keep its checkpoint
    convergence.py continue --out DIR       continue it with each variant
    convergence.py pretrained --hf MODEL --out DIR      continue a pretrained model with each variant
    convergence.py scratch  --out DIR       train each variant from several seeds
    convergence.py report   --out DIR       tables on stdout; report.json and figures into DIR

Two short runs of one model from two seeds differ by percents, so a single run proves nothing about
tenths of a percent. Hence two kinds of comparison, all of them real trainings in fresh processes:

*Continued runs.* All variants start from the same checkpoint, Adam's state included, well past the
steep phase. They go on at the small constant learning rate at which the base model's schedule ended,
and read the same batches of text, new to the model, in the same order. Their losses are compared
batch by batch. `off` alone also continues in other data orders, which shows how much runs differ
that have no reason to.

*A pretrained model* (``pretrained``), in a format of Hugging Face's that is converted, is continued in the
same way, with its own tokenizer, at a constant learning rate, and with Adam's states made anew. Its runs are
forked from one process that imports Megatron once, each onto a GPU of its own, and no checkpoints are
written: a run that is stopped starts again. Validation losses are compared micro-batch by micro-batch, of the
same text for all.

*From scratch.* The same seeds for every variant: a seed sets both initial weights and data order.

A variant is NAME or NAME=FLAGS. NAME is a built-in policy (off, agoq, uniform4), a file in
scripts/studies/convergence_policies/, `agoq_stochastic`, or `off_repeat`: `off` with half the micro-batch,
the same sums added up in another order. That one shows what rounding alone makes of a run, and is the
yardstick for every difference. FLAGS are flags of pretrain_gpt_agoq.py, for instance
'mine=--agoq-activations mine.yaml'. With --ranks and --micro-batch the gradients of several ranks and of
many micro-batches are added up, as a study of gradient formats needs it:

    convergence.py continue --out DIR --ranks 2 --micro-batch 4 --variants off \\
        'int8=--agoq-activations off --agoq-grad-bits 8'

Every run leaves a JSON file in DIR/runs when it is done and is skipped the next time, so that the
whole can be done in pieces. Only runs from one and the same base are compared: a base that is
trained anew makes new continued runs necessary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

from convergence_comparison import NotComparable, analyse
from convergence_corpus import corpus_parts
from convergence_pretrained import PHASE, VALID_FRACTION, train_pretrained
from convergence_runs import finished, perform_all
from convergence_study import (
    BASE,
    BUILT_IN,
    PRESETS,
    ConvergenceError,
    Run,
    Study,
    parse_variant,
    replace_file,
)
from convergence_tables import markdown, plain
from quickstart import QuickstartError


def train(args: argparse.Namespace) -> None:
    """The subcommands base, continue and scratch."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = int(args.tokens or PRESETS[args.preset]["tokens"][args.phase])
    study = Study(args.out.absolute(), args.preset, tokens, corpus_parts(args))
    path = study.out / "runs" / f"{BASE.name}.json"
    if args.phase == "base":
        if not finished(BASE, study) or not study.checkpoint.is_dir():
            path.unlink(missing_ok=True)  # of no use without its checkpoint
            shutil.rmtree(study.checkpoint, ignore_errors=True)
        return perform_all([BASE], study, 1, math.inf)
    study = dataclasses.replace(study, ranks=args.ranks, micro_batch=args.micro_batch)
    per_step = args.ranks * (args.micro_batch or PRESETS[args.preset]["micro_batch"] // args.ranks)
    if per_step < 1 or PRESETS[args.preset]["batch"] % per_step:
        raise ConvergenceError(
            f"--ranks {args.ranks} --micro-batch {args.micro_batch}: their product must divide the "
            f"{PRESETS[args.preset]['batch']} sequences of a step."
        )
    if args.phase == "continue":
        if not path.exists() or not study.checkpoint.is_dir():
            raise ConvergenceError(f"no base model in {study.out}: run the subcommand base first.")
        study = dataclasses.replace(study, base=json.loads(path.read_text()))
        have, want = study.corpus["tokens"]["continue"], study.steps * study.tokens_per_step
        if want > have:
            raise ConvergenceError(
                f"--tokens {tokens}: the corpus has {have:,} tokens that are new to the base model; "
                "a continued run reads none twice."
            )
    variants = variants_of(args, args.preset)
    runs = [Run(args.phase, name, s, more) for s in args.seeds for name, more in variants.items()]
    if args.phase == "continue":
        more = parse_variant("off", args.preset)[1]
        runs += [Run("continue", "off", s, more) for s in args.off_seeds if s not in args.seeds]
    perform_all(runs, study, args.parallel, args.stop_after)


def train_from_hf(args: argparse.Namespace) -> None:
    """The subcommand pretrained, with the report where all runs are done."""
    variants = variants_of(args, None)
    runs = [Run(PHASE, name, s, more) for s in args.seeds for name, more in variants.items()]
    runs += [Run(PHASE, "off", s, variants["off"]) for s in args.off_seeds if s not in args.seeds]
    left = train_pretrained(args, runs)
    if left:
        print(
            f"{len(left)} runs are left for the next time (--stop-after): {', '.join(r.name for r in left)}"
        )
    else:
        report(args)


def variants_of(args: argparse.Namespace, preset: str | None) -> dict[str, tuple[str, ...]]:
    """Flags by name of --variants, `off` always among them for a pretrained model.

    Raises:
        ConvergenceError: a name that is not known, or twice.
    """
    variants = dict(parse_variant(text, preset) for text in args.variants)
    if len(variants) < len(args.variants):
        raise ConvergenceError(f"--variants {' '.join(args.variants)}: a name occurs twice.")
    return variants if preset else {"off": parse_variant("off", preset)[1]} | variants


def report(args: argparse.Namespace) -> None:
    """The subcommand report."""
    from convergence_figures import draw  # matplotlib: slow to import, and not needed before

    runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("runs/*.json"))]
    for path in getattr(args, "add", ()):
        runs += json.loads(path.read_text())["runs"]
    runs = list({run["id"]: run for run in runs}.values())
    if not runs:
        raise ConvergenceError(f"no finished runs in {args.out}.")
    try:
        found = analyse(runs)
    except NotComparable as error:
        raise ConvergenceError(str(error)) from error
    folder = getattr(args, "to", None) or args.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"date": time.strftime("%Y-%m-%d"), **plain(found), "runs": runs}
    replace_file(folder / "report.json", content)
    draw(runs, found, folder)
    print(markdown(runs, found))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase in ("base", "continue", "scratch"):
        add = phases.add_parser(phase).add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
        add("--preset", choices=PRESETS, default="gpu", help="size of model and runs")
        add("--tokens", type=float, help="trained on in a run (default: the preset's)")
        add("--corpus", type=Path, metavar="DIR", help="where prepare_corpus.py left one")
        add(
            "--input",
            type=Path,
            nargs="+",
            metavar="DIR",
            default=library_folders(),
            help="folders of text to make a corpus of (default: this Python's library and packages)",
        )
        if phase == "base":
            continue
        add("--variants", nargs="+", default=list(BUILT_IN), metavar="NAME[=FLAGS]")
        continued = phase == "continue"
        default = [1] if continued else [1, 2, 3]
        what = "data orders" if continued else "seeds of weights and data order"
        add("--seeds", type=int, nargs="+", default=default, help=f"{what}, for every variant")
        if continued:
            add("--off-seeds", type=int, nargs="*", default=[2, 3, 4], help="further ones, for off")
        add("--ranks", type=int, default=1, help="data-parallel ranks of a run (default: 1)")
        add("--micro-batch", type=int, metavar="N", help="sequences of a micro-batch on a rank")
        add("--parallel", type=int, default=1, metavar="N", help="runs at a time on the one device")
        add(
            "--stop-after",
            type=float,
            default=math.inf,
            metavar="SECONDS",
            help="start no further run after that time",
        )
    add_pretrained(phases.add_parser(PHASE).add_argument)
    add = phases.add_parser("report").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="as given to the other subcommands")
    add("--add", type=Path, nargs="+", default=[], metavar="FILE", help="runs of other report.json")
    add("--to", type=Path, metavar="DIR", help="for report.json and figures (default: DIR/report)")
    return parser.parse_args(argv)


def add_pretrained(add: Callable) -> None:
    """The flags of the subcommand pretrained."""
    add("--hf", type=Path, required=True, metavar="DIR", help="the model, in Hugging Face's format")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    add("--variants", nargs="+", default=["off", "agoq"], metavar="NAME[=FLAGS]", help="off is added")
    add("--seeds", type=int, nargs="+", default=[1], help="data orders, for every variant")
    add("--off-seeds", type=int, nargs="*", default=[2], help="further ones, for off")
    add("--gpus", type=int, default=1, metavar="N", help="runs at a time, each on one (0: on the CPU)")
    add("--tokens", type=float, default=30e6, help="trained on in a run (default: 30e6)")
    add("--seq-length", type=int, default=2048, help="tokens a sequence (default: 2048)")
    add("--batch", type=int, default=32, help="sequences a step (default: 32)")
    add("--micro-batch", type=int, default=16, help="sequences of a micro-batch (default: 16)")
    add("--lr", type=float, default=1e-5, help="constant learning rate (default: 1e-5)")
    add("--warmup", type=int, default=10, metavar="STEPS", help="that lead to it (default: 10)")
    add(
        "--valid-fraction",
        type=float,
        default=VALID_FRACTION,
        help="of the documents, held out (default: .02)",
    )
    add(
        "--input", type=Path, nargs="+", metavar="DIR", default=library_folders(),
        help="folders of text (default: this Python's library and packages, PYTHONPATH's too)",
    )  # fmt: skip
    add(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS",
        help="start no further run after that time",
    )  # fmt: skip


def library_folders() -> list[Path]:
    """Folders of this Python's library and packages, wherever they are."""
    paths = [sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")]
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return [Path(p) for p in dict.fromkeys(paths) if Path(p).is_dir()]


def main() -> None:
    args = parse_arguments()
    try:
        {"report": report, PHASE: train_from_hf}.get(args.phase, train)(args)
    except (ConvergenceError, QuickstartError) as error:
        sys.exit(f"convergence: error: {error}")
    except KeyboardInterrupt:
        sys.exit("convergence: interrupted")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()

"""``--agoq-activations auto``: the budget of each stage, the solver's widths, and what is said about them.

Every rank solves for all stages, from the flags and the file of sensitivities alone: no clock, no random
number and no message is in it, and HiGHS gives one answer to one problem. That the ranks do agree is checked
before the model is built (:func:`check_same_widths`), since nothing promises that all nodes have the same
file and the same version of SciPy.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

from agoq_megatron.model.memory import Plan, ranges
from agoq_megatron.modules.sites import FC1_OUTPUT
from agoq_megatron.planning.footprint import FRAGMENTATION, OUTSIDE, Footprint, footprints
from agoq_megatron.planning.knapsack import Knapsack, RulesPolicy, stage_of, with_policy
from agoq_megatron.planning.parameters import padded_vocabulary
from agoq_megatron.planning.shipped import FOLDER, sensitivities_of
from agoq_megatron.planning.solver import Choice, DoesNotFit
from agoq_megatron.policy.fitting import policy_for
from agoq_megatron.policy.policy import SOLVED, Rule
from agoq_megatron.seams.agreement import everyones
from agoq_megatron.seams.refusals import UsageError
from agoq_megatron.seams.sizes import parse_size, readable

ROUNDS = 8
"""Of solving within what the last widths leave. Up to three were needed: narrower codes free bytes in every
layer in flight, and add to the moment of one."""


class AutoPolicy(RulesPolicy):
    """The solver's widths.

    Attributes:
        rules: as the solver chose, by layer and tensor.
        summary: lines for the plan that a run prints.
        record: the same for ``--agoq-report``.
    """

    def __init__(self, base: RulesPolicy, summary: list[str], record: dict):
        super().__init__(SOLVED, base.rules)
        self.summary, self.record = summary, record

    @property
    def digest(self) -> str:
        """Equal where all widths and formats are."""
        lines = sorted(f"{number} {site.value} {rule}" for (number, site), rule in self.rules.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def auto_policy(args) -> AutoPolicy:
    """Widths within the budget that the flags give.

    Args:
        args: Megatron's validated arguments with our flags.

    Raises:
        UsageError: the budget cannot be met, or the sensitivities cannot be used.
    """
    knapsack = Knapsack(args, sensitivities_of(args))
    budgets = stage_budgets(args, knapsack)
    try:
        budgets, choice = _solve(args, knapsack, budgets)
    except DoesNotFit as problem:
        raise UsageError(_does_not_fit(args, knapsack, problem)) from problem
    chosen = knapsack.policy(SOLVED, choice)
    if args.agoq_rounding != "policy":
        rules = chosen.rules.items()
        rounded = {key: Rule(replace(rule.format, rounding=args.agoq_rounding)) for key, rule in rules}
        chosen = RulesPolicy(SOLVED, rounded)
    record = _record(args, knapsack, budgets, chosen, choice)
    return AutoPolicy(chosen, list(_summary(args, knapsack, record)), record)


def _solve(args, knapsack: Knapsack, budgets: list[int]) -> tuple[list[int], Choice]:
    """Widths that fit the card with all that lives beside them, and the budgets that they were solved in.

    What lives for a moment depends on the widths: the fewer bytes an MLP has left behind, the more the
    backward pass of attention adds. So the footprint of what was chosen says what it really leaves for saved
    activations; where that is less than it keeps, it is solved again within that. A bound over all widths
    beforehand would be simpler, but gives away up to all that the MLP of a layer keeps: it is there for the
    case that this has not settled after :data:`ROUNDS`.

    Raises:
        DoesNotFit: not even the fewest bits do.
    """
    if args.agoq_activation_memory:
        return budgets, knapsack.solve(budgets)
    narrow = knapsack.narrowest()
    for _ in range(ROUNDS):
        try:
            choice = knapsack.solve(budgets)
        except DoesNotFit:  # what is missing then is counted beside the fewest bits' own moment
            knapsack.solve(list(map(min, budgets, _left(args, knapsack, narrow))))
            raise
        policy = knapsack.policy(SOLVED, choice)
        left = _left(args, knapsack, policy)
        if all(peak <= room for peak, room in zip(knapsack.peaks(policy), left, strict=True)):
            return budgets, choice
        budgets = list(map(min, budgets, left))
    # In an MLP's forward FC1's output in 16 bits is worse: the activation's output cannot overwrite it.
    rules = {key: rule for key, rule in narrow.rules.items() if key[1] is not FC1_OUTPUT}
    budgets = list(map(min, budgets, _left(args, knapsack, narrow, RulesPolicy(SOLVED, rules))))
    return budgets, knapsack.solve(budgets)


def stage_budgets(args, knapsack: Knapsack) -> list[int]:
    """Bytes that each stage has for saved activations, as far as that is known before their widths are.

    Raises:
        UsageError: something else already fills the GPU.
    """
    if args.agoq_activation_memory:
        return [parse_size(args.agoq_activation_memory)] * knapsack.schedule.stages
    if not args.agoq_gpu_memory:
        return _left(args, knapsack, _agoq(knapsack))  # what it keeps there, at least
    # What lives for a moment depends on what is kept as it is, which is not known yet: the worse of both.
    ends = knapsack.config.agoq, knapsack.quantized.agoq
    left = _left(args, knapsack, *ends)
    worst = min(range(len(left)), key=left.__getitem__)
    if left[worst] <= 0:
        row = max((footprints_of(args, knapsack, end)[worst] for end in ends), key=_beside_saved)
        parts = row.parts | {"CUDA and NCCL": OUTSIDE, "fragmentation": FRAGMENTATION * row.peak}
        parts.pop("saved activations")
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
        raise UsageError(
            f"--agoq-gpu-memory {args.agoq_gpu_memory}: on stage {worst} nothing is left for saved "
            f"activations; {readable(-left[worst])} are missing already. The most is taken by "
            + ", ".join(f"{name} ({readable(parts[name])})" for name in largest)
            + ". Use --agoq-grad-bits 8, --agoq-optimizer-bits 8, --use-distributed-optimizer, "
            "--agoq-loss-chunks, or more --tensor-model-parallel-size or --pipeline-model-parallel-size."
        )
    return left


def footprints_of(args, knapsack: Knapsack, policy) -> list[Footprint]:
    known, config = copy.copy(args), with_policy(knapsack.config, policy)
    known.padded_vocab_size = padded_vocabulary(args)
    return footprints(known, config, Plan(config))


def _left(args, knapsack: Knapsack, *policies) -> list[int]:
    """Bytes of each stage for saved activations beside what else lives under the worst of some policies."""
    room = _room(args, knapsack)
    ways = [footprints_of(args, knapsack, policy) for policy in policies]
    return [math.floor(room - max(map(_beside_saved, rows))) for rows in zip(*ways, strict=True)]


def _room(args, knapsack: Knapsack) -> float:
    """Bytes that the peak of a stage may have: without a budget, what `agoq` needs on the fullest."""
    if args.agoq_gpu_memory:
        return (parse_size(args.agoq_gpu_memory) - OUTSIDE) / (1 + FRAGMENTATION)
    return max(row.peak for row in footprints_of(args, knapsack, _agoq(knapsack)))


def _agoq(knapsack: Knapsack) -> RulesPolicy:
    """That policy's widths of what takes one: what a recomputed layer keeps for a moment stays in 16 bits, as
    it does with the solver's."""
    agoq = policy_for(knapsack.config, "agoq")
    rules = {(n, site): agoq.rule(site, n) for n, site in knapsack.kept() if agoq.rule(site, n).format}
    return RulesPolicy(agoq.name, rules)


def _beside_saved(row: Footprint) -> float:
    """Bytes of all but saved activations."""
    return row.peak - row.parts["saved activations"]


def check_same_widths(policy, fail: Callable[[str], None]) -> Callable[[Callable], Callable]:
    """A wrapper of the function that builds the model: before it, all ranks compare their widths.

    Args:
        policy: the solver's, or one that raises some of its widths.
        fail: is called, on every rank, with what is wrong.
    """

    def wrap(build: Callable) -> Callable:
        def checked(*args, **kwargs):
            own = getattr(policy, "base", policy).digest, sorted(getattr(policy, "widths", {}).items())
            digests = everyones(own)
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            if others:
                fail(
                    f"--agoq-activations {SOLVED}: ranks {ranges(others)} chose other widths than rank 0. "
                    "All nodes need the same file of --agoq-sensitivities and the same versions of this "
                    "package and SciPy, and --agoq-grad-node-size where their numbers of ranks differ; or "
                    "write the widths into a policy file."
                )
            return build(*args, **kwargs)

        return checked

    return wrap


# --- Said about it --------------------------------------------------------------------------------


def widths_by_tensor(knapsack: Knapsack, policy) -> dict[str, dict[int, list[int]]]:
    """For each tensor that is kept: the layers of each width."""
    found: dict[str, dict[int, list[int]]] = {}
    for number, site in knapsack.kept():
        fmt = policy.rule(site, number).format
        found.setdefault(site.value, {}).setdefault(fmt.bits if fmt else 16, []).append(number)
    return found


def _record(args, knapsack: Knapsack, budgets: list[int], chosen: RulesPolicy, choice: Choice) -> dict:
    file = knapsack.sensitivities
    peaks = knapsack.peaks(chosen)
    return {
        "sensitivities": file.path.name if file.path.parent == FOLDER else str(file.path),
        "shipped": file.path.parent == FOLDER,
        "cost": choice.cost,
        "bound": choice.bound,
        "cost_of_agoq": _finite(knapsack.cost(policy_for(knapsack.config, "agoq"))),
        "cost_of_uniform4": _finite(knapsack.cost(policy_for(knapsack.config, "uniform4"))),
        "stages": [
            {"in_flight": knapsack.schedule.counts(stage), "peak_bytes": peak, "budget_bytes": budget}
            for stage, (peak, budget) in enumerate(zip(peaks, budgets, strict=True))
        ],
        "widths": {
            tensor: {str(width): ranges(numbers) for width, numbers in sorted(widths.items())}
            for tensor, widths in widths_by_tensor(knapsack, chosen).items()
        },
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _budget_in_words(args, knapsack: Knapsack) -> str:
    if args.agoq_activation_memory:
        return f"--agoq-activation-memory {args.agoq_activation_memory}"
    if args.agoq_gpu_memory:
        return f"--agoq-gpu-memory {args.agoq_gpu_memory}"
    exact = "; recomputed layers in 16 bits for their moment" if args.recompute_granularity else ""
    room = f"{readable(_room(args, knapsack))}, weights and states included"
    return f"what agoq needs on the fullest stage ({room}{exact})"


def _summary(args, knapsack: Knapsack, record: dict):
    origin = f"{record['sensitivities']}{', from the package' if record['shipped'] else ''}"
    yield f"AGoQ: widths within {_budget_in_words(args, knapsack)}, by sensitivities of {origin}"
    for tensor, widths in record["widths"].items():
        words = "; ".join(f"{width} bits: layers {numbers}" for width, numbers in widths.items())
        yield f"  {tensor:<42} {words}"
    for stage, row in enumerate(record["stages"]):
        yield (
            f"  stage {stage}: {readable(row['peak_bytes'])} of {readable(row['budget_bytes'])} kept, with "
            f"micro-batches in flight: {row['in_flight']}"
        )
    words = [f"{record['cost']:.4g} (the least possible is {record['bound']:.4g} or more)"]
    for name in ("agoq", "uniform4"):
        if record[f"cost_of_{name}"] is not None:
            words.append(f"{name} {record[f'cost_of_{name}']:.4g}")
    yield f"  sum of squared relative errors: {', '.join(words)}"
    agoq = record["cost_of_agoq"]
    if agoq is not None and record["cost"] > 4 * agoq:
        yield (
            "  WARNING: within this memory the errors are more than twice those of the default policy; such "
            "gradients may not train. Give more memory, recompute layers or use smaller micro-batches."
        )


# --- A budget that cannot be met ------------------------------------------------------------------


def _does_not_fit(args, knapsack: Knapsack, problem: DoesNotFit) -> str:
    missing: dict[int, float] = {}
    for name, excess in problem.excess.items():
        missing[stage_of(name)] = max(missing.get(stage_of(name), 0.0), excess)
    words = [f"stage {stage} by {readable(excess)} ({excess:.0f} bytes)" for stage, excess in missing.items()]
    stages = "; ".join(words[:4]) + (f"; and {len(words) - 4} more" if len(words) > 4 else "")
    budget = _budget_in_words(args, knapsack)
    exceeded = f"even with the fewest bits everywhere the budget is exceeded on {stages}. "
    if not (args.agoq_activation_memory or args.agoq_gpu_memory):
        return (
            f"--agoq-activations {SOLVED}, within {budget}: {exceeded}Give --agoq-activation-memory or "
            "--agoq-gpu-memory, or calibrate fewer bits too."
        )
    text = f"{budget}: {exceeded}"
    helps = [*_recomputation_that_fits(args, knapsack), *_micro_batch_that_fits(args, knapsack)]
    if helps:
        text += f"It would fit with {', or with '.join(helps)}. "
    return text + (
        "More --pipeline-model-parallel-size or --tensor-model-parallel-size, fewer "
        "--num-virtual-stages-per-pipeline-rank (fewer micro-batches are then in flight) or a larger budget "
        "help too."
    )


def _fits(args, knapsack: Knapsack) -> bool:
    """With the fewest bits everywhere."""
    narrow = knapsack.narrowest()
    try:
        budgets = stage_budgets(args, knapsack)
    except UsageError:
        return False
    if not args.agoq_activation_memory:
        budgets = list(map(min, budgets, _left(args, knapsack, narrow)))
    return all(size <= budget for size, budget in zip(knapsack.peaks(narrow), budgets, strict=True))


def _recomputation_that_fits(args, knapsack: Knapsack):
    """The fewest layers of each chunk to recompute, as flags."""
    if args.recompute_granularity == "full":
        return
    most = max(knapsack.layers_of_chunks())
    other = copy.copy(args)
    other.recompute_granularity, other.recompute_method = "full", "block"
    for count in range(1, most + 1):
        other.recompute_num_layers = count
        try:
            found = Knapsack(other, knapsack.sensitivities)
        except UsageError:  # a file of one's own may not know the kept inputs: nothing to advise
            return
        if _fits(other, found):
            yield (
                f"--recompute-granularity full --recompute-method block --recompute-num-layers {count} "
                f"(of {most} layers in a chunk)"
            )
            return


def _micro_batch_that_fits(args, knapsack: Knapsack):
    """The largest smaller micro-batch, as a flag; the global batch stays."""
    other = copy.copy(args)
    for size in range(args.micro_batch_size - 1, 0, -1):
        if args.global_batch_size % (size * args.data_parallel_size):
            continue
        other.micro_batch_size = size
        try:
            found = Knapsack(other, knapsack.sensitivities)
        except ValueError:  # more micro-batches than its groups divide, for one
            continue
        if _fits(other, found):
            yield f"--micro-batch-size {size}"
            return

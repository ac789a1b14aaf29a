"""Write docs/support.md: what of Megatron's works here, what is refused, and what nobody has tried.

    python scripts/docs/support_matrix.py            # writes the page
    python scripts/docs/support_matrix.py --check    # exits with 1 where the stored page says something else

Nothing on the page is written by hand:

- *works*: a test carries the mark ``@pytest.mark.supports("feature", ..., part="activations")``. The tests
  are parsed, not run; that they pass is ``scripts/test.sh``'s to say.
- *refused*: the checks of ``agoq_megatron/checks/flag_register.py`` and ``checks/states.py``, asked with the
  feature's flags, say no.
- *untested*: neither. A feature with both is a contradiction and an error.

The features are listed below; all of Megatron's flags come from its parser, and what becomes of each from the
register. A flag that the register calls carried and no test sets, or untested although one does, is an error
too.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agoq_megatron.checks.flag_register import Flag

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/support.md"
PARTS = {"activations": "activations", "gradients": "8-bit gradients", "states": "8-bit states"}


@dataclass(frozen=True)
class Feature:
    """Something of Megatron's.

    Attributes:
        name: as the tests' marks call it.
        args: its flags, as attributes of Megatron's arguments with the values that turn it on.
    """

    name: str
    args: dict[str, object] = field(default_factory=dict)


SECTIONS: dict[str, list[Feature]] = {
    "Parallelism": [
        Feature("tensor parallelism", {"tensor_model_parallel_size": 2}),
        Feature("sequence parallelism", {"sequence_parallel": True}),
        Feature("pipeline parallelism", {"pipeline_model_parallel_size": 2}),
        Feature("interleaved pipeline", {"num_virtual_stages_per_pipeline_rank": 2}),
        Feature("uneven pipeline stages", {"decoder_first_pipeline_num_layers": 1}),
        Feature("pipeline layout by string", {"pipeline_model_parallel_layout": "Et|tL"}),
        Feature("data parallelism"),
        Feature("distributed optimizer", {"use_distributed_optimizer": True}),
        Feature("overlapped gradient reduction", {"overlap_grad_reduce": True}),
        Feature("overlapped parameter gather", {"overlap_param_gather": True}),
        Feature("several distributed optimizer instances", {"num_distributed_optimizer_instances": 2}),
        Feature("context parallelism", {"context_parallel_size": 2}),
        Feature("tensor-parallel overlap", {"tp_comm_overlap": True}),
        Feature("Megatron FSDP", {"use_megatron_fsdp": True}),
        Feature("torch FSDP2", {"use_torch_fsdp2": True}),
    ],
    "Model": [
        Feature("RMSNorm", {"normalization": "RMSNorm"}),
        Feature("LayerNorm", {"normalization": "LayerNorm"}),
        Feature("zero-centred norms", {"layernorm_zero_centered_gamma": True}),
        Feature("SwiGLU", {"swiglu": True}),
        Feature("GELU"),
        Feature("squared ReLU", {"squared_relu": True}),
        Feature("quick GEGLU", {"quick_geglu": True}),
        Feature("clamped and offset gates", {"glu_linear_offset": 1.0}),
        Feature("grouped-query attention", {"group_query_attention": True}),
        Feature("multi-head attention"),
        Feature("multi-latent attention", {"multi_latent_attention": True}),
        Feature("norms on queries and keys", {"qk_layernorm": True}),
        Feature("sliding-window attention", {"window_size": (128, 0)}),
        Feature("windows in some of the layers", {"window_size": (128, 0), "window_attn_skip_freq": 2}),
        Feature("attention sinks", {"softmax_type": "learnable"}),
        Feature("gated attention", {"attention_output_gate": True}),
        Feature("biases", {"add_bias_linear": True}),
        Feature("rotary positions", {"position_embedding_type": "rope"}),
        Feature("part of the head rotated", {"rotary_percent": 0.5}),
        Feature("interleaved rotation", {"rotary_interleaved": True}),
        Feature("LLaMA-3.1's scaled rotary positions", {"use_rope_scaling": True}),
        Feature("YaRN", {"position_embedding_type": "yarn"}),
        Feature("learned positions", {"position_embedding_type": "learned_absolute"}),
        Feature("no positions", {"position_embedding_type": "none"}),
        Feature("tied embeddings", {"untie_embeddings_and_output_weights": False}),
        Feature("hidden dropout", {"hidden_dropout": 0.1}),
        Feature("attention dropout", {"attention_dropout": 0.1}),
        Feature("mixture of experts", {"num_experts": 8}),
        Feature("multi-token prediction", {"mtp_num_layers": 1}),
        Feature("hybrid (Mamba) layers", {"hybrid_layer_pattern": "M*-"}),
        Feature("heterogeneous layers", {"heterogeneous_layers_config_path": "layers.json"}),
    ],
    "Precision and memory": [
        Feature("BF16", {"bf16": True}),
        Feature("FP16", {"fp16": True, "bf16": False}),
        Feature("FP32", {"bf16": False}),
        Feature("products in FP8", {"fp8": "hybrid"}),
        Feature("FP4 layers", {"fp4": "e2m1"}),
        Feature("gradients reduced in BF16", {"grad_reduce_in_bf16": True}),
        Feature("full recomputation", {"recompute_granularity": "full"}),
        Feature("selective recomputation", {"recompute_granularity": "selective"}),
        Feature("MLP in pieces", {"mlp_chunks_for_training": 4}),
        Feature("offloaded activations", {"cpu_offloading_num_layers": 1}),
        Feature("fine-grained offloading", {"fine_grained_activation_offloading": True}),
        Feature("optimizer on the host", {"optimizer_cpu_offload": True}),
        Feature("precision-aware optimizer", {"use_precision_aware_optimizer": True}),
        Feature("CUDA graphs", {"cuda_graph_impl": "local"}),
    ],
    "Training": [
        Feature("Adam", {"optimizer": "adam"}),
        Feature("SGD", {"optimizer": "sgd"}),
        Feature("Muon", {"optimizer": "muon"}),
        Feature("gradient clipping", {"clip_grad": 1.0}),
        Feature("resumed bit for bit after SIGKILL"),
        Feature("checkpoint loaded by other ranks"),
        Feature("checkpoint exchanged with stock Megatron"),
        Feature("checkpoint exchanged with other bits"),
        Feature("asynchronous checkpoints", {"async_save": True}),
        Feature("saves and leaves on a signal", {"exit_signal_handler": True}),
        Feature("growing batch size", {"step_batch_size_schedule": "0:4 1M:8"}),
        Feature("TensorBoard", {"tensorboard_dir": "tb"}),
        Feature("W&B", {"wandb_project": "p"}),
        Feature("fused cross entropy", {"cross_entropy_loss_fusion": True}),
        Feature("stock pretrain_gpt.py by --spec"),
        Feature("agoq_megatron.enable()"),
        Feature("packed sequences, fine-tuning", {"sft": True}),
        Feature("attention mask by document", {"reset_attention_mask": True}),
        Feature("packed sequences by document", {"dataloader_inter_document_masking": True}),
        Feature("Transformer Engine installed"),
        Feature("apex installed"),
    ],
}
FEATURES = {feature.name: feature for section in SECTIONS.values() for feature in section}


class Contradiction(ValueError):
    """Marks and checks that cannot both be right; the message names the test."""


# --- What the tests say ---------------------------------------------------------------------------


def marks(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Tests by (feature, part), of every mark ``supports`` in a folder's tests.

    Args:
        folder: searched with all below it.

    Raises:
        Contradiction: a feature or part that is not listed here.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        for function in ast.parse(path.read_text()).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            where = f"{path.relative_to(folder.parent)}::{function.name}"
            for call in (node for mark in function.decorator_list for node in ast.walk(mark)):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.supports":
                    for key in _named(call, where):
                        found.setdefault(key, []).append(where)
    return found


def _named(call: ast.Call, where: str) -> Iterable[tuple[str, str]]:
    parts = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "part"]
    part = parts[0] if parts else "activations"
    for argument in call.args:
        name = ast.literal_eval(argument)
        if name not in FEATURES or part not in PARTS:
            raise Contradiction(f"{where}: {name!r} of {part!r} is not listed in support_matrix.py")
        yield name, part


def words_of_tests(folder: Path) -> set[str]:
    """Every word of the string constants of a folder's tests, those of refused and named flags left out."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        if path.name not in ("test_bad_input.py", "test_flag_register.py", "test_experts_flags.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(node.value.split())
    return found


# --- What the checks say --------------------------------------------------------------------------


def checks() -> dict[str, tuple]:
    """The refusals of each part, as (attribute, refused, flag, reason)."""
    from agoq_megatron.checks import flag_register
    from agoq_megatron.checks import states as of_states

    carried = flag_register.REFUSED
    return {
        "activations": carried,
        "gradients": (*carried, *of_states._NOT_WITH_8_BIT_GRADIENTS),
        "states": (*carried, *of_states._NOT_WITH_OUR_STATES),
    }


def refusal(feature: Feature, table: Iterable[tuple]) -> str | None:
    """What a feature is told, or None where it may pass."""
    for attribute, refused, flag, reason in table:
        if attribute in feature.args and refused(feature.args[attribute]):
            return f"{flag}: {reason}".replace("no --", "needs --", 1)
    return None


# --- The page -------------------------------------------------------------------------------------


def status(feature: Feature, part: str, found: dict, tables: dict[str, tuple]) -> tuple[str, str]:
    """("works" | "refused" | "untested", what is told where refused).

    Raises:
        Contradiction: a test supports what the checks refuse.
    """
    told = refusal(feature, tables[part])
    tests = found.get((feature.name, part))
    if told and tests:
        raise Contradiction(f"{feature.name}: {tests[0]} supports it, but it is refused ({told})")
    return ("works", "") if tests else ("refused", told) if told else ("untested", "")


def features_text(found: dict, tables: dict[str, tuple]) -> list[str]:
    lines, head = [], "| | " + " | ".join(PARTS.values()) + " | shown by |"
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", head, "|---|---|---|---|---|"]
        for feature in section:
            states = {part: status(feature, part, found, tables) for part in PARTS}
            cells = ["**works**" if state == "works" else state for state, _ in states.values()]
            tests = [test for part in PARTS for test in found.get((feature.name, part), ())]
            files = dict.fromkeys(test.partition("::")[0].removeprefix("tests/") for test in tests)
            told = dict.fromkeys(text for _, text in states.values() if text)
            shown = "; ".join([", ".join(f"`{name}`" for name in files)] * bool(files) + list(told))
            lines.append(f"| {feature.name} | {' | '.join(cells)} | {shown} |")
    return lines


def refused_text(tables: dict[str, tuple]) -> list[str]:
    """Every entry of the tables, whether it is a feature above or not."""
    lines, carried = [], tables["activations"]
    for title, table in (
        ("Refused", carried),
        ("Refused with `--agoq-grad-bits 8`", tables["gradients"][len(carried) :]),
        (
            "Refused with `--agoq-optimizer-bits 8` or `--agoq-master-weights split`",
            tables["states"][len(carried) :],
        ),
    ):
        lines += ["", f"## {title}", "", "| flag | the run ends with |", "|---|---|"]
        lines += [f"| {flag_text(flag)} | {reason} |" for _, _, flag, reason in table]
    return lines


def flag_text(flag: str) -> str:
    return f"without `{flag.removeprefix('no ')}`" if flag.startswith("no ") else f"`{flag}`"


def standings(words: set[str]) -> dict[str, list[Flag]]:
    """All of Megatron's flags by what becomes of them; Megatron's own by whether a test sets them.

    Raises:
        Contradiction: the tests say otherwise than the register.
    """
    from agoq_megatron.checks.flag_register import megatron_flags, standing

    found: dict[str, list[Flag]] = {kind: [] for kind in KINDS}
    wrong: dict[str, list[str]] = {"carried": [], "untested": []}
    for flag in megatron_flags().values():
        kind, tested = standing(flag), not words.isdisjoint(flag.options)
        if (kind, tested) in (("carried", False), ("untested", True)):
            wrong[kind].append(flag.option)
        if kind == "Megatron's":
            kind = "Megatron's, in a test" if tested else "Megatron's, in none"
        found[kind].append(flag)
    for kind, but in (("carried", "no test sets"), ("untested", "a test sets")):
        if wrong[kind]:
            names = ", ".join(wrong[kind])
            raise Contradiction(f"agoq_megatron/checks/flag_register.py: {kind}, but {but} it: {names}")
    return found


KINDS = {
    "carried": "a test sets them",
    "refused": "see above",
    "untested": "reach layers, gradients or optimizer, and no test sets them; a run names them at start",
    "idle": "belong to what is not carried and do nothing alone; a run names them at start",
    "Megatron's, in a test": "of data, logs, schedules and checkpoints",
    "Megatron's, in none": "so too; that no test of this project sets them does not mean that they fail",
    "unknown": "a later Megatron's: refused where they reach the model's config, otherwise named at start",
}


def flags_text(found: dict[str, list[Flag]]) -> list[str]:
    from agoq_megatron.checks.flag_register import CARRIED

    lines = ["", "## Flag by flag", ""]
    lines += [f"What becomes of Megatron's {sum(map(len, found.values()))} flags, by the register in"]
    lines += ["`agoq_megatron/checks/flag_register.py`:", "", "| | flags | |", "|---|---|---|"]
    lines += [f"| {kind} | {len(found[kind])} | {why} |" for kind, why in KINDS.items()]
    for kind in ("untested", "idle", "Megatron's, in none"):
        groups: dict[str, list[str]] = {}
        for flag in found[kind]:
            groups.setdefault(flag.group, []).append(flag.option)
        lines += ["", f"### {kind[0].upper()}{kind[1:]}"]
        for title, options in sorted(groups.items()):
            lines += ["", f"**{title}**: " + ", ".join(f"`{option}`" for option in sorted(options))]
    lines += ["", "### Carried, by the module that answers for it"]
    options = {flag.attribute: flag.option for flag in found["carried"]}
    for module, names in CARRIED.items():
        lines += ["", f"**{module}**: " + ", ".join(f"`{options[name]}`" for name in sorted(names.split()))]
    return lines


def page() -> str:
    """The whole page."""
    from importlib.metadata import version

    found, tables = marks(ROOT / "tests"), checks()
    lines = [
        "# What works",
        "",
        "Written by `python scripts/docs/support_matrix.py` from tests' marks, the checks of flags, and",
        f"Megatron's parser ({stamp(version('megatron-core'))}). **works**: a test trains with it and",
        "compares. refused: the run ends, before anything is allocated, with a paragraph naming the flag.",
        "untested: neither; it may work. The three columns are the three parts; a test of one may leave the",
        "others off. The tests run on CPUs, over gloo.",
        *features_text(found, tables),
        *refused_text(tables),
        "",
        "`tests/training/test_flag_register.py` gives each of these to the parser and the checks. Flags that",
        "cannot go together are refused too, by name: see `agoq_megatron/checks/validation.py`;",
        "`tests/training/test_bad_input.py` has a case of each.",
        *flags_text(standings(words_of_tests(ROOT / "tests"))),
    ]
    return "\n".join(lines) + "\n"


def stamp(version: str) -> str:
    """How the page names the Megatron that it was made with."""
    return f"megatron-core {version}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date")
    args = parser.parse_args()
    from agoq_megatron.seams import compat

    compat.silence_missing_accelerators()
    text = page()
    if not args.check:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        print("docs/support.md is out of date; run: python scripts/docs/support_matrix.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning on packed conversations (--sft): losses are those of stock Megatron's layers under masks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.training.test_documents import MODEL, TP2

pytestmark = pytest.mark.slow

ENTRY = Path(__file__).with_name("sft_entry.py")
WORDS = [f"w{i}" for i in range(100)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {{ eos_token }}{% endfor %}"
HERE = (
    "--sft --tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format default --position-embedding-type rope"
)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, request):
    """A tokenizer of a hundred words, and lines of one to four conversations; some are too long to be packed
    whole."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("conversations")
    special = ["<unk>", "<pad>", "<eos>"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>")
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    draw = random.Random(5)

    def conversation():
        return [
            {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))}
            for role in ("system", "user", "assistant")
        ]

    lines = ([m for _ in range(draw.randint(1, 4)) for m in conversation()] for _ in range(120))
    path = folder / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    flags = [*MODEL, *HERE.split(), "--tokenizer-model", folder, "--data-path", path]
    for name in ("--tokenizer-type", "--vocab-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


@pytest.mark.supports("packed sequences, fine-tuning")
def test_losses_are_those_of_stock_layers(launcher, conversations, tmp_path):
    env = {"STOCK_REPORT": str(tmp_path / "stock.json")}
    stock = launcher.run(*conversations, "--save", tmp_path, tiny=False, entry=ENTRY, env=env)
    assert stock.ok, stock.log[-4000:]
    reference = {int(i): v for i, v in json.loads((tmp_path / "stock.json").read_text()).items()}
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    report = tmp_path / "report.json"
    run = launcher.run(
        *conversations, "--load", tmp_path, "--agoq-activations", "off", "--exit-interval", "6", *TP2.split(),
        "--sequence-parallel", "--agoq-report", report, ranks=2, tiny=False, entry=ENTRY,
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    found = {it["iteration"]: it for it in json.loads(report.read_text())["train"]}
    assert found.keys() == {3, 4, 5, 6}
    for iteration, it in found.items():
        assert it["lm loss"] == pytest.approx(reference[iteration][0], rel=1e-4)
        assert it["grad norm"] == pytest.approx(reference[iteration][1], rel=1e-3)


@pytest.mark.supports("packed sequences, fine-tuning", part="gradients")
@pytest.mark.supports("packed sequences, fine-tuning", part="states")
def test_in_few_bits(launcher, conversations, tmp_path):
    report = tmp_path / "report.json"
    run = launcher.run(
        *conversations, "--bf16", "--agoq-grad-bits", "8", "--agoq-optimizer-bits", "8",
        "--exit-interval", "4", "--use-distributed-optimizer", "--agoq-report", report, tiny=False,
        entry=ENTRY,
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    found = json.loads(report.read_text())
    assert all(3 < it["lm loss"] < 6 for it in found["train"]) and len(found["train"]) == 4
    for row in found["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row


@pytest.mark.parametrize(
    "more,said",
    [
        ("--eod-mask-loss", "--eod-mask-loss with --sft"),
        ("--tokenizer-type NullTokenizer", "takes SFTTokenizer"),
        ("--data-path no.jsonl", "no file 'no.jsonl'"),
    ],
)
def test_what_does_not_go_with_it(launcher, conversations, more, said):
    run = launcher.run(*conversations, *more.split(), tiny=False, entry=ENTRY)
    assert run.codes == [2] and said in run.log, run.log[-3000:]


def test_the_package_that_reads_them(launcher, conversations):
    if __import__("importlib.util").util.find_spec("datasets"):
        pytest.skip("it is there")
    run = launcher.run(*conversations, tiny=False)
    assert run.codes == [2] and "pip install datasets" in run.log, run.log[-3000:]

"""What lm-eval reports is what the exported model says; tasks that cannot be had are named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import evaluate_checkpoint as evaluate
import pytest
import torch
from safetensors.torch import save_file

from agoq_megatron.convert import from_hf
from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.weights import model_weights
from agoq_megatron.seams.refusals import UsageError

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason='lm-eval is not installed: pip install -e ".[eval]" (about 0.5 GB)',
)


@pytest.fixture
def checkpoint(rng, tmp_path) -> Path:
    """A model of random weights with a tokenizer of single bytes, as Megatron's checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    llama = Architecture(2, 64, 96, 4, 2, 16, 257, 256, 1e-5, 10000, None, "none", False)
    source = tmp_path / "source"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(source)
    (source / "config.json").write_text(json.dumps(llama.hf_config("float32")))
    parts = {name: shape for weight in model_weights(llama) for name, shape in weight.parts.items()}
    tensors = {name: torch.randn(shape, generator=rng) * 0.3 for name, shape in parts.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    words = ["--input", str(source), "--output", str(tmp_path / "ckpt")]
    from_hf.convert(from_hf.parse(words))
    return tmp_path / "ckpt"


@torch.no_grad()
def expected(folder: Path) -> tuple[float, float]:
    """Accuracy of the local task by log-likelihood, and by that a character of the answer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hits = [0, 0]
    documents = [json.loads(x) for x in evaluate.LOCAL_TASK.with_suffix(".jsonl").read_text().splitlines()]
    for document in documents:
        scores = []
        for choice in document["choices"]:
            # lm-eval gives a prompt's trailing space to the answer.
            prompt = document["text"].rstrip()
            answer = document["text"][len(prompt) :] + choice
            before, after = tokenizer.encode(prompt), tokenizer.encode(answer)
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            places = torch.arange(len(before) - 1, len(before) + len(after) - 1)
            scores.append(logits[places, torch.tensor(after)].sum())
        scores = torch.stack(scores)
        lengths = torch.tensor([float(len(choice)) for choice in document["choices"]])
        hits[0] += int(scores.argmax()) == document["answer"]
        hits[1] += int((scores / lengths).argmax()) == document["answer"]
    return hits[0] / len(documents), hits[1] / len(documents)


@needs_lm_eval
@pytest.mark.slow
def test_the_local_task_end_to_end(checkpoint, tmp_path, capsys):
    results, kept = tmp_path / "results.json", tmp_path / "hf"
    evaluate.main([
        str(checkpoint), "--tasks", "local", "--output", str(results), "--export", str(kept),
        "--device", "cpu", "--batch-size", "5",
    ])  # fmt: skip
    (outcome,) = json.loads(results.read_text())
    assert outcome["task"] == "python_completions" and outcome["examples"] == 24 and not outcome["skipped"]
    got = outcome["metrics"]["acc,none"], outcome["metrics"]["acc_norm,none"]
    # Orders of FP32 sums may decide a tie.
    assert got == pytest.approx(expected(kept), abs=1.5 / 24)
    assert f"{got[0]:.4f}" in capsys.readouterr().out


@needs_lm_eval
@pytest.mark.slow
def test_a_task_without_data_is_named_and_the_others_run(checkpoint, tmp_path, capsys, monkeypatch):
    lost = tmp_path / "lost.yaml"
    text = evaluate.LOCAL_TASK.read_text().replace("task: python_completions", "task: lost")
    lost.write_text(text)  # its data is not beside it
    words = [str(checkpoint), "--device", "cpu", "--limit", "3", "--tasks", "local", "--task-file", str(lost)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(words)
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "lost                     not run: FileNotFoundError" in out
    assert "python_completions           0        3 acc " in out


@needs_lm_eval
def test_names_of_tasks(tmp_path):
    """Looked up before anything is exported."""
    with pytest.raises(UsageError, match="--tasks: lm-eval has no task helaswag"):
        evaluate.main([str(tmp_path / "none"), "--tasks", ",".join((*evaluate.TASKS, "helaswag"))])


def test_task_files(tmp_path):
    task = evaluate.task_of(evaluate.LOCAL)
    data = Path(task["dataset_kwargs"]["data_files"]["test"])
    documents = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(documents) == 24
    assert all(len(set(d["choices"])) == 4 and d["choices"][d["answer"]] for d in documents)
    assert len({d["answer"] for d in documents}) == 4
    assert evaluate.task_of("piqa") == "piqa"
    with pytest.raises(UsageError, match="--task-file: there is no"):
        evaluate.task_of(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    with pytest.raises(UsageError, match="no key 'task'"):
        evaluate.task_of(tmp_path / "empty.yaml")


def test_a_folder_in_hugging_faces_format_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    options = evaluate.parse([str(tmp_path)])
    assert evaluate.exported(options, tmp_path / "unused") == tmp_path
    assert not (tmp_path / "unused").exists()


def test_an_export_is_not_replaced(tmp_path):
    (tmp_path / "file").touch()
    options = evaluate.parse(["ckpt", "--export", str(tmp_path)])
    with pytest.raises(UsageError, match="--export: .* exists. Name another folder"):
        evaluate.exported(options, tmp_path)


def test_the_table():
    outcomes = [
        evaluate.Outcome("one", 5, {"acc,none": 0.25, "acc_stderr,none": 0.125}, examples=12),
        evaluate.Outcome("two", 0, skipped="ConnectionError: no way there"),
    ]
    lines = evaluate.table(outcomes).splitlines()
    assert lines[1].split() == ["one", "5", "12", "acc", "0.2500", "0.1250"]
    assert lines[2].split(maxsplit=3) == ["two", "not", "run:", "ConnectionError: no way there"]

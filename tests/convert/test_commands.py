"""What the commands refuse, that their outputs are whole, and that neither holds a model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agoq_megatron.convert import from_hf, hf_store, megatron_store, to_hf
from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.weights import model_weights
from agoq_megatron.resuming import checksums
from agoq_megatron.seams.refusals import UsageError


def write_model(folder: Path, model: Architecture, rng: torch.Generator, kind: str | None = None) -> Path:
    """A model of random weights, in BF16, as the row ``kind`` of the table."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.hf_config("bfloat16", kind)))
    weights = model_weights(model, model.family(kind).layer)
    parts = {name: shape for weight in weights for name, shape in weight.parts.items()}
    tensors = {n: torch.randn(shape, generator=rng).bfloat16() for n, shape in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def hf(llama, rng, tmp_path) -> Path:
    return write_model(tmp_path / "hf", llama, rng)


@pytest.fixture
def checkpoint(hf, tmp_path) -> Path:
    take("--input", hf, "--output", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def take(*argv: object) -> None:
    from_hf.convert(from_hf.parse([str(word) for word in argv]))


def export(*argv: object) -> None:
    to_hf.convert(to_hf.parse([str(word) for word in argv]))


def change_config(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_files_come_back(hf, checkpoint, tmp_path):
    export("--load", checkpoint, "--output", tmp_path / "again")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "again", hf))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((hf / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )


def test_another_dtype(hf, checkpoint, tmp_path):
    export("--load", checkpoint / "release", "--output", tmp_path / "again", "--dtype", "float32")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "again", hf))
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("command,made", [("to_hf", "config.json"), ("from_hf", "release")])
def test_an_output_is_replaced_only_when_told_and_only_if_it_is_one(command, made, hf, checkpoint, tmp_path):
    run = export if command == "to_hf" else take
    source = ("--load", checkpoint) if command == "to_hf" else ("--input", hf)
    output = tmp_path / "output"
    run(*source, "--output", output)
    with pytest.raises(UsageError, match="--output: .* exists.*--overwrite"):
        run(*source, "--output", output)
    (output / "stale").write_text("")
    run(*source, "--output", output, "--overwrite")
    assert (output / made).exists() and not (output / "stale").exists()

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=f"--output: .* has no {made}"):
        run(*source, "--output", mine, "--overwrite")
    assert (mine / "thesis.tex").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", ["to_hf", "from_hf"])
def test_an_interrupted_command_leaves_what_was_there(command, hf, checkpoint, tmp_path, monkeypatch):
    run = export if command == "to_hf" else take
    source = ("--load", checkpoint) if command == "to_hf" else ("--input", hf)
    before = tmp_path / "before"
    run(*source, "--output", before)
    files = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}

    def interrupted(*args):
        raise KeyboardInterrupt

    module, name = (hf_store.ModelWriter, "finish") if command == "to_hf" else (from_hf, "write_checkpoint")
    monkeypatch.setattr(module, name, interrupted)
    for output in (before, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            run(*source, "--output", output, "--overwrite")
    assert files == {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_one_layer_is_in_memory_while_a_checkpoint_is_written(llama, tmp_path):
    alive: list[weakref.ref] = []

    weights = model_weights(replace(llama, layers=20))
    names = {weight.name for weight in weights}

    def make(weight):
        assert sum(one() is not None for one in alive) <= len(names)
        tensor = torch.randn(weight.shape)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    sources = [megatron_store.Source(w, torch.float32, lambda w=w: make(w)) for w in weights]
    megatron_store.write_checkpoint(tmp_path, sources, 20, Namespace(num_layers=20))
    assert len(alive) == len(weights)
    reader = megatron_store.CheckpointReader(tmp_path / "release")
    assert reader.args.num_layers == 20 and reader.iteration == 0
    reader.check(weights)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.norm.weight"), "has no model.norm.weight"),
        (lambda t: t.update({"model.layers.0.q_norm.weight": torch.ones(4)}), "no place for .*q_norm"),
        (lambda t: t.update({"model.layers.99.mlp.up_proj.weight": torch.ones(4)}), "no place for .*99"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3).bfloat16()}), r"model.norm.weight .*\(3,\)"),
        (
            lambda t: t.update({(name := "model.layers.0.mlp.up_proj.weight"): t[name].float()}),
            "up_proj.weight are of BF16, F32",
        ),
    ],
    ids=["missing", "left over", "a layer too many", "shape", "two dtypes"],
)  # fmt: skip
def test_a_model_that_is_not_what_its_config_says(hf, tmp_path, change, message):
    change_tensors(hf, change)
    with pytest.raises(UsageError, match=message):
        take("--input", hf, "--output", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_more_layers_than_tensors(hf, tmp_path):
    """Refused before there is a list of their tensors."""
    change_config(hf, num_hidden_layers=10**12)
    with pytest.raises(UsageError, match=r"num_hidden_layers is 1000000000000; .* holds \d+ tensors"):
        take("--input", hf, "--output", tmp_path / "ckpt")


def test_a_missing_file(hf, tmp_path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="model-00001-of-00002.safetensors, which the index names"):
        take("--input", hf, "--output", tmp_path / "ckpt")


@pytest.mark.parametrize("file", [7, None, "../model.safetensors", ["model.safetensors"]])
def test_an_index_that_names_no_file(file, hf, tmp_path):
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(UsageError, match="index.json names no file of this folder for model.norm.weight"):
        take("--input", hf, "--output", tmp_path / "ckpt")


def test_a_tensor_in_two_files(hf, tmp_path):
    tensors = load_file(hf / "model.safetensors")
    one, two = dict(list(tensors.items())[:3]), dict(list(tensors.items())[2:])
    twice = (one.keys() & two.keys()).pop()
    for number, part in enumerate((one, two)):
        save_file(part, hf / f"{number}.safetensors", metadata={"format": "pt"})
    index = {name: f"{int(name in two)}.safetensors" for name in tensors}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UsageError, match=f"holds {twice} twice, the second time in 1.safetensors"):
        take("--input", hf, "--output", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_an_output_layer_of_its_own_in_a_tied_model(hf, tmp_path):
    """Which of the two counts depends on transformers' version; the same values twice are no harm."""
    embedding = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    change_config(hf, tie_word_embeddings=True)
    change_tensors(hf, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    take("--input", hf, "--output", tmp_path / "same")
    change_tensors(hf, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(UsageError, match="lm_head.weight differs from model.embed_tokens.weight"):
        take("--input", hf, "--output", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_the_architecture_to_write(llama, rng, tmp_path, capsys):
    """As it came; as told, also with fused products; as the first that fits where nothing says it."""
    model = replace(llama, biases="none", qk_norm=False, rope_factor=None)
    hf = write_model(tmp_path / "hf", model, rng, "mistral")
    take("--input", hf, "--output", tmp_path / "ckpt")
    export("--load", tmp_path / "ckpt", "--output", tmp_path / "came")
    export("--load", tmp_path / "ckpt", "--output", tmp_path / "told", "--model-type", "phi3")
    take("--input", tmp_path / "told", "--output", tmp_path / "ckpt2")
    export("--load", tmp_path / "ckpt2", "--output", tmp_path / "again", "--model-type", "mistral")
    folders = [tmp_path / name for name in ("came", "told", "again")]
    kinds = [json.loads((folder / "config.json").read_text())["model_type"] for folder in folders]
    assert kinds == ["mistral", "phi3", "mistral"]
    tensors, fused, again, theirs = (load_file(f / "model.safetensors") for f in (*folders, hf))
    assert tensors.keys() == theirs.keys() == again.keys() != fused.keys()
    assert all(torch.equal(tensors[n], theirs[n]) and torch.equal(again[n], theirs[n]) for n in theirs)

    with pytest.raises(UsageError, match="--model-type: Qwen3ForCausalLM cannot hold this model"):
        export("--load", tmp_path / "ckpt", "--output", tmp_path / "x", "--model-type", "qwen3")
    assert not (tmp_path / "x").exists()
    capsys.readouterr()
    plain = replace(model, hidden=model.heads * 8)
    assert to_hf._family(Namespace(model_type=None), plain, Namespace()).model_type == "llama"
    assert (
        "Written as llama; mistral, seed_oss, smollm3, phi3 would compute the same" in capsys.readouterr().out
    )


def test_pickled_weights_only(hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no safetensors files.*save_pretrained\(\)"):
        take("--input", hf, "--output", tmp_path / "ckpt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_was_cut(name, hf, tmp_path):
    """By a download that broke off."""
    whole = (hf / name).read_bytes() if (hf / name).exists() else b'{"weight_map": {}}'
    (hf / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=f"--input: .*{name} cannot be read"):
        take("--input", hf, "--output", tmp_path / "ckpt")


def test_a_damaged_checkpoint_becomes_no_model(hf, checkpoint, tmp_path):
    """A flipped bit in a weight is seen where there are checksums, as beside every checkpoint of a run."""
    folder = checkpoint / "release"
    checksums.write_manifest(folder)
    (file,) = folder.glob("*.distcp")
    data = bytearray(file.read_bytes())
    weight = load_file(hf / "model.safetensors")["model.norm.weight"]
    data[data.index(weight.view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match=f"is damaged: .*{file.name} has another checksum"):
        export("--load", checkpoint, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export("--load", checkpoint, "--output", tmp_path / "out", "--no-checksums")


def test_a_tracker_without_an_iteration(checkpoint, tmp_path):
    (checkpoint / megatron_store.TRACKER).write_text("")
    with pytest.raises(UsageError, match="holds no iteration. Name one with --ckpt-step"):
        export("--load", checkpoint, "--output", tmp_path / "out")


def test_checkpoints_that_are_none(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--load: .*nowhere is no folder"):
        export("--load", tmp_path / "nowhere", "--output", tmp_path / "out")
    with pytest.raises(UsageError, match="there is no .*iter_0000007; saved there: none"):
        export("--load", checkpoint, "--ckpt-step", 7, "--output", tmp_path / "out")
    (checkpoint / "release" / "metadata.json").unlink()
    with pytest.raises(UsageError, match="no whole checkpoint in the format torch_dist"):
        export("--load", checkpoint, "--output", tmp_path / "out")


def test_a_vocabulary_larger_than_the_model(llama, checkpoint, tmp_path):
    stored = megatron_store.CheckpointReader(checkpoint / "release").args
    assert stored.vocab_size == llama.vocabulary
    with pytest.raises(UsageError, match=f"{llama.vocabulary + 1} tokens"):
        export(
            "--load", checkpoint, "--output", tmp_path / "out", "--vocab-size", llama.vocabulary + 1
        )  # fmt: skip


def test_as_a_user_starts_them(hf, tmp_path):
    """A mistake is one paragraph, and status 2; what works prints the flags."""

    def run(module: str, *argv: object):
        return subprocess.run(
            [sys.executable, "-m", f"agoq_megatron.convert.{module}", *map(str, argv)],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    good = run("from_hf", "--input", hf, "--output", tmp_path / "ckpt")
    assert good.returncode == 0 and not good.stderr, good.stderr
    flags = (tmp_path / "ckpt" / "megatron_flags.txt").read_text().strip()
    assert flags in good.stdout and "--num-layers" in flags
    change_config(hf, model_type="gpt2")
    bad = run("from_hf", "--input", hf, "--output", tmp_path / "other")
    assert bad.returncode == 2 and not bad.stdout
    assert bad.stderr == (
        "from_hf: error: config.json: model_type is 'gpt2'; converted are 'llama', 'qwen2', 'qwen3', "
        "'mistral', 'seed_oss', 'smollm3', 'phi3', 'nemotron', 'qwen3_moe', 'mixtral'.\n"
    )

"""A model that cannot be loaded: one line that says what is wrong with which file or tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from jaguar.models.adapters import Adapter
from jaguar.models.errors import said
from jaguar.models.load import load
from jaguar.tasks.rows import hub_rows


def weights(change, name="model.safetensors"):
    def edit(folder):
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, {"format": "pt"})

    return edit


def config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def halved(name):
    def edit(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:90])

    return edit


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


NORM = "model.norm.weight"
MODELS = {
    "shape": (weights(lambda w: w.update({NORM: torch.zeros(7)})), r"norm.weight \(\(7,\) in the file, \(32,\) in"),
    "vocabulary": (
        config(vocab_size=410),
        r"of another model than its config.json: lm_head.weight \(\(400, 32\) in the",
    ),
    "size": (config(hidden_size=64), r"embed_tokens.weight \(\(400, 32\) in the file, \(400, 64\) in .* and \d+ more"),
    "tensor": (weights(lambda w: w.pop(NORM)), r"the weights of '.*' lack model.norm.weight"),
    "truncated": (halved("model.safetensors"), "could not load the model '.*': .*header"),
    "empty": (written("model.safetensors", ""), "header too small"),
    "no weights": (without("*.safetensors"), "no file named model.safetensors"),
    "type": (config(model_type="warp9", architectures=["Warp9ForCausalLM"]), "model type `warp9`"),
    "value": (config(hidden_size="many"), "'hidden_size': TypeError: .* expected int, got str"),
    "heads": (
        config(num_attention_heads=5),
        r"hidden size \(32\) is not a multiple of the number of attention heads \(5",
    ),
    "no config": (without("config.json"), "Should have a `model_type` key in its config.json"),
    "broken config": (written("config.json", '{"a": '), "is not a valid JSON file"),
    "no tokenizer": (without("tok*"), "could not load the tokenizer of the model"),
    "broken tokenizer": (
        written("tokenizer.json", '{"version": "1.0"}'),
        "could not load the tokenizer .*added_tokens",
    ),
}


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load(str(folder), use_cpu=True)
    assert "\n" not in str(error.value) and "above report" not in str(error.value)


@pytest.mark.parametrize("case", MODELS)
def test_what_is_wrong_with_a_model_is_said(tmp_path, case):
    edit, message = MODELS[case]
    edit(tiny.saved(tmp_path, "llama"))
    refused(tmp_path, message)


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FILE = "adapter_model.safetensors"
ADAPTERS = {
    "tensor": (weights(lambda w: w.pop(LORA), FILE), "could not load the adapter .*its weights lack .*q_proj.lora_A"),
    "shape": (weights(lambda w: w.update({LORA: w[LORA][:, :3].clone()}), FILE), r"size mismatch .*\[8, 3\]"),
    "truncated": (halved(FILE), "could not load the adapter .*header"),
    "no weights": (without("*.safetensors"), "there is no adapter_model.safetensors beside adapter_config.json"),
    "no base": (lambda folder: shutil.rmtree(folder.parent / "base"), r"names the model '.*' \(no folder /.*base\)"),
    "base unnamed": (written("adapter_config.json", '{"base_model_name_or_path": null}'), "it names no base model"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_is_wrong_with_an_adapter_is_said(tmp_path, case):
    base = tiny.saved(tmp_path / "base", "llama")
    Adapter("lora").applied(load(str(base), use_cpu=True).model, "causal").save_pretrained(tmp_path / "a")
    assert load(str(tmp_path / "a"), use_cpu=True)
    edit, message = ADAPTERS[case]
    edit(tmp_path / "a")
    refused(tmp_path / "a", message)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_an_adapter_of_virtual_tokens_is_whole(tmp_path, kind):
    base = tiny.saved(tmp_path / "base", "opt")
    Adapter(kind).applied(load(str(base), use_cpu=True).model, "causal", (5, 6)).save_pretrained(tmp_path / "a")
    assert load(str(tmp_path / "a"), use_cpu=True)
    weights(lambda w: w.clear() or w.update({"other": torch.zeros(1)}), FILE)(tmp_path / "a")
    refused(tmp_path / "a", "could not load the adapter")


def test_a_model_of_the_hub_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("someone/no-such-model", "could not load the model 'someone/no-such-model': .* check the name and the netw")


def test_a_broken_data_set_is_told_in_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"could not load the data set .*: \S+.*\(give a folder") as error:
        hub_rows(str(tmp_path), None, ("train",), {})
    assert "\n" not in str(error.value)


def test_errors_in_a_line():
    assert said(ValueError("a heading:\n\n\t the reason\n")) == "a heading: the reason"
    assert said(KeyError("name")) == "KeyError 'name'" and said(RuntimeError()) == "RuntimeError"
    assert len(said(ValueError("x" * 1000))) == 303

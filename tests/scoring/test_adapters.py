"""Adapters that do not fit are refused before anything runs; those that fit are found again and leave room."""

import json
import re

import pytest
import torch
import transformers

from helpers import architectures, tiny
from helpers.scorers import CLOSE, scorer_of
from helpers.tiny import recurrent, scaled
from jaguar.cli import commands as cli
from jaguar.cli.finetune.data import Data
from jaguar.models import load as models
from jaguar.models.adapters import Adapter, virtual_tokens
from jaguar.scoring import evaluate
from jaguar.tasks import SST2, Encoder
from jaguar.tasks.rows import Row

SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 128}


def causal(name, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(bos_token_id=None, eos_token_id=None, **(SMALL | more))
    return scaled(getattr(transformers, f"{name}ForCausalLM")(config), 4.0)


UNFIT = {  # models whose cache is not of keys and values of all heads
    "Qwen3_5": lambda: recurrent("Qwen3_5"),
    "Mamba": recurrent,
    "Falcon": lambda: causal("Falcon"),
    "RecurrentGemma": lambda: recurrent("RecurrentGemma"),
    "FalconH1": lambda: architectures.model_of("causal-falcon_h1"),
    "Lfm2Moe": lambda: architectures.model_of("causal-lfm2_moe"),
    "Rwkv": lambda: architectures.model_of("causal-rwkv"),
    "DeepseekV3": lambda: architectures.model_of("causal-deepseek_v3"),
}
RUNNING = r"of its \d layers \(.*\) keep a running state of what they read"
PART = {"Falcon": "its attention has a single head of keys and values", "Rwkv": "it keeps no keys and values"}
PART |= {"DeepseekV3": "the keys of its attention are of another size than the values"}


@pytest.mark.parametrize("name", UNFIT)
def test_a_prefix_that_a_model_cannot_hold_is_refused_in_one_line_that_says_which_part_cannot(name):
    part = PART.get(name, RUNNING)
    with pytest.raises(ValueError, match=rf"^--prefix_tuning does not fit a {name}ForCausalLM: .*{part}") as e:
        Adapter("prefix").applied(UNFIT[name](), "causal", (5, 6, 7))
    assert "\n" not in str(e.value) and re.search(r" \(PEFT: .*\) \(use --lora\)$", str(e.value))
    if name in ("Rwkv", "DeepseekV3"):  # whose configurations do not tell
        return
    with pytest.raises(ValueError, match=part):
        Adapter("prefix").check(UNFIT[name]().config)


@pytest.mark.parametrize("name", ["gpt_bigcode", "lfm2", "gemma3_text", "falcon new", "opt", "lora"])
def test_a_configuration_refuses_no_prefix_that_a_model_can_hold(name):
    if name == "lora":
        Adapter("lora").check(UNFIT["Qwen3_5"]().config)
    elif name == "falcon new":
        Adapter("prefix").check(transformers.FalconConfig(new_decoder_architecture=True))
    else:
        model = architectures.model_of(f"causal-{name}")
        Adapter("prefix").check(model.config)
        Adapter("prefix").applied(model, "causal", (5, 6, 7))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["opt", "llama", "mistral", "gpt2", "GPTBigCode"])
def test_a_prefix_begins_as_the_prompt_that_it_was_made_of(name, kind):
    model = causal(name, multi_query=True) if name == "GPTBigCode" else tiny.architecture(name)
    prompt = (7, 8, 9)
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([[7, 8, 9, 7, 8]]), ids], 1)).logits[:, 5:]
        adapted = Adapter(kind, num_virtual_tokens=5).applied(model, "causal", prompt)
        torch.testing.assert_close(adapted(input_ids=ids).logits[:, -4:], expected, **CLOSE)


def test_a_prefix_that_a_model_reads_otherwise_is_refused():
    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, *args, past_key_values=None, **kwargs):
            if past_key_values is not None and kwargs.get("use_cache") is False:
                past_key_values = None
            return super().forward(*args, past_key_values=past_key_values, **kwargs)

    model = tiny.architecture("llama")
    model.__class__ = Forgetful
    with pytest.raises(
        ValueError, match="does not fit a Forgetful: it reads 5 tokens otherwise when they come as a pr"
    ):
        Adapter("prefix").applied(model, "causal", (5, 6, 7))


@pytest.mark.parametrize("name", ["Falcon", "Qwen3_5"])
def test_the_command_line_says_so_in_one_line(tmp_path, capsys, name):
    UNFIT[name]().save_pretrained(tmp_path / "m")
    tiny.tokenizer_of("qwen").save_pretrained(tmp_path / "m")
    train, test = (tiny.write_csv(tmp_path / f"{i}.csv", tiny.sentences(40, i)) for i in (0, 1))
    files = ["--train_file", str(train), "--test_file", str(test), "--output_dir", str(tmp_path / "o"), "--use_cpu"]
    argv = ["finetune", "--model", str(tmp_path / "m"), "--template", "{text}:", "--max_steps", "2", "--prefix_tuning"]
    capsys.readouterr()
    error = tiny.refused(capsys, *argv, *files)
    assert f"--prefix_tuning does not fit a {name}ForCausalLM" in error
    train.unlink()  # it is said before rows are read
    (tmp_path / "m" / "model.safetensors").unlink()
    assert tiny.refused(capsys, *argv, *files) == error


# -- which modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("all-linear",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ((r".*\.(q|o)_proj",), {"q_proj", "o_proj"}),
        ((r".*layers\.0\.mlp\.up_proj",), {"up_proj"}),
        (("q_proj",), {"q_proj"}),
        (("self_attn.q_proj", "mlp.up_proj"), {"q_proj", "up_proj"}),
        ((), {"q_proj", "v_proj"}),
    ],
)
def test_modules_are_named_by_their_ends_by_a_pattern_or_all(given, found):
    model = Adapter("lora", target_modules=given).applied(tiny.architecture("llama"), "causal")
    named = {n.split(".lora_A")[0].rsplit(".", 1)[1] for n, p in model.named_parameters() if "lora_A" in n}
    assert named == found and all("lora" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((r".*q_proj", "v_proj"), r"give names, or a single pattern \('.\*q_proj' is one\)"),
        (("all-linear", "v_proj"), "give names, or a single pattern"),
        (("nothing",), "--lora_target_modules nothing: a LlamaForCausalLM has no module of this name"),
        (("q_(proj",), "--lora does not fit a LlamaForCausalLM: "),
        (("q_proj", "nothing"), "--lora_target_modules nothing: a LlamaForCausalLM has no module of this name"),
        (("q_proj", "proj"), "--lora_target_modules proj: "),
        (("attn.q_proj", "v_proj"), "--lora_target_modules attn.q_proj: "),
    ],
)
def test_modules_that_are_not_there_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Adapter("lora", target_modules=given).applied(tiny.architecture("llama"), "causal")


# -- the base of an adapter --------------------------------------------------------------------------------------------


def test_an_adapter_finds_its_base_from_any_folder(tmp_path, monkeypatch):
    tiny.saved(tmp_path / "models" / "base", "llama")
    monkeypatch.chdir(tmp_path)
    loaded = models.load("models/base", use_cpu=True)
    model = Adapter("lora").applied(loaded.model, "causal")
    model.save_pretrained(tmp_path / "runs" / "a")
    named = json.loads((tmp_path / "runs" / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "models" / "base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert models.load(str(tmp_path / "runs" / "a"), use_cpu=True).kind == "causal"


@pytest.mark.parametrize("base", ["models/base", "./models/base", "../../models/base", "base"])
def test_a_relative_base_is_looked_for_from_here_and_upwards(tmp_path, monkeypatch, base):
    tiny.saved(tmp_path / ("base" if base == "base" else "models/base"), "llama")
    adapter = tmp_path / "runs" / "a"
    Adapter("lora").applied(tiny.architecture("llama"), "causal").save_pretrained(adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for here in (tmp_path, elsewhere):
        monkeypatch.chdir(here)
        assert models.load(str(adapter), use_cpu=True).kind == "causal"
    (tmp_path / ("base" if base == "base" else "models")).rename(tmp_path / "gone")
    with pytest.raises(
        ValueError, match=r"adapter_config.json names the model '.*base' \(no folder /.* and \d+ more\)"
    ):
        models.load(str(adapter), use_cpu=True)


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_virtual_tokens_take_positions(tmp_path, name, kind):
    loaded = models.load(str(tiny.saved(tmp_path, name)), use_cpu=True)
    assert loaded.max_length == 128
    own = models.adapted(loaded, Adapter(kind, num_virtual_tokens=9).applied(loaded.model, "causal", (5, 6)))
    assert own.max_length == 119 and virtual_tokens(own.model) == 9
    data = Data(template="{text}")
    task = SST2()
    words = "film music story " * 20
    rows = [Row({"sentence": words[:n], "label": "1"}, f"row {n}") for n in (20, 300)]
    while len(loaded.tokenizer(task.question(rows[1], False).prompt).input_ids) < 125:
        rows[1] = Row({"sentence": rows[1]["sentence"] + " film", "label": "1"}, "row 1")
    with pytest.raises(
        ValueError, match=r"row .*: the prompt has 12\d tokens, the model takes 119; .* --max_length 119"
    ):
        data.examples(task, rows, own)
    cut = Encoder(loaded.tokenizer, "causal", own.max_length, 119)([task.question(row, False) for row in rows])
    assert cut[1].length > 110
    scores = evaluate(scorer_of(own.model, name), cut, 2)  # the longest row that fits is read
    assert scores.logits.isfinite().all()


def test_an_adapter_from_a_folder_leaves_as_much(tmp_path):
    base = tiny.saved(tmp_path / "base", "opt")
    loaded = models.load(str(base), use_cpu=True)
    Adapter("prompt", num_virtual_tokens=9).applied(loaded.model, "causal", (5, 6)).save_pretrained(tmp_path / "a")
    assert models.load(str(tmp_path / "a"), use_cpu=True).max_length == 119
    with pytest.raises(
        ValueError, match="_tokens 128 leaves nothing to the prompt: a OPTForCausalLM has 128 positions"
    ):
        Adapter("prompt", num_virtual_tokens=128).applied(tiny.architecture("opt"), "causal", (5, 6))


def test_lora_takes_no_positions(tmp_path):
    loaded = models.load(str(tiny.saved(tmp_path, "opt")), use_cpu=True)
    assert models.adapted(loaded, Adapter("lora").applied(loaded.model, "causal")).max_length == 128


def test_the_command_line_counts_virtual_tokens(tmp_path, capsys):
    tiny.saved(tmp_path / "m", "opt")
    rows = [*tiny.sentences(30, 0), ("film " * 120, "positive")]
    train, test = (tiny.write_csv(tmp_path / f"{i}.csv", rows) for i in (0, 1))
    files = ["--train_file", str(train), "--test_file", str(test), "--output_dir", str(tmp_path / "o"), "--use_cpu"]
    argv = ["finetune", "--model", str(tmp_path / "m"), "--template", "{text}:", "--max_steps", "1"]
    argv += ["--num_virtual_tokens", "20", "--per_device_train_batch_size", "4"]
    for flag in ("--prefix_tuning", "--prompt_tuning"):
        error = tiny.refused(capsys, *argv, *files, flag)
        assert "line 32: the prompt has" in error and "the model takes 108" in error
    assert cli.main([*argv, *files, "--prompt_tuning", "--max_length", "108"]) == 0


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_positions_without_an_end_are_no_limit(tmp_path, kind):  # XLNet's configuration says -1
    architectures.model_of(f"{kind}-xlnet").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert models.load(str(tmp_path), use_cpu=True).max_length == 64

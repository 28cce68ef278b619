"""Nothing that comes with a model, a checkpoint, an adapter, settings or rows is executed unless the user says so."""

import ast
import io
import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import transformers.dynamic_module_utils
from tiny import refused

from jaguar import cli

ROOT = Path(__file__).parents[1]
TRUST = "--trust_remote_code"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows to train on and to test with."""
    folder = tmp_path_factory.mktemp("security")
    for name, count, seed in (("train", 32, 1), ("test", 16, 2)):
        tiny.write_csv(folder / f"{name}.csv", tiny.sentences(count, seed))
    return folder


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that whatever is executed writes. Standard input says yes to everything, and must not be read."""
    stdin = io.StringIO("yes\n" * 99)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder of the code that it copied
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "canary"
    assert stdin.tell() == 0


def own_code(folder, canary):
    """A Llama with classes of its own, in two files that write the canary where they run."""
    tiny.causal_lm(folder)
    sign = f"open({str(canary)!r}, 'w').close()\n"
    (folder / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\n{sign}class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        f"from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n{sign}"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changed(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    return folder


def changed(path, **values):
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | values))


def evaluated(place, model, *more):
    return ["eval", "--model", str(model), "--test_file", str(place / "test.csv"), "--use_cpu", *more]


def tuned(place, model, out, *more):
    files = ["--train_file", str(place / "train.csv"), "--test_file", str(place / "test.csv"), "--output_dir", str(out)]
    options = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--tau", "1e-2"]
    return ["finetune", "--model", str(model), *files, *options, "--coordinates", "1.0", "--use_cpu", *more]


# -- code of its own ---------------------------------------------------------------------------------------------------

NOT_RUN = r"has code of its own \(configuration_own.py, modeling_own.py\), which was not run: read it, and give "


@pytest.mark.parametrize("command", ["eval", "finetune", "prefix tuning", "info", "config", "off"])
def test_code_of_a_model_is_not_run_unasked(place, tmp_path, canary, capsys, command):
    own = own_code(tmp_path / "own", canary)
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text(f"trust_remote_code: false\nmodel: {own}\n")
    line = {
        "eval": evaluated(place, own),
        "finetune": tuned(place, own, tmp_path / "out"),
        "prefix tuning": tuned(place, own, tmp_path / "out", "--prefix_tuning"),
        "info": ["info", "--model", str(own)],
        "config": ["finetune", "--config", str(tmp_path / "run.yaml"), *tuned(place, own, tmp_path / "out")[3:]],
        "off": evaluated(place, own, TRUST, "false"),
    }[command]
    assert re.search(rf"the model '{own}' {NOT_RUN}{TRUST} to run it", refused(capsys, *line))
    assert not canary.exists()


def test_code_of_a_model_runs_where_the_user_says_so(place, tmp_path, canary, capsys):
    own, out, adapter = own_code(tmp_path / "own", canary), tmp_path / "out", tmp_path / "adapter"
    assert cli.main(["info", "--model", str(own), TRUST]) == 0
    (tmp_path / "run.yaml").write_text("trust_remote_code: true\nsave_steps: 1\nsave_total_limit: 2\n")
    assert cli.main(tuned(place, own, out, "--config", str(tmp_path / "run.yaml"))) == 0
    assert canary.exists()
    more = [TRUST, "--resume_from_checkpoint", str(out / "checkpoint-1")]
    assert cli.main(tuned(place, own, tmp_path / "again", *more)) == 0  # how the flag is given decides nothing
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]
    assert cli.main(tuned(place, own, adapter, TRUST, "--lora", "--lora_target_modules", "q_proj")) == 0
    for folder in (out, adapter):  # the code is copied beside the weights; an adapter's base has it
        capsys.readouterr()
        canary.unlink()
        assert re.search(NOT_RUN, refused(capsys, *evaluated(place, folder)))
        assert not canary.exists()
        assert cli.main(evaluated(place, folder, TRUST)) == 0


@pytest.mark.parametrize("folder", ["jaguar", "bench", "demo"])
def test_trust_is_said_wherever_something_is_loaded(folder):
    """transformers asks on standard input where nothing is said, and torch.load has a default that was another once."""
    unsaid = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                called = ast.unparse(node.func)
                if called == "torch.load":
                    unsaid += [] if said.get("weights_only") == "True" else [f"{path}:{node.lineno}"]
                elif called.endswith((".from_pretrained", "load_dataset")) and "Peft" not in called:
                    unsaid += [] if "trust_remote_code" in said else [f"{path}:{node.lineno}"]
    assert not unsaid  # PEFT has no such argument

"""Nothing that comes with a model, a checkpoint, an adapter, settings or rows is executed unless the user says so."""

import ast
import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils

from helpers import payloads, tiny
from helpers.checkpoint_payloads import CHECKPOINTS, SLOW
from helpers.payloads import changed, filled
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.models.adapters import Adapter
from jaguar.models.load import load

ROOT = Path(__file__).parents[2]
TRUST = "--trust_remote_code"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows to train on and to test with, a model, and an adapter on it."""
    folder = tmp_path_factory.mktemp("security")
    tiny.causal_lm(folder / "lm")
    Adapter("lora").applied(load(str(folder / "lm"), use_cpu=True).model, "causal").save_pretrained(folder / "lora")
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
    model = load(str(own), use_cpu=True, trust_remote_code=True).model
    Adapter("lora", target_modules=("q_proj",)).applied(model, "causal").save_pretrained(adapter)
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


# -- files that would be executed --------------------------------------------------------------------------------------


TERMINAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey


def harmless(capsys, canary, line, message):
    """The command line is refused in one line that has the message (None: it runs); nothing is executed or changed."""
    canary.unlink(missing_ok=True)  # the pickle was made here
    before = contents(canary.parent)
    capsys.readouterr()
    if message is None:
        assert cli.main(line) == 0
    else:
        error = refused(capsys, *line)
        assert re.search(message, error) and not TERMINAL.search(error), error
    assert not TERMINAL.search("".join(capsys.readouterr()))
    assert not canary.exists() and contents(canary.parent) == before


def contents(folder):
    """Every file in a folder, but for the output of a run and what transformers keeps of code."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = {path.relative_to(folder): path.read_bytes() for path in files}
    return {path: held for path, held in kept.items() if path.parts[0] not in ("out", "modules")}


@pytest.mark.parametrize("name", payloads.PICKLES)
def test_the_pickles_are_not_blanks(canary, name):
    payloads.pickled("x.pt", name)(canary.parent, canary)
    canary.unlink(missing_ok=True)
    with contextlib.suppress(RuntimeError):  # of what comes out, which is none of torch's
        torch.load(canary.parent / "x.pt", weights_only=False)
    assert canary.exists()


@pytest.mark.filterwarnings("default")  # of PEFT and transformers, which would be errors of loading here
@pytest.mark.parametrize("name", payloads.MODELS)
def test_a_model(place, tmp_path, canary, capsys, name):
    build, message = payloads.MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(place / "lm", model)
    build(model, canary)
    harmless(capsys, canary, evaluated(place, model), message)


@pytest.mark.filterwarnings("default")  # of PEFT and transformers, which would be errors of loading here
@pytest.mark.parametrize("name", payloads.ADAPTERS)
def test_an_adapter(place, tmp_path, canary, capsys, name):
    build, message = payloads.ADAPTERS[name]
    for folder in ("lm", "lora"):
        shutil.copytree(place / folder, tmp_path / folder)
    build(tmp_path / "lora", canary)
    harmless(capsys, canary, evaluated(place, tmp_path / "lora"), message)


@pytest.fixture(scope="module")
def checkpoint(place):
    """The first of two of a run."""
    assert cli.main(tuned(place, place / "lm", place / "run", "--save_steps", "1", "--save_total_limit", "2")) == 0
    return place / "run" / "checkpoint-1"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CHECKPOINTS],
)
def test_a_checkpoint(place, checkpoint, tmp_path, canary, capsys, name):
    build, message = CHECKPOINTS[name]
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, folder)
    build(folder, canary)
    line = tuned(place, place / "lm", tmp_path / "out", "--resume_from_checkpoint", str(folder))
    harmless(capsys, canary, line, message)


BOMB = "lr_scheduler_kwargs:\n  a: &a {x: 1, y: 1, z: 1, u: 1, v: 1, w: 1, p: 1, q: 1}\n" + "".join(
    f"  {b}: &{b} {{{', '.join(f'{key}: *{a}' for key in 'xyzuvwpq')}}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=False)
)
SETTINGS = {  # --config
    "yaml: python/object/apply": ('seed: !!python/object/apply:os.system ["touch <canary>"]\n', "seed"),
    "yaml: python/object/new": ("seed: !!python/object/new:os.system [touch <canary>]\n", "seed"),
    "yaml: python/name": ("seed: !!python/name:os.system ''\n", "seed"),
    "yaml: python/module": ("seed: !!python/module:own ''\n", "seed"),
    "yaml: in a mapping": (
        "lr_scheduler_kwargs: {a: !!python/object/apply:os.system ['touch <canary>']}\n",
        "lr_scheduler_kwargs|lr_scheduler_type",
    ),
    "yaml: a key": ("? !!python/object/apply:os.system ['touch <canary>']\n: 1\n", "the name of a setting is a word"),
    "yaml: a bomb of aliases": (BOMB, "stands for more than a word"),
    "yaml: an alias of itself": ("lr_scheduler_kwargs: &a {a: *a}\n", "stands for more than a word"),
    "yaml: a terminal's": ('"\\x1b]52;c;eA==\\a": 1\n', "unrecognized arguments"),
    "yaml: merged": ("a: &a {seed: !!python/name:os.system ''}\n<<: *a\n", "stands for more than a word"),
    "yaml: deep": ("seed: " + "[" * 9000 + "]" * 9000, "nested too deeply"),
    "yaml: options of the optimizer": (
        "zo_options: {betas: \"__import__('os').system('touch <canary>')\"}\n",
        "zo_options",
    ),
    "json: deep": ('{"seed": ' + "[" * 90000 + "]" * 90000 + "}", "nested too deeply"),
    "json: a class": ('{"seed": {"py/object": "os.system", "__class__": "os.system"}}', "seed"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(place, tmp_path, canary, capsys, name):
    content, message = SETTINGS[name]
    (tmp_path / "run.yaml").write_text(filled(content, canary))
    line = tuned(place, place / "lm", tmp_path / "out", "--config", str(tmp_path / "run.yaml"))
    harmless(capsys, canary, line, message)


FIELDS = "{text.__class__.__mro__} {text!r:>9} {0.__class__} {x.__init__.__globals__} {text}"
TASKS = {  # jaguar_task.json
    "task: template": ({"template": FIELDS}, None),
    "task: labels": ({"labels": [{"__class__": "os.system"}, ["a"]]}, "jaguar_task.json is damaged"),
    "task: labels of numbers": ({"labels": [0, 1]}, "jaguar_task.json is damaged"),
    "task: name": ({"task": "__import__('os')"}, "jaguar_task.json is damaged"),
    "task: field": ({"__class__": "os.system"}, "jaguar_task.json is damaged"),
    "task: template of a number": ({"template": 5}, "jaguar_task.json is damaged"),
    "task: max_length": ({"max_length": "<code>"}, "jaguar_task.json is damaged"),
    "task: max_length below 0": ({"max_length": -5}, "jaguar_task.json is damaged"),
    "task: verbalizers": ({"verbalizers": [None, {}]}, "jaguar_task.json is damaged"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task(place, tmp_path, canary, capsys, name):
    values, message = TASKS[name]
    model = tmp_path / "model"
    shutil.copytree(place / "lm", model)
    task = {"task": "text-classification", "template": "{text}:", "labels": ["negative", "positive"]}
    task |= {"verbalizers": [" negative", " positive"], "max_length": None} | values
    (model / "jaguar_task.json").write_text(filled(json.dumps(task), canary))
    harmless(capsys, canary, evaluated(place, model), message)


WORDS = {  # of the command line
    "--template": (["--template", FIELDS], None),
    "--template: jinja": (["--template", payloads.JINJA + "{text}"], None),
    "--verbalizers": (["--verbalizers", "{text.__class__}", " good", "--template", "{text}"], None),
    "--choice_columns": (["--task", "multiple-choice", "--choice_columns", "{text.__class__}", "__class__"], "column"),
    "--text_column": (["--text_column", "__class__"], "no column '__class__'"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_the_command_line(place, tmp_path, canary, capsys, name):
    words, message = WORDS[name]
    harmless(capsys, canary, evaluated(place, place / "lm", *[filled(word, canary) for word in words]), message)


ROWS = {
    "rows: formulas": ("test.csv", "text,label\n\"=cmd|'/c touch <canary>'!A0\",negative\n+good,positive\n", None),
    "rows: attributes": ("test.csv", "text,label\n{text.__class__},negative\n{{ 7*7 }},positive\n", None),
    "rows: objects": (
        "test.jsonl",
        '{"text": "a", "label": "negative", "__class__": {"py/object": "os.system"}}\n'
        '{"text": "b", "label": "positive"}\n',
        None,
    ),
    "rows: an object as text": ("test.jsonl", '{"text": {"__reduce__": "os.system"}, "label": "negative"}\n', "a dict"),
    "rows: a terminal's": ("test.csv", "text,label\na,\x1b]52;c;eA==\x07\n", "the data has one label only"),
    "rows: deep": ("test.jsonl", '{"text": ' + "[" * 90000 + "]" * 90000 + "}\n", "not JSON"),
    "rows: a pickle": ("test.pkl", "<code>", "must end in .csv or .jsonl"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(place, tmp_path, canary, capsys, name):
    file, content, message = ROWS[name]
    (tmp_path / file).write_text(filled(content, canary))
    line = evaluated(place, place / "lm", "--verbalizers", " negative", " positive")
    line[line.index("--test_file") + 1] = str(tmp_path / file)
    harmless(capsys, canary, line, message)


def test_labels_do_nothing_to_a_terminal(place, tmp_path, capsys):
    rows = [(text, {"negative": "\x1b[2J", "positive": "\x9b2J"}[label]) for text, label in tiny.sentences(16, seed=1)]
    tiny.write_csv(tmp_path / "rows.csv", rows)
    line = tuned(place, place / "lm", tmp_path / "out")
    for flag in ("--train_file", "--test_file"):
        line[line.index(flag) + 1] = str(tmp_path / "rows.csv")
    assert cli.main([*line, "--verbalizers", " negative", " positive"]) == 0
    printed = capsys.readouterr().out
    assert "labels \ufffd[2J, \ufffd2J" in printed and not TERMINAL.search(printed)


SPLITS = {f"{name}.csv": "text,label\na,negative\nb,positive\n" for name in ("train", "validation")}
DATA_SETS = {
    "a script": ({"rows.py": "<code>"}, "scripts are no longer supported"),
    "a script beside rows": ({"rows.py": "<code>"} | SPLITS, "scripts are no longer supported"),
    "a card": (
        {"README.md": "---\nconfigs: !!python/object/apply:os.system ['touch <canary>']\n---\n"} | SPLITS,
        "tag",
    ),
    "features": (
        {"README.md": "---\ndataset_info:\n  features:\n  - {name: text, dtype: os.system}\n---\n"} | SPLITS,
        "Os",
    ),
    "a pickle": ({"validation.pkl": "<pickle>"}, "No .supported. data files"),
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set(place, tmp_path, canary, capsys, name):
    files, message = DATA_SETS[name]
    rows = tmp_path / "rows"
    rows.mkdir()
    for file, content in files.items():
        (rows / file).write_text(filled(content, canary))
        if content == "<pickle>":
            payloads.pickled(file, "exec")(rows, canary)
    harmless(capsys, canary, ["eval", "--model", str(place / "lm"), "--dataset", str(rows), "--use_cpu"], message)

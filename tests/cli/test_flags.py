"""Every flag with legal, zero, negative and wrongly typed values, in both spellings: taken, or one line and code 2."""

from __future__ import annotations

import inspect
import re
import signal
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments

import jaguar
from helpers import tiny
from helpers.flags import Reached, line
from helpers.flags import settled as settled
from helpers.tiny import refused
from jaguar.backends.availability import NAMES
from jaguar.cli import flags as flag_groups
from jaguar.cli import main as cli
from jaguar.cli.finetune.data import Data
from jaguar.cli.finetune.run import Run
from jaguar.method import schemes
from jaguar.method.estimators import ESTIMATORS
from jaguar.optimizers.names import METHODS
from jaguar.trainer import options as choices
from jaguar.trainer.arguments import OPTIONS
from jaguar.trainer.options import OptimizerOptions

# Kind of a flag -> what is legal, and what is not.
KINDS = {
    "positive": (["3", "1"], ["0", "-1", "x", "nan", "1.5", "1_0", ""]),
    "natural": (["3", "0"], ["-1", "x", "nan", "1.5", "0x10", ""]),
    "switch": ([None, "true", "False", "yes", "off", "0"], ["-1", "2", "0.5", "x"]),
    "length": (["0.25", "0", "1e-4", ".5"], ["-1", "x", "nan", "inf", "-inf", ""]),
    "above 0": (["0.25"], ["0", "-1", "x", "nan", "inf", ""]),
    "share": (["0.25", "0"], ["1", "-1", "x", "nan", "inf"]),
    "any number": (["0.25", "0", "-1"], ["x", "nan", "inf", ""]),
    "object": (["{}"], ["0", "-1", "x", "[1]", "{", "null"]),
    "text": (["word", "0", "-1"], []),
}
OWN = {
    "positive": "max_length num_eval per_device_eval_batch_size num_train lora_r lora_alpha max_steps n_directions "
    "num_virtual_tokens per_device_train_batch_size gradient_accumulation_steps logging_steps ns_steps ns_period",
    "natural": "train_set_seed num_dev eval_steps save_steps seed",
    "switch": "load_in_4bit use_cpu trust_remote_code overwrite_output_dir no_preset lora prefix_tuning prompt_tuning "
    "released",
    "length": "learning_rate weight_decay vector_lr",
    "above 0": "tau rho_clip",
    "share": "beta momentum",
    "object": "zo_options",
    "text": "model test_file dataset text_column label_column choice_columns template verbalizers train_file dev_file "
    "output_dir resume_from_checkpoint lora_target_modules",
}
OF_TRAINER = {
    "positive": "eval_accumulation_steps torch_empty_cache_steps save_total_limit ddp_timeout ddp_bucket_cap_mb "
    "dataloader_prefetch_factor",
    "natural": "data_seed dataloader_num_workers",
    "switch": "average_tokens_across_devices bf16 bf16_full_eval fp16_full_eval activation_checkpointing "
    "gradient_checkpointing use_cache auto_find_batch_size logging_first_step log_on_each_node logging_nan_inf_filter "
    "prediction_loss_only eval_on_start eval_use_gather_object save_only_model save_on_each_node enable_jit_checkpoint "
    "hub_private_repo hub_always_push load_best_model_at_end greater_is_better ignore_data_skip full_determinism "
    "restore_callback_states_from_checkpoint dataloader_drop_last dataloader_pin_memory dataloader_in_order "
    "dataloader_persistent_workers remove_unused_columns ddp_find_unused_parameters ddp_broadcast_buffers "
    "ddp_static_graph skip_memory_metrics do_train do_eval do_predict disable_tqdm include_num_input_tokens_seen",
    "length": "eval_delay",
    "above 0": "num_train_epochs",
    "any number": "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha",
    "object": "activation_checkpointing_kwargs gradient_checkpointing_kwargs accelerator_config lr_scheduler_kwargs",
    "text": "optim_args optim_target_modules run_name project trackio_space_id trackio_bucket_id hub_token "
    "hub_model_id trackio_static_space_id hub_revision label_names length_column_name fsdp_config include_for_metrics",
}
KIND = {name: kind for table in (OWN, OF_TRAINER) for kind, names in table.items() for name in names.split()}
# One of a few words.
WORDS = {
    "dtype": "float32",
    "task": "copa",
    "train": "norm",
    "method": "jaguar-muon",
    "lr_scheduler_type": "cosine",
    "logging_strategy": "epoch",
    "log_level": "error",
    "log_level_replica": "error",
    "report_to": "none",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "hub_strategy": "end",
    "metric_for_best_model": "accuracy",
    "dataloader_multiprocessing_context": "spawn",
    "train_sampling_strategy": "batch_rebalance",
    "debug": "underflow_overflow",
    "ddp_backend": "gloo",
    **{name: words[0] for name, words in choices.OPTIONS.items()},
}
# Refused whatever is asked for; "false" is not asking.
NEVER = {
    "optim": "sgd",
    "fp16": "true",
    "fsdp": "full_shard",
    "deepspeed": "{}",
    "parallelism_config": "{}",
    "use_liger_kernel": "true",
    "liger_kernel_config": "{}",
    "push_to_hub": "true",
    "batch_eval_metrics": "true",
    "torch_compile": "true",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "eval_do_concat_batches": "false",
    "tf32": "true",  # here: without a GPU
}
APART = {"config", "num_k_shot", "local_rank", "warmup_steps", "coordinates"}  # see below
AS_IT_IS = {*(("no_preset", value) for value in KINDS["switch"][0]), ("train_set_seed", "0")}
# true or false must be said.
NO_SHORT_FORM = {"hub_private_repo", "greater_is_better", "disable_tqdm", "ddp_find_unused_parameters"}
NO_SHORT_FORM |= {"ddp_broadcast_buffers", "ddp_static_graph"}
# What else must be given, and what must be left out.
WITH = {
    **{key: ["--lora"] for key in ("lora_r", "lora_alpha", "lora_target_modules")},
    "num_virtual_tokens": ["--prefix_tuning"],
    "bf16": ["--use_cpu"],  # a GPU that has it, or a CPU by choice
    **{key: ["--method", "zo-sgd"] for key in ("momentum", "distribution", "restore")},
    **{
        key: ["--method", "jaguar-muon"]
        for key in ("ns_steps", "ns_period", "ns_coefficients", "ns_dtype", "adjust_lr", "vector_lr")
    },
    **{
        key: ["--dataloader_num_workers", "1"]
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
    },
    **{key: ["--eval_strategy", "epoch"] for key in ("eval_delay", "prediction_loss_only")},
    **{key: ["--eval_steps", "2"] for key in ("metric_for_best_model", "greater_is_better")},
    "load_best_model_at_end": ["--eval_steps", "2", "--num_dev", "4"],
}


OURS = {names[0][2:] for _, _, flags in flag_groups.FINETUNE for names, _ in flags}
FIELDS = {f.name for f in fields(TrainingArguments)} - {"optim_zo"}


def test_every_flag_is_in_a_table():
    tables = [KIND.keys(), WORDS.keys(), NEVER.keys(), APART]
    assert (OURS | FIELDS).issubset(set().union(*tables))
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("name", sorted(KIND.keys() | WORDS.keys()))
def test_a_flag_is_taken_or_refused_in_one_line(name, settled, capsys):
    more, dashed = WITH.get(name, []), name.replace("_", "-")
    taken, wrong = ([WORDS[name]], ["0", "-1", "x", ""]) if name in WORDS else KINDS[KIND[name]]
    if name in NO_SHORT_FORM:
        taken = [value for value in taken if value is not None]
    plain = settled(line("no_preset", None, more))  # which changes nothing here
    for value in taken:
        run = settled(line(name, value, more))
        assert run == settled(line(dashed, value, more))
        off = name in OURS and KIND.get(name) == "switch" and value in ("False", "off", "0")
        assert (run == plain) == (off or (name, value) in AS_IT_IS)
    for value in wrong:
        for flag in (name, dashed):
            error = refused(capsys, *line(flag, value, more))
            assert name in error or (name, "lr=-1.0") == ("learning_rate", error.split()[3])


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_be_had_is_refused(name, settled, capsys):
    for flag in (name, name.replace("_", "-")):
        assert name in refused(capsys, *line(flag, NEVER[name]))
        assert "given" not in refused(capsys, *line(flag, "x"))


@pytest.mark.parametrize(
    ("name", "taken", "wrong"),
    [
        ("coordinates", ["3", "1.0", "0.01"], ["0", "-1", "1.5", "x", "nan", "inf", "0.7"]),
        ("warmup_steps", ["0", "3", "0.1"], ["-1", "1.5", "x", "nan"]),
        ("local_rank", ["0", "-1", "3"], ["-2", "x", "0.5"]),
        ("num_k_shot", ["3"], ["0", "-1", "x"]),
        ("learning_rate", ["1_0", "+1E-4"], ["1,0", "1e", "0x1p3", "-inf"]),
        ("seed", ["4294967295"], ["4294967296", "٣", "1e3", "99999999999999999999999"]),
        ("save_total_limit", ["2147483647"], ["2147483648"]),
        ("lr_scheduler_kwargs", ['{"num_cycles": 2}'], ['{"cycles": 2}', "x", '{"num_cycles": 2']),
        (
            "accelerator_config",
            ['{"even_batches": false}'],
            ['{"no_such": 1}', "no/such.json", "[]", '{"even_batches": "no"}', '{"split_batches": 0}'],
        ),
        ("include_num_input_tokens_seen", ["all", "non_padding", "no"], ["some"]),
        ("report_to", ["none"], ["x", "tensorboards"]),
        ("config", [], ["no/such.yaml", "/dev/null", ".", ""]),
        ("lora_target_modules", ["q_proj"], [None]),
        ("no_such_flag", [], ["1", None]),
        ("per_device_train_batch_siz", [], ["8"]),
        ("max_step", [], ["8"]),
    ],
)
def test_values_at_the_edge(name, taken, wrong, settled, capsys):
    more = {"lr_scheduler_kwargs": ["--lr_scheduler_type", "cosine_with_restarts"]}.get(name, WITH.get(name, []))
    for flag in (name, name.replace("_", "-")):
        for value in taken:
            settled(line(flag, value, more))
        for value in wrong:
            assert name.split("_")[0] in refused(capsys, *line(flag, value, more)).lower()


@pytest.mark.parametrize("value", ["-1e-4", "-1E+3", "-.5", "-1."])
def test_a_negative_number_is_no_flag(value, settled, capsys):
    said = f"lr={float(value)} of the optimizer must be at least 0"
    assert (
        said in refused(capsys, *line("learning_rate", value)) == refused(capsys, *line(f"learning_rate={value}", None))
    )


PATHS = "test_file dataset text_column label_column choice_columns template train_file dev_file output_dir "
PATHS += "resume_from_checkpoint lora_target_modules config model"


@pytest.mark.parametrize("name", PATHS.split())
def test_an_empty_name_is_refused(name, settled, capsys):  # --resume_from_checkpoint "$UNSET" would begin anew
    for value in ("", " "):
        error = refused(capsys, *line(name, value, WITH.get(name, [])))
        assert f"{value!r} is empty; leave the flag out for its default" in error and f"--{name}" in error


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learing_rate", "--learning_rate"),
        ("--num-train-epoch=1", "--num_train_epochs"),
        ("--max_step", "--max_steps"),
        ("--metod", "--method"),
        ("--grad_acumulation", None),
        ("-seed", None),
    ],
)
def test_a_flag_that_is_spelled_wrongly_is_told_the_one_that_was_meant(word, meant, settled, capsys):
    error = refused(capsys, *line("logging_steps", "2"), word, "1")
    assert (f"; did you mean {meant}?" in error) if meant else ("did you mean" not in error)


def test_so_it_is_of_eval(scored, capsys):
    assert "; did you mean --test_file?" in refused(capsys, "eval", "--model", "lm", "--testfile", "x")
    assert "did you mean" not in refused(capsys, "eval", "--model", "lm", "--learning_rate", "1")


def test_values_arrive_as_they_were_given(settled):
    run = settled(line("warmup-steps", "0.25", ["--optim-zo", "jaguar-muon", "--lora", "yes", "--lora-r=4"]))
    assert run.arguments == {"max_steps": 4, "warmup_steps": 0.25, "optim_zo": "jaguar-muon"}
    assert run.adapter.kind == "lora" and run.adapter.r == 4
    run = settled(line("verbalizers", " no-o", ["--template", "--a-b: {text}".removeprefix("--")]))
    assert run.data.verbalizers == (" no-o",) and run.data.template == "a-b: {text}"
    assert settled(line("lora", "false")) == settled(line("no_preset", None))


@pytest.mark.parametrize(
    "words",
    [
        ("--max_steps", "6", "--max-steps", "7"),
        ("--method", "zo-sgd", "--optim_zo", "jaguar-muon"),
        ("--optim-zo=zo-sgd", "--method", "zo-signsgd"),
        ("--seed", "1", "--seed", "2"),
        ("--lora", "--lora", "false"),
        ("--verbalizers", "a", "b", "--verbalizers", "a"),
        ("--data-seed", "1", "--data_seed=2"),
        ("--no_dataloader_pin_memory", "--dataloader-pin-memory", "true"),
    ],
    ids=" ".join,
)
def test_two_values_of_one_flag_are_refused(words, settled, capsys):
    assert "give one of them" in refused(capsys, *line("logging_steps", "2"), *words)


@pytest.mark.parametrize(
    "words",
    [
        ("--max_steps", "6", "--max-steps", "6"),
        ("--method", "zo-sgd", "--optim_zo=zo-sgd"),
        ("--lora", "--lora", "true"),
        ("--no_dataloader_pin_memory", "--no-dataloader-pin-memory"),
    ],
    ids=" ".join,
)
def test_the_same_value_twice_is_one(words, settled):
    base = ["finetune", "--model", "lm", "--output_dir", "out", "--use_cpu"]
    half = len(words) // 2 if "=" not in "".join(words) else 2
    half = 1 if words[0] == "--lora" else half
    assert settled([*base, *words]) == settled([*base, *words[:half]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_steps", "2", "--eval_strategy", "epoch"], "--eval_steps and --eval_strategy epoch"),
        (["--save_steps", "2", "--save_strategy", "no"], "--save_steps and --save_strategy no"),
        (["--max_steps", "2", "--num_train_epochs", "1"], "--max_steps and --num_train_epochs"),
        (["--dataloader_drop_last", "--eval_steps", "2"], "--dataloader_drop_last would drop rows"),
        (["--lora", "--prefix_tuning"], "--lora and --prefix_tuning"),
        (["--dataloader_prefetch_factor", "2"], "dataloader_prefetch_factor"),
        (["--dataloader_persistent_workers"], "dataloader_num_workers"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps"),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs dev rows"),
        (["--eval_steps", "2", "--prediction_loss_only", "--metric_for_best_model", "accuracy"], "leaves no accuracy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_contradict_each_other_are_refused(words, message, settled, capsys):
    assert message in refused(capsys, "finetune", "--model", "lm", "--output_dir", "out", "--use_cpu", *words)


# -- what does nothing says so -----------------------------------------------------------------------------------------

IDLE = {
    "max_grad_norm": "1",
    "neftune_noise_alpha": "0",
    "optim_args": "x",
    "adam_beta1": "0.9",
    "adam_epsilon": "0",
    "label_smoothing_factor": "0.1",
    "bf16_full_eval": "true",
    "do_train": "true",
    "hub_model_id": "x",
    "torch_empty_cache_steps": "1",
    "ddp_static_graph": "true",
    "local_rank": "0",
    "use_cache": "true",
    "activation_checkpointing": "true",
    "fsdp_config": "x",
    "run_name": "x",
    "metric_for_best_model": "loss",
    "include_for_metrics": "loss",
    "ddp_backend": "gloo",
    "label_names": "labels",
}


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_says_so(name):
    run = Run("lm", "out", arguments={name: IDLE[name], "use_cpu": True})
    with pytest.warns(UserWarning, match=rf"^--{name} has no effect: .+") as said:
        args = run.trainer_arguments()
    assert len(said) == 1
    default = TrainingArguments.__dataclass_fields__[name].default
    assert getattr(args, name) in (default, False, []) or getattr(args, name) == Run("lm", "out").trainer_arguments()


def test_the_baseline_with_gradients_clips_them():
    run = Run("lm", "out", arguments={"optim_zo": "fo-sgd", "max_grad_norm": 0.5, "use_cpu": True})
    assert run.trainer_arguments().max_grad_norm == 0.5


# -- to the end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    tiny.causal_lm(folder / "lm")
    tiny.write_csv(folder / "train.csv", tiny.sentences(24, seed=1))
    tiny.write_csv(folder / "test.csv", tiny.sentences(8, seed=2))
    return folder


@pytest.fixture
def as_before():
    """What some flags change in the whole process."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    transformers.logging.set_verbosity_warning()


def _runs(folder, out, words):
    files = ["--train_file", str(folder / "train.csv"), "--test_file", str(folder / "test.csv")]
    line = ["finetune", "--model", str(folder / "lm"), *files, "--output_dir", str(out), "--use_cpu"]
    line += [] if "--num_train_epochs" in words else ["--max_steps", "2"]
    line += ["--per_device_train_batch_size", "4", "--template", "{text}:", "--verbalizers", " negative", " positive"]
    return cli.main(tiny.later_wins([*line, *words]))


# What means something else in a run with these rows: names of files, columns and modules.
NAMES_OF_THINGS = {*OWN["text"].split(), "task", "load_in_4bit", "max_length", "num_train"}
RUNNING = sorted((KIND.keys() | WORDS.keys()) - NAMES_OF_THINGS)
QUICK = {"save_total_limit", "eval_strategy", "dataloader_num_workers", "bf16", "lr_scheduler_type", "signs"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNNING]
)
def test_what_is_taken_runs_to_the_end(name, folder, tmp_path, as_before):
    taken = [WORDS[name]] if name in WORDS else KINDS[KIND[name]][0]
    value = next(value for value in taken if value is not None)
    assert _runs(folder, tmp_path / "out", [*WITH.get(name, []), f"--{name}", value]) == 0


# -- eval and info -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """The data that `jaguar eval` would read."""

    def test_rows(self, model):
        raise Reached(self, model)

    monkeypatch.setattr(Data, "test_rows", test_rows)

    def parsed(words):
        with pytest.raises(Reached) as reached:
            cli.main(words)
        return reached.value.args

    return parsed


OF_EVAL = [names[0][2:] for _, _, flags in flag_groups.EVAL for names, _ in flags]


@pytest.mark.parametrize("name", OF_EVAL)
def test_a_flag_of_eval_is_taken_or_refused_in_one_line(name, scored, capsys):
    base = ["eval", *([] if name == "model" else ["--model", "lm"])]
    taken, wrong = ([WORDS[name]], ["0", "-1", "x", ""]) if name in WORDS else KINDS[KIND[name]]
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        for value in taken:
            assert scored([*base, flag, *([] if value is None else [value])])
        for value in wrong:
            assert name in refused(capsys, *base, flag, value)


@pytest.mark.parametrize("command", ["eval", "info"])
def test_flags_of_training_are_none_of_eval_and_info(command, scored, capsys):
    base = [command, "--model", "lm"]
    of_it = {names[0][2:] for _, _, flags in getattr(flag_groups, command.upper()) for names, _ in flags}
    for name in sorted((OURS | FIELDS) - of_it):
        assert "unrecognized arguments: --" in refused(capsys, *base, f"--{name.replace('_', '-')}", "1")


# -- help --------------------------------------------------------------------------------------------------------------


def _help(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def _text(name):
    return next(o["help"] for _, _, flags in flag_groups.FINETUNE for names, o in flags if f"--{name}" in names)


def test_help_shows_the_defaults_of_the_optimizers():
    said = {"lr": "learning_rate"}
    for cls in (getattr(jaguar, row.cls) for row in METHODS.values() if row.cls):
        for name, parameter in inspect.signature(cls).parameters.items():
            has_flag = said.get(name, name) in OURS - {"seed", "released"}
            if not has_flag or parameter.default is None:
                continue
            default = str(parameter.default).removeprefix("torch.")
            found = re.search(r"default: ([^)]*)", _text(said.get(name, name)))
            numbers = [float(word) for word in re.findall(r"\d[\d.]*(?:e-\d+)?", found[1])]
            assert default in found[1].split() or float(default) in numbers, (cls, name)


def test_the_flags_of_the_optimizers_are_the_fields_of_the_arguments():
    fields_of_it = {action.dest: action for action in HfArgumentParser(jaguar.ZOTrainingArguments)._actions}
    for name in OptimizerOptions.__dataclass_fields__:
        assert name in OURS | {"optim_zo"} and _text(name).startswith(fields_of_it[name].help)
    assert {"optim_zo", "zo_options", *OPTIONS} <= OptimizerOptions.__dataclass_fields__.keys()


def test_help_shows_the_defaults_of_the_command(capsys):
    for name, value in flag_groups.DEFAULTS.items():
        assert f"(default: {value})" in _text(name)
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help_all"])
    _, _, others = capsys.readouterr().out.partition("Every other flag of transformers.TrainingArguments, with")
    parts = re.split(r"^  --", others, flags=re.MULTILINE)[1:]
    said = {part.split()[0]: " ".join(part.split()) for part in parts}
    assert said.keys() == FIELDS - OURS
    for name, value in flag_groups.OF_THE_RUN.items():
        assert name in OURS or f"(default: {value})" in said[name] or (value is None and "default" not in said[name])
    for name in ("max_grad_norm", "adam_beta1", "do_train", "torch_empty_cache_steps"):
        assert "Does nothing here: " in said[name]
    assert "Refused: --optim is of Trainer's own" in said["optim"]


def test_choices_are_those_of_the_library(capsys):
    assert choices.OPTIONS["backend"] == NAMES and choices.OPTIONS["estimator"] == tuple(ESTIMATORS)
    assert choices.OPTIONS["ns_coefficients"] == tuple(schemes.SCHEMES)
    assert {getattr(torch, name) for name in choices.OPTIONS["ns_dtype"]} == set(schemes.DTYPES)
    text = _help(capsys, "finetune", "--help")
    for words in choices.OPTIONS.values():
        assert f"{{{','.join(words)}}}" in text.replace(" ", "")
    with warnings.catch_warnings(action="ignore"):
        for name in ("layout", "signs", "update", "adjust_lr", "distribution", "restore", "momentum_dtype", "rounding"):
            cls = jaguar.ZOSGD if name in ("distribution", "restore") else jaguar.JaguarMuon
            known = inspect.signature(cls).parameters
            assert name in known
            for word in (*choices.OPTIONS[name], "x"):
                value = getattr(torch, word, torch.int8) if name == "momentum_dtype" else word
                group = {"params": [torch.nn.Parameter(torch.zeros(16, 16))]} | (
                    {"ns": True} if "beta" in known else {}
                )
                more = {"coordinates": 0.25} if name == "layout" else {}
                if word == "x":
                    with pytest.raises(ValueError, match=name):
                        cls([group], **{name: value}, **more)
                else:
                    cls([group], **{name: value}, **more)

"""Every flag with legal, zero, negative and wrongly typed values, in both spellings: taken, or one line and code 2."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from transformers import TrainingArguments

from helpers.flag_tables import FIELDS, KIND, KINDS, OURS, WITH, WORDS
from helpers.flags import Reached, line
from helpers.flags import settled as settled
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli import flags as flag_groups
from jaguar.cli.finetune.data import Data
from jaguar.cli.finetune.run import Run

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
NO_SHORT_FORM |= {"ddp_broadcast_buffers", "ddp_static_graph", "journal"}


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
        # A switch that is off is not given; the journal is on where nothing is said.
        off = name in OURS - {"journal"} and KIND.get(name) == "switch" and value in ("False", "off", "0")
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


def test_a_step_of_shared_directions_is_not_from_the_losses_of_rows():
    for shared, wanted in ((False, "auto"), (True, None)):
        run = Run("lm", "out", arguments={"use_cpu": True, "direction_parallel": shared})
        with pytest.warns(UserWarning, match="no effect: there is one process") if shared else nullcontext():
            assert run.trainer_arguments().learning_rate == wanted


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

"""The table of names: a row is a public class, a method of the command line, and a text that is true of it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pytest
import torch
from transformers import BertForSequenceClassification

import jaguar
import jaguar.optimizers
from helpers import tiny
from helpers.flags import line, settled  # noqa: F401
from helpers.tiny import refused
from jaguar.cli import commands as cli
from jaguar.cli import values
from jaguar.cli.finetune.dry_run import check
from jaguar.cli.finetune.run import Run, compare, optimizer_settings
from jaguar.method.method import Method
from jaguar.optimizers.common import Common, keywords
from jaguar.optimizers.names import FIRST_ORDER, HOME, METHOD, METHODS, Named
from jaguar.trainer.arguments import OPTIONS, ZOTrainingArguments
from jaguar.trainer.literals import keyword_arguments

ROOT = Path(jaguar.__file__).parents[1]
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
ROWS = [pytest.param(name, row, id=name) for name, row in METHODS.items()]
CLASSES = [(name, row) for name, row in METHODS.items() if name != FIRST_ORDER]


def arguments(**given: Any) -> ZOTrainingArguments:
    return ZOTrainingArguments("out", **QUIET, **given)


def made(args: ZOTrainingArguments) -> torch.optim.Optimizer:
    """Its optimizer, of one matrix."""
    kind = args.optimizer_class
    role = {"ns": True} if getattr(kind, "by_role", False) else {}
    return kind(
        [{"params": [("layers.0.q_proj.w", torch.nn.Parameter(torch.zeros(16, 16)))]} | role],
        **args.optimizer_options(),
    )


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), CLASSES)
def test_a_row_is_a_public_class(name: str, row: Named) -> None:
    cls = getattr(jaguar, row.cls)
    assert cls is getattr(jaguar.optimizers, row.cls) is arguments(optim_zo=name).optimizer_class
    assert row.cls in jaguar.__all__ and row.cls in dir(jaguar.optimizers)
    assert (cls.__module__, cls.__name__) == (row.module, row.cls) and issubclass(cls, jaguar.ZerothOrder)
    assert cls.__doc__ and inspect.signature(cls).parameters["lr"]


def test_every_public_optimizer_of_the_package_has_a_row() -> None:
    found = {
        n for n in jaguar.__all__ if inspect.isclass(c := getattr(jaguar, n)) and issubclass(c, jaguar.ZerothOrder)
    }
    assert found == {row.cls for _, row in CLASSES} | {"ZerothOrder"}
    assert len(CLASSES) == len(found) - 1 and METHOD in METHODS


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_the_learning_rate_of_the_help_is_the_one_that_is_taken(name: str, row: Named) -> None:
    args = arguments(optim_zo=name)
    (said,) = re.findall(r"^[^,]+", row.lr)
    assert made(args).param_groups[0]["lr"] == float(said)
    default = inspect.signature(args.optimizer_class).parameters["lr"].default
    assert default is None or default == float(row.lr)


def test_the_help_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    (names,) = re.findall(r"--optim_zo \{([^}]*)\}", text)
    assert names.replace(" ", "").split(",") == [*METHODS]
    rates = re.search(r"--learning_rate X\|auto length of a step; [^(]*\(default: ([^)]*)\)", text)
    shown = [f"{name} {'auto' if row.automatic else row.lr}" for name, row in METHODS.items()]
    assert rates and rates[1].split("; ") == shown


@pytest.mark.parametrize(("name", "row"), CLASSES)
def test_the_help_has_every_argument_that_has_no_flag(
    name: str, row: Named, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {*OPTIONS, "lr", "weight_decay", "seed", "maximize", "shards", "direction_group", "model"}
    known = keywords(arguments(optim_zo=name).optimizer_class)
    assert "maximize" in known and row.further == ", ".join(n for n in known if n not in flags)
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert not row.further or f"{name} {row.further};" in " ".join(capsys.readouterr().out.split())


def test_parts_of_methods_are_reached_by_the_package() -> None:
    code = "import jaguar; jaguar.rules.SGD(), jaguar.directions.Gaussian(), jaguar.orthogonal.Orthogonal()"
    assert not subprocess.run([sys.executable, "-c", f"{code}; jaguar.estimators.TwoSided()"], cwd=ROOT).returncode
    assert {*HOME, "Method", "Shard"} < {*jaguar.__all__} and "METHODS" not in dir(jaguar)


def test_the_example_of_a_method_runs() -> None:
    text = re.search(r"Example:\n\n(.*?)\n\n", inspect.getdoc(Method) or "", flags=re.S)
    assert text
    model = torch.nn.Linear(3, 2)
    names = {"jaguar": jaguar, "model": model, "closure": lambda: model.weight.square().sum()}
    before = model.weight.clone()
    exec(textwrap.dedent(text[1]), names)
    assert not torch.equal(model.weight, before)


# -- keyword arguments of a class --------------------------------------------------------------------------------------


class Mine(jaguar.ZerothOrder):
    """A class whose common arguments are typed in one place."""

    def __init__(self, params: Any, lr: float = 1e-4, *, betas: tuple[float, float], **common: Unpack[Common]) -> None:
        raise NotImplementedError


class Less(TypedDict, total=False):
    tau: float


class Other(Mine):
    """A class whose dictionary is another one."""

    def __init__(self, params: Any, **common: Unpack[Less]) -> None:
        raise NotImplementedError


def test_keywords_are_those_of_the_signature_and_of_what_it_unpacks() -> None:
    assert keywords(Mine) == ("lr", "betas", *Common.__annotations__)
    assert keywords(type("Bare", (Mine,), {})) == keywords(Mine)
    assert keywords(Other) == ("tau",)
    assert keywords(jaguar.ZOSGD) == tuple(inspect.signature(jaguar.ZOSGD).parameters)[1:]
    assert {"lr", "momentum", "nesterov"} < {*keywords(torch.optim.SGD)}


def test_options_of_a_class_that_unpacks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZOTrainingArguments, "optimizer_class", Mine)
    args = arguments(n_directions=3, zo_options={"betas": (0.8, 0.9), "maximize": True})
    taken = {"n_directions": 3, "betas": (0.8, 0.9), "maximize": True, "seed": args.seed}
    assert args.optimizer_options() == taken
    with pytest.raises(ValueError, match="has no option layout; it has tau, "):
        arguments(layout="block")


# -- zo_options --------------------------------------------------------------------------------------------------------

WRITTEN = {
    "betas=(0.9,0.999),amsgrad=False": {"betas": (0.9, 0.999), "amsgrad": False},
    "betas=(0.9, 0.999), eps=1e-8 , steps=3": {"betas": (0.9, 0.999), "eps": 1e-8, "steps": 3},
    '{"betas": [0.9, 0.999], "project": null}': {"betas": (0.9, 0.999), "project": None},
    "a=true,b=False,c=none,d=None": {"a": True, "b": False, "c": None, "d": None},
    "scale=paper,project=q_proj,v_proj": {"scale": "paper", "project": "q_proj,v_proj"},
    "kind=two-sided,path=a=b": {"kind": "two-sided", "path": "a=b"},
    "n=-1e-4": {"n": -1e-4},
    "a=1,a=1": {"a": 1},
    "{}": {},
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_what_is_meant(text: str) -> None:
    assert keyword_arguments(text) == values.keywords(text) == WRITTEN[text] == keyword_arguments(WRITTEN[text])
    assert [*map(type, keyword_arguments(text).values())] == [*map(type, WRITTEN[text].values())]


@pytest.mark.parametrize("text", ["x", "", "=1", "1a=2", "a=1,a=2", "{", '{"a": 1', "[1]", "a b=1"])
def test_what_is_no_keyword_argument_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"key=value|JSON object|two values"):
        keyword_arguments(text)
    with pytest.raises(ValueError, match=r"key=value|JSON object|two values"):
        arguments(zo_options=text)


@pytest.mark.parametrize(
    "given", [{"maximize": True, "tau": 0.5}, '{"maximize": true, "tau": 0.5}', "maximize=True,tau=0.5"], ids=str
)
def test_options_reach_the_optimizer(given: Any) -> None:
    optimizer: Any = made(arguments(optim_zo="zo-sgd", zo_options=given))
    assert optimizer.method.maximize and optimizer.param_groups[0]["tau"] == 0.5
    assert made(arguments(optim_zo="fo-sgd", zo_options="nesterov=True,momentum=0.9")).defaults["nesterov"]


@pytest.mark.parametrize(("name", "row"), CLASSES)
def test_the_trainer_makes_them(name: str, row: Named) -> None:
    model = BertForSequenceClassification(tiny.architecture("bert").config)
    trainer = jaguar.ZOTrainer(model, arguments(optim_zo=name, zo_options={"maximize": True}))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is getattr(jaguar, row.cls) and optimizer.method.maximize
    assert {"ns" in group for group in optimizer.param_groups} == {optimizer.by_role}


def test_dtypes_are_said_by_name() -> None:
    for given in ("momentum_dtype=bfloat16", "momentum_dtype=torch.bfloat16", {"momentum_dtype": torch.bfloat16}):
        assert arguments(zo_options=given).optimizer_options()["momentum_dtype"] is torch.bfloat16
    arguments(momentum_dtype="bfloat16", zo_options="momentum_dtype=torch.bfloat16")
    assert arguments(zo_options="momentum_dtype=None").optimizer_options()["momentum_dtype"] is None


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"tau": 0.5}, "tau=0.5"),
        ({"learning_rate": 0.5}, "lr=0.5"),
        ({"seed": 5}, "seed=5"),
        ({"weight_decay": 0.5}, "weight_decay=0.5"),
    ],
)
def test_a_key_with_a_field_of_its_own_has_one_value(fields: dict[str, Any], key: str) -> None:
    assert arguments(**fields, zo_options=key).optimizer_options() == arguments(**fields).optimizer_options()
    name, _, value = key.partition("=")
    with pytest.raises(ValueError, match=f"zo_options has {name}=7, and {next(iter(fields))} is {value}: "):
        arguments(**fields, zo_options=f"{name}=7")


@pytest.mark.parametrize("key", ["seed", "weight_decay"])
def test_what_a_field_always_says_is_not_said_otherwise(key: str) -> None:
    with pytest.raises(ValueError, match=rf"zo_options has {key}=7.*say it by {key}"):
        arguments(zo_options={key: 7})


def test_an_unknown_key_is_told_the_known_ones() -> None:
    for key in ("distribution", "params", "no_such"):
        with pytest.raises(ValueError, match=f"zo_options: jaguar-muon has no argument {key}; it has ") as error:
            arguments(optim_zo="jaguar-muon", zo_options={key: 1})
        assert str(error.value).partition("it has ")[2] == ", ".join(keywords(jaguar.JaguarMuon))


def test_every_option_of_a_field_is_one_of_a_class() -> None:
    known = {name for name, _ in CLASSES for name in keywords(arguments(optim_zo=name).optimizer_class)}
    assert {*OPTIONS} <= known


# -- on the command line -----------------------------------------------------------------------------------------------


def test_the_flag_takes_pairs_and_json(settled: Any, tmp_path: Any) -> None:  # noqa: F811
    words = line("zo_options", "maximize=True", ["--tau", "0.5"])
    assert settled(words).arguments["zo_options"] == {"maximize": True}
    assert settled([*words, "tau=0.5"]).arguments["zo_options"] == {"maximize": True, "tau": 0.5}
    assert settled(line("zo-options", '{"maximize": true}')).arguments["zo_options"] == {"maximize": True}
    for text in ("{maximize: true, tau: 0.5}", "[maximize=True, tau=0.5]", "maximize=True,tau=0.5"):
        (tmp_path / "run.yaml").write_text(f"zo_options: {text}\n")
        run = settled(line("config", str(tmp_path / "run.yaml")))
        assert run.arguments["zo_options"] == {"maximize": True, "tau": 0.5}
    (tmp_path / "run.json").write_text(json.dumps({"zo_options": {"maximize": True}}))
    run = settled(line("config", str(tmp_path / "run.json"), ["--zo_options", "rho_clip=2.0"]))
    assert run.arguments["zo_options"] == {"rho_clip": 2.0}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes_the_checks_before_data_are_read(name: str) -> None:
    check(arguments(optim_zo=name))
    check(arguments(optim_zo=name, weight_decay=0.1))


@pytest.mark.parametrize("options", ["keep=0.5", "layers=('encoder.h.0','encoder.h.1')", "layers=('encoder.h.0.',)"])
def test_which_layers_there_are_is_not_known_before_the_model(options: str) -> None:
    check(arguments(optim_zo="lezo", zo_options=options))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such=1"], "zo_options: jaguar-signsgd has no argument no_such; it has lr, beta"),
        (["maximize"], "argument --zo_options: 'maximize' is not key=value"),
        (["tau=1", "tau=2"], "argument --zo_options: tau has two values"),
        (["tau=1", "--zo-options", "tau=2"], "give one of them"),
        (["tau=x"], "--zo_options: "),
        (["tau=-1.0"], "--zo_options: tau=-1.0"),
        (["released=maybe"], "--zo_options: released='maybe': choose True or False"),
        (["layout=diagonal"], "--zo_options: layout='diagonal'"),
        (["tau=1", "--tau", "2"], "zo_options has tau=1, and tau is 2.0: say it by tau"),
        (["layout=block", "--released"], "released=True fixes"),
    ],
    ids=str,
)
def test_the_flag_is_refused(words: list[str], message: str, settled: Any, capsys: Any) -> None:  # noqa: F811
    assert message in refused(capsys, *line("use_cpu", "true"), "--zo_options", *words)


def test_trainers_numbers_of_adam_say_where_zo_adamms_are() -> None:
    run = Run("lm", "out", arguments={"adam_beta1": 0.5, "optim_zo": "zo-adamm", "use_cpu": True})
    with pytest.warns(UserWarning, match="--adam_beta1 has no effect: .* --zo_options"):
        run.trainer_arguments()


def test_going_on_compares_them() -> None:
    """By the optimizer's settings, whether an option came by its own field or not."""
    runs = [Run("lm", "out", arguments=given) for given in ({"zo_options": {"tau": 0.5}}, {"tau": 0.5})]
    one, other = (run.settings_of(run.trainer_arguments())["values"] for run in runs)
    assert one == other
    settings = optimizer_settings(made(arguments(optim_zo="zo-sgd", zo_options={"n_directions": 2, "momentum": 0.5})))
    compare(settings, optimizer_settings(made(arguments(optim_zo="zo-sgd", n_directions=2, momentum=0.5))))
    for given in ({"n_directions": 3}, {"maximize": True}, {"momentum": 0.25}, {"restore": "walk"}):
        options = {"n_directions": 2, "momentum": 0.5} | given
        with (
            pytest.raises(ValueError, match=f"was started with {next(iter(given))} = "),
            warnings.catch_warnings(action="ignore"),
        ):
            compare(settings, optimizer_settings(made(arguments(optim_zo="zo-sgd", zo_options=options))))

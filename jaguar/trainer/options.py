"""Arguments of the optimizers as fields of a dataclass: the one table behind `ZOTrainingArguments` and the CLI's flags.

Readable without torch, so that `jaguar finetune --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaguar.optimizers.names import FIRST_ORDER, METHOD, METHODS

# Option of an optimizer -> its possible values.
OPTIONS: dict[str, tuple[str, ...]] = {
    "layout": ("uniform", "block"),
    "signs": ("rademacher", "ones"),
    "update": ("sampled", "all"),
    "ns_coefficients": ("cubic", "quintic", "polar_express"),
    "ns_dtype": ("bfloat16", "float32", "float64"),
    "adjust_lr": ("original", "match_rms_adamw"),
    "distribution": ("gaussian", "rademacher"),
    "restore": ("copy", "module", "walk"),
    "estimator": ("two-sided", "one-sided"),
    "momentum_dtype": ("float32", "bfloat16", "float8_e5m2"),
    "rounding": ("stochastic", "nearest"),
    "backend": ("auto", "reference", "triton", "cuda"),
}


def _option(text: str, default: str = "") -> Any:
    """A field that is None unless given.

    Args:
        text: its help.
        default: the optimizer's own value, as the help shows it.
    """
    return field(default=None, metadata={"help": text + (f" (default: {default})" if default else "")})


def _word(name: str, text: str, default: str = "") -> Any:
    """The same for one of a few words, the first of which is the optimizer's own unless another is named."""
    return _option(text, default or OPTIONS[name][0])


_FURTHER = "; ".join(f"{name} {row.further}" for name, row in METHODS.items() if row.further)


@dataclass
class OptimizerOptions:
    """The optimizer and its arguments; None keeps that optimizer's default."""

    learning_rate: float | str | None = _option("length of a step; auto: from the losses, a factor of it scheduled")
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled, multiplied by the learning rate"})
    optim_zo: str = field(
        default=METHOD,
        metadata={"help": f"optimizer; {FIRST_ORDER} is the first-order baseline, with backward passes"},
    )
    tau: float | str | None = _option("length of the perturbation; auto: from the losses")
    beta: float | None = _option("factor of momentum m <- beta m + (1 - beta) g", "0.9")
    momentum: float | None = _option("factor of momentum m <- momentum m + g", "0")
    coordinates: float | str | None = _option(
        "perturbed coordinates: 100 is a number over the whole set, 0.01 a fraction of every tensor (1 is one, 1.0 is "
        "all)",
        "0.01",
    )
    layout: str | None = _word("layout", "coordinates by elements, or by rows x columns of each matrix")
    signs: str | None = _word("signs", "signs of the perturbed coordinates: random, or all +1")
    update: str | None = _word("update", "the sign step moves the sampled coordinates, or every one")
    ns_steps: int | None = _option("Newton-Schulz iterations", "10 for cubic, 5 for quintic, 8 for polar_express")
    ns_coefficients: str | None = _word("ns_coefficients", "polynomials of Newton-Schulz; the paper's are cubic")
    ns_dtype: str | None = _word("ns_dtype", "dtype of Newton-Schulz")
    ns_period: int | None = _option("orthogonalise 1/R of the matrices in each step, which move by R lr", "1")
    vector_lr: float | None = _option("step of what Newton-Schulz does not move", "a hundredth of lr")
    adjust_lr: str | None = _word("adjust_lr", "lr by the shape of the matrix", "lr as it is")
    released: bool = field(default=False, metadata={"help": "what the authors' released code computes"})
    distribution: str | None = _word("distribution", "distribution of dense directions")
    restore: str | None = _word(
        "restore",
        "how parameters get back from dense directions",
        "copy where it needs under a tenth of the free memory, else module",
    )
    n_directions: int | None = _option("directions per step", "1; fzoo 8")
    estimator: str | None = _word("estimator", "two evaluations per direction, or one more than there are directions")
    rho_clip: float | None = _option("bound on the directional derivative", "none")
    momentum_dtype: str | None = _word(
        "momentum_dtype", "dtype that momentum is stored in", "as the weights; bfloat16 for float16"
    )
    rounding: str | None = _word("rounding", "rounding of weights and momentum stored in less than float32")
    direction_parallel: bool = field(
        default=False,
        metadata={"help": "processes share the directions of a step, on the same rows, instead of the rows"},
    )
    check_replicas_steps: int = field(
        default=100,
        metadata={
            "help": "steps between comparisons of the processes' weights, which stop a run that differs; 0: none"
        },
    )
    backend: str | None = _word("backend", "where kernels come from; `jaguar info` says which can run here")
    zo_options: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": "further arguments of the method's class: key=value,key=value, as in "
            f"'betas=(0.9,0.999),amsgrad=False', or a JSON object: {_FURTHER}; all methods maximize"
        },
    )

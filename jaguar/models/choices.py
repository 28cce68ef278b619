"""Names that users choose from, readable without torch so that --help answers at once."""

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

# Schedules of the learning rate that need no figures of an evaluation.
SCHEDULES = (
    *("linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
)

# Kind of adapter -> flag.
ADAPTERS = {"lora": "lora", "prefix": "prefix_tuning", "prompt": "prompt_tuning"}

# What --train takes: everything, weights and biases of the normalisation layers, or all biases.
TRAINABLE = ("all", "norm", "bias")

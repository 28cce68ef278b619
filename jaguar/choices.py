"""Names that users choose from, readable without torch so that --help answers at once."""

# The first-order baseline: torch.optim.SGD with backward passes, through the same trainer.
FIRST_ORDER = "fo-sgd"

# Name of a method on the command line -> public class; None: no class of this package.
METHODS: dict[str, str | None] = {
    "jaguar-signsgd": "JaguarSignSGD",
    "jaguar-muon": "JaguarMuon",
    "zo-sgd": "ZOSGD",
    "zo-signsgd": "ZOSignSGD",
    FIRST_ORDER: None,
}

METHOD = "jaguar-signsgd"  # the default

# Kind of adapter -> flag.
ADAPTERS = {"lora": "lora", "prefix": "prefix_tuning", "prompt": "prompt_tuning"}

# What --train takes: everything, weights and biases of the normalisation layers, or all biases.
TRAINABLE = ("all", "norm", "bias")

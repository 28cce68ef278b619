"""Names of adapters and of sets of parameters that users choose from, readable without torch for --help."""

# Kind of adapter -> flag.
ADAPTERS = {"lora": "lora", "prefix": "prefix_tuning", "prompt": "prompt_tuning"}

# Sets of parameters for --train: everything, weights and biases of the normalisation layers, or all biases.
TRAINABLE = ("all", "norm", "bias")

"""Names that users choose from, readable without torch so that --help answers at once."""

# Name of a method on the command line -> public class.
METHODS = {
    "jaguar-signsgd": "JaguarSignSGD",
    "jaguar-muon": "JaguarMuon",
    "zo-sgd": "ZOSGD",
    "zo-signsgd": "ZOSignSGD",
}

# What --train takes: everything, weights and biases of the normalisation layers, or all biases.
TRAINABLE = ("all", "norm", "bias")

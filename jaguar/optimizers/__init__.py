"""The optimizers: thin named classes over one base, `ZerothOrder`."""

from jaguar.optimizers.baselines import ZOSGD, ZOSignSGD
from jaguar.optimizers.jaguar_muon import JaguarMuon
from jaguar.optimizers.jaguar_signsgd import JaguarSignSGD
from jaguar.optimizers.matrices import param_groups

__all__ = ["ZOSGD", "JaguarMuon", "JaguarSignSGD", "ZOSignSGD", "param_groups"]

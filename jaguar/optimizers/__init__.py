"""The optimizers: thin named classes over one base, `ZerothOrder`."""

from jaguar.optimizers.baselines import ZOSGD, ZOSignSGD
from jaguar.optimizers.jaguar_signsgd import JaguarSignSGD

__all__ = ["ZOSGD", "JaguarSignSGD", "ZOSignSGD"]

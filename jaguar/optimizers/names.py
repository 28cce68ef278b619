"""Names of the optimizers, in the package and on the command line: one table, readable without torch.

A new optimizer is a file of its own, a row of `METHODS` and an import for type checkers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaguar.optimizers.acc_zom import AccZOM as AccZOM
    from jaguar.optimizers.base import ZerothOrder as ZerothOrder
    from jaguar.optimizers.dizo import DiZO as DiZO
    from jaguar.optimizers.forward_grad import ForwardGrad as ForwardGrad
    from jaguar.optimizers.fzoo import FZOO as FZOO
    from jaguar.optimizers.jaguar_muon import JaguarMuon as JaguarMuon
    from jaguar.optimizers.jaguar_signsgd import JaguarSignSGD as JaguarSignSGD
    from jaguar.optimizers.lezo import LeZO as LeZO
    from jaguar.optimizers.parameter_groups import param_groups as param_groups
    from jaguar.optimizers.zo_adamm import ZOAdaMM as ZOAdaMM
    from jaguar.optimizers.zo_adamu import ZOAdaMU as ZOAdaMU
    from jaguar.optimizers.zo_muon import ZOMuon as ZOMuon
    from jaguar.optimizers.zo_sgd import ZOSGD as ZOSGD
    from jaguar.optimizers.zo_sgd_cons import ZOSGDCons as ZOSGDCons
    from jaguar.optimizers.zo_signsgd import ZOSignSGD as ZOSignSGD


class Named(NamedTuple):
    """An optimizer that has a name on the command line.

    Attributes:
        cls: its public class; None: torch.optim.SGD.
        module: where that is; None: in torch.
        lr: its default learning rate, as --help shows it.
        further: its own arguments that have no flag, as --help shows them.
        automatic: its lr and tau may be "auto"; `StepSize.check` decides it, and this tells --help, which has no torch.
    """

    cls: str | None
    module: str | None
    lr: str
    further: str = ""
    automatic: bool = False


# The first-order baseline: torch.optim.SGD with backward passes, through the same trainer.
FIRST_ORDER = "fo-sgd"

METHODS: dict[str, Named] = {
    "jaguar-signsgd": Named(
        "JaguarSignSGD", "jaguar.optimizers.jaguar_signsgd", "1e-4, 1e-6 with --update all", automatic=True
    ),
    "jaguar-muon": Named("JaguarMuon", "jaguar.optimizers.jaguar_muon", "1e-3"),
    "zo-sgd": Named("ZOSGD", "jaguar.optimizers.zo_sgd", "1e-6", automatic=True),
    "zo-signsgd": Named("ZOSignSGD", "jaguar.optimizers.zo_signsgd", "1e-6", "scalar_sign", True),
    "zo-adamm": Named("ZOAdaMM", "jaguar.optimizers.zo_adamm", "1e-4", "betas, eps, amsgrad, bias_correction"),
    "lezo": Named("LeZO", "jaguar.optimizers.lezo", "1e-6", "keep, layers", True),
    "zo-muon": Named("ZOMuon", "jaguar.optimizers.zo_muon", "1e-3", "algorithm"),
    "dizo": Named(
        "DiZO",
        "jaguar.optimizers.dizo",
        "1e-6",
        "every, search_steps, search_scale, search_lr, bounds, project",
    ),
    "zo-adamu": Named("ZOAdaMU", "jaguar.optimizers.zo_adamu", "1e-6", "alpha, beta1, beta2, warmup, total"),
    "forward-grad": Named("ForwardGrad", "jaguar.optimizers.forward_grad", "1e-6"),
    "acc-zom": Named("AccZOM", "jaguar.optimizers.acc_zom", "1e-6", "k, m0, c"),
    "fzoo": Named("FZOO", "jaguar.optimizers.fzoo", "1e-7", "scale"),
    "zo-sgd-cons": Named("ZOSGDCons", "jaguar.optimizers.zo_sgd_cons", "1e-6"),
    FIRST_ORDER: Named(None, None, "1e-3", "dampening, nesterov"),
}

METHOD = "jaguar-signsgd"  # the default

# Public name -> module: the classes of the table, and what is public beside them.
HOME: dict[str, str] = {row.cls: row.module for row in METHODS.values() if row.cls and row.module}
HOME |= {"ZerothOrder": "jaguar.optimizers.base", "param_groups": "jaguar.optimizers.parameter_groups"}

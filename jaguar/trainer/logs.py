"""Figures of the steps between two lines of Trainer's log."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaguar.optimizers.base import ZerothOrder
from jaguar.record import Record


def figures(optimizer: ZerothOrder, records: Sequence[Record], filtered: bool) -> dict[str, float]:
    """Mean loss and root mean square of rho; of an automatic step also its choice and the estimates behind it.

    Args:
        records: of at least one step.
        filtered: leave losses that are not finite out of the mean.
    """
    finite = [record for record in records if not record.skipped]
    shown = finite if filtered else records
    rhos = [rho for record in finite for rho in optimizer.rho(record)]
    logs = {
        "loss": math.fsum(map(optimizer.loss, shown)) / len(shown) if shown else math.nan,
        "projected_grad": math.sqrt(math.fsum(r * r for r in rhos) / len(rhos)) if rhos else math.nan,
    }
    found, last = optimizer.estimates, optimizer.last_record
    if found is not None and last is not None:
        logs |= {"learning_rate": last.lrs[0], "tau": last.taus[0]}
        logs |= {"curvature": found.curvature, "signal_share": found.share}
    return logs

"""Examples of each task, and scorers for them."""

from helpers import synthetic, tiny
from jaguar.scoring import Scorer
from jaguar.tasks import COPA, SST2, Encoder, WinoGrande
from jaguar.tasks.rows import Row

TASKS = {"sst2": SST2(), "copa": COPA(), "winogrande": WinoGrande()}


# fp32: sums in another order, over rows of other lengths.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def kind_of(name):
    return "masked" if tiny.ARCHITECTURES[name][1] == "MaskedLM" else "causal"


def examples(task, name, count=16, seed=1):
    rows = [
        Row({k: str(v).strip() for k, v in row.items()}, f"row {i}")
        for i, row in enumerate(synthetic.ROWS[task](count, seed))
    ]
    kind = kind_of(name)
    return Encoder(tiny.tokenizer_of(name), kind, 128)([TASKS[task].question(row, kind == "masked") for row in rows])


def scorer_of(model, name, task="sst2", **options):
    return Scorer(model, tiny.tokenizer_of(name).pad_token_id, kind_of(name), TASKS[task].objective, **options)

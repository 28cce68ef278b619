"""One optimizer step outside its two forwards, on the CPU: JAGUAR SignSGD against MeZO's loop, side by side.

The model is the demo's (SmolLM2-135M's shapes, random fp32 weights, all 134.5 M parameters trained); the closure
returns a number that was made before, so that only the optimizer's own work is timed. MeZO's loop is the published one
in its plainest form: torch.manual_seed and torch.normal per tensor, four passes (perturb by +1, -2, +1, then update).
Parity is asserted before anything is timed: a step must leave exactly the bits that a dense re-computation gives.

    python bench step [--repeats 5] [--out bench/results]
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import jaguar
from jaguar.method.directions import Coordinates
from jaguar.method.params import build_slots
from jaguar.method.rng import Draw
from machine import machine
from registry import RESULTS, parser_of

LOSSES = (0.71, 0.64)
TAU, LR, BETA = 1e-3, 1e-4, 0.9


def demo_model() -> nn.Module:
    """SmolLM2-135M's shapes with random weights, fp32."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float().eval()


def losses() -> Callable[[], Tensor]:
    """A closure that costs nothing: the first loss, the second, the first, ..."""
    state = {"calls": 0}

    def closure() -> Tensor:
        state["calls"] += 1
        return torch.tensor(LOSSES[(state["calls"] - 1) % 2])

    return closure


@torch.no_grad()
def mezo_step(params: list[nn.Parameter], seed: int) -> None:
    """MeZO's bookkeeping of one step."""
    rho = 0.0
    for scale in (1.0, -2.0, 1.0):
        torch.manual_seed(seed)
        for p in params:
            z = torch.normal(mean=0.0, std=1.0, size=p.size(), dtype=p.dtype)
            p.add_(scale * z * TAU)
        rho = (LOSSES[0] - LOSSES[1]) / (2 * TAU)
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0.0, std=1.0, size=p.size(), dtype=p.dtype)
        p.sub_(LR * (rho * z))


@torch.no_grad()
def assert_parity(model: nn.Module, update: str) -> None:
    """One step of JaguarSignSGD equals a dense fp32 re-computation with whole-tensor masks, bit for bit."""
    optimizer = jaguar.JaguarSignSGD(model.named_parameters(), lr=LR, beta=BETA, tau=TAU, update=update)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.measure(losses())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"measure changed {name}"
    optimizer.step()
    f, g = (torch.tensor(v) for v in LOSSES)
    rho = (f - g) / torch.tensor(2 * TAU)
    slots = build_slots(optimizer.param_groups)
    for slot, (index, sign) in zip(slots, Coordinates(0.01).sample(Draw(0, 0), slots), strict=True):
        x = before[slot.name].view(-1)
        s = torch.zeros_like(x)
        s[index] = sign
        s[(x + s * TAU) == (x - s * TAU)] = 0.0
        m = s * (torch.tensor(1.0 - BETA) * rho)
        moved = torch.ones_like(x, dtype=torch.bool) if update == "all" else s != 0
        expected = torch.where(moved, x - m.sign() * torch.tensor(LR), x)
        assert torch.equal(slot.tensor.view(-1), expected), (
            f"{update}: {slot.name} differs from the dense re-computation"
        )
    for name, p in model.named_parameters():
        p.copy_(before[name])


def median_seconds(steps: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of every step, interleaved, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in track(range(repeats + 1), description="timing", console=Console(stderr=True), transient=True):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(repeat)
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed repeats of each method, after one warm-up (default: 5)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file (default: bench/results)")
    args = parser.parse_args()
    model = demo_model()
    params = list(model.parameters())
    for update in ("sampled", "all"):
        assert_parity(model, update)
    steps: dict[str, Callable[[int], object]] = {"MeZO loop (normal, 4 passes)": lambda i: mezo_step(params, i)}
    for update in ("sampled", "all"):
        optimizer = jaguar.JaguarSignSGD(model.named_parameters(), lr=LR, beta=BETA, tau=TAU, update=update)
        closure = losses()
        steps[f"JAGUAR SignSGD, {update}"] = lambda i, o=optimizer, c=closure: o.step(c)
    times = median_seconds(steps, args.repeats)
    base = statistics.median(times["MeZO loop (normal, 4 passes)"])
    table = Table(
        title=f"one step outside the forwards, {sum(p.numel() for p in params) / 1e6:.1f} M fp32 parameters",
        title_justify="left",
    )
    for column in ("method", "median s", "min s", "max s", "of MeZO's time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = []
    for name, t in times.items():
        row = {
            "method": name,
            "median_s": statistics.median(t),
            "min_s": min(t),
            "max_s": max(t),
            "ratio": statistics.median(t) / base,
        }
        rows.append(row)
        table.add_row(
            name, f"{row['median_s']:.3f}", f"{row['min_s']:.3f}", f"{row['max_s']:.3f}", f"{row['ratio']:.3f}"
        )
    info = machine()
    Console().print(table, "  ".join(f"{key} {value}" for key, value in info.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-step-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps({"machine": info, "rows": rows}, indent=2) + "\n")
    print(f"written to {path}")
    return 0

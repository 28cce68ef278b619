"""Whole training steps of OPT-1.3B and RoBERTa-large on an NVIDIA GPU: time and peak memory beside inference.

Each optimizer of this package, MeZO's published loop and first-order AdamW take steps on the same model and batch.
Prints the numbers and writes no file, unless `make gpu` calls it (--into).

    python bench models [--seconds 60]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gpu import result
from registry import parser_of


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = parser_of(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="begin nothing more after so many seconds (default: 60)"
    )
    parser.add_argument("--into", type=Path, help="result file that `make gpu` has begun; rows are added to it")
    args = parser.parse_args(arguments)
    if reason := result.no_gpu():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    result.check_begun(parser, args.into)
    try:
        import transformers

        from step import whole_steps
    except ImportError as error:
        print(f"error: {error}; run `make gpu`, which builds the package, or `pip install -e .`", file=sys.stderr)
        return 2
    import torch

    from gpu.clock import CudaClock

    transformers.logging.set_verbosity_error()
    found = result.load(args.into) if args.into else {"rows": []}

    def left() -> float:
        return float(args.seconds - (time.monotonic() - begin))

    device = torch.device("cuda", torch.cuda.current_device())
    rows = whole_steps.run(CudaClock(device, 0.4), left)
    return 1 if result.keep(rows, found, args.into, begin, whole_steps.said) else 0

"""Lean scoring against the benchmark's: tokens, peak memory and time of a batch of 16 SST-2 prompts.

Tokens: many random batches; the benchmark's 32 rows (both options of every prompt, padded on the left to a multiple of
eight of the longest), and what jaguar's two layouts process. Memory: an allocation trace of one batch, the one with
the median of packed to naive tokens, on OPT-1.3B's shape with fake tensors, so that neither weights nor a GPU are
needed. Time: forwards on this machine's CPU, fp32, side by side, after their scores have been found equal.

Measured against jaguar/scoring/naive.py, which is kinder than the public code: that also copies the logits of all but
the last position and holds the KV cache until the loss is there.

    python bench scoring [--sentences FILE ...] [--column NAME] [--tokenizer DIR] [--out bench/results]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu import tables
from jaguar.scoring import Scorer, naive
from jaguar.tasks import SST2
from jaguar.tasks.questions import Encoder, Example
from jaguar.tasks.rows import Row, read_rows
from machine import machine
from registry import parser_of
from scoring.allocations import Allocations
from step.step import median_seconds

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaguar"  # as in demo/prepare.py
BATCH, PAD = 16, 1
# Parts of the naive scoring's that lean scoring claims to stay below.
BOUNDS = {"lean, padded": 1 / 2, "lean, packed": 1 / 4, "memory": 1 / 5}
NAIVE, NO_CACHE, LEAN = "naive", "naive, no KV cache", ("lean, padded", "lean, packed")
TOLERANCE = 1e-4
SHAPE = {
    "vocab_size": 50272,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 2048,
    "do_layer_norm_before": True,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
# Written for this file in SST-2's style (lower case, marks apart), each with as many words as the first sixteen rows of
# GLUE's training file have: 2 to 25, 9 in the mean. (Its whole sentences, in the validation file, have 19.)
SENTENCES = (
    "keeps old wounds from the younger cousins",
    "has no pulse , only borrowed tricks",
    "who forgives its dreamers and discovers something quietly radical about growing up",
    "seems perfectly happy to stay shallow until dawn",
    "in the laziest body-swap gags the writers could dig up",
    "that 's much too delicate to survive such heavy-handed direction",
    "proves that the author of such noisy spectacles as desert thunder can still put together a modest , intimate "
    "story with a real sting .",
    "of salty",
    "a middle-aged clerk 's secret diary",
    "is far more carefully staged than in most ` anything-goes ' farces",
    "sinks into tired routine",
    "for those film lovers who insist that ` they ca n't write parts like they did before",
    "the stretch where nobody 's listening ,",
    "knew how long this evening was",
    "bring some spark to a dusty plot",
    "the bravest singers",
)


def trained(texts: Sequence[str]) -> Any:
    """A byte-level BPE of these texts that begins every input with one token, as OPT's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "<pad>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator([*texts, " It was terrible", " It was great"], trainer)
    return begun(PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", pad_token="<pad>", eos_token="</s>"))


def begun(tokenizer: Any) -> Any:
    """The tokenizer, made to begin every input with its first token if it does not."""
    from tokenizers import processors

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if tokenizer("a").input_ids[0] != number:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, number)]
        )
    return tokenizer


def prompts(sentences: Sequence[str], tokenizer: Any) -> list[Example]:
    """The sentences as SST-2's prompts."""
    rows = [Row({"sentence": text, "label": "0"}, f"sentence {i}") for i, text in enumerate(sentences)]
    return Encoder(tokenizer, "causal", 2048)([SST2().question(row, masked=False) for row in rows])


def opt_1_3b(dtype: torch.dtype, attention: str = "sdpa", **changes: Any) -> tuple[Any, FakeTensorMode]:
    """A model of OPT-1.3B's shape without memory, and the mode that it runs in."""
    from transformers import AutoModelForCausalLM, OPTConfig

    mode = FakeTensorMode()
    with mode:
        config = OPTConfig(**(SHAPE | changes))
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval(), mode


def scorer_of(model: Any, method: str) -> Scorer:
    scorer = Scorer(model, PAD, layout=method.removeprefix("lean, "))
    scorer.verified_length = math.inf  # tensors without memory cannot be compared; `timed` asserts equal scores
    return scorer


def tokens(model: Any, method: str, batch: Sequence[Example]) -> int:
    """Tokens that a method's forward processes, padding included."""
    if method in (NAIVE, NO_CACHE):
        return naive.rows(batch, "causal", PAD)[0].numel()
    return scorer_of(model, method).collate(batch)["input_ids"].numel()


def allocated(model: Any, mode: FakeTensorMode, method: str, batch: Sequence[Example]) -> Allocations:
    """What scoring a batch allocates beyond the weights; the inputs count."""
    made = {} if method in (NAIVE, NO_CACHE) else scorer_of(model, method).collate(batch)
    model.config.use_cache = method != NO_CACHE
    with torch.no_grad(), mode, Allocations() as trace:
        if method in (NAIVE, NO_CACHE):
            naive.scores(model, batch, "causal", PAD)
        else:
            inputs = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in made.items()}
            scorer_of(model, method).scores(inputs)
    model.config.use_cache = True
    return trace


def counted(name: str, model: Any, batches: Sequence[Sequence[Example]]) -> tuple[list[dict[str, Any]], int]:
    """Rows of tokens, and the number of the batch with the median of packed to naive tokens."""
    found = {method: [tokens(model, method, batch) for batch in batches] for method in (NAIVE, *LEAN)}
    parts = {m: [lean / whole for lean, whole in zip(found[m], found[NAIVE], strict=True)] for m in LEAN}
    rows = [
        {
            "sentences": name,
            "method": method,
            "batches": len(batches),
            "naive_median": statistics.median(found[NAIVE]),
            "median": statistics.median(found[method]),
            "ratio_median": statistics.median(parts[method]),
            "ratio_worst": max(parts[method]),
            "bound": BOUNDS[method],
            "within": statistics.fmean(part <= BOUNDS[method] for part in parts[method]),
        }
        for method in LEAN
    ]
    order = sorted(range(len(batches)), key=parts[LEAN[1]].__getitem__)
    return rows, order[len(order) // 2]


def traced(name: str, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows of memory: two precisions, two kinds of attention."""
    rows = []
    for dtype in (torch.float16, torch.float32):
        for attention in ("sdpa", "eager"):
            model, mode = opt_1_3b(dtype, attention)
            traces = {method: allocated(model, mode, method, batch) for method in (NAIVE, NO_CACHE, *LEAN)}
            for method, trace in traces.items():
                row = {"sentences": name, "dtype": str(dtype).removeprefix("torch."), "attention": attention}
                row |= {"method": method, "tokens": tokens(model, method, batch), "peak": trace.peak, "at": trace.at}
                rows.append(row | {"ratio": trace.peak / traces[NAIVE].peak})
    return rows


def random_opt() -> Any:
    """A small OPT with OPT's vocabulary and random weights, scaled so that its scores differ by more than rounding."""
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    small = {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 8}
    model = AutoModelForCausalLM.from_config(OPTConfig(**(SHAPE | small | {"num_attention_heads": 8}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


@torch.no_grad()
def timed(name: str, model: Any, batch: Sequence[Example], repeats: int) -> list[dict[str, Any]]:
    """Rows of time; before that, equal scores are asserted."""
    right = torch.stack(naive.scores(model, batch, "causal", PAD))
    steps: dict[str, Callable[[int], object]] = {NAIVE: lambda _: naive.scores(model, batch, "causal", PAD)}
    differences = {NAIVE: 0.0}
    for method in LEAN:
        scorer = scorer_of(model, method)
        steps[method] = lambda _, scorer=scorer: scorer.scores(scorer.collate(batch))
        differences[method] = float((scorer.scores(scorer.collate(batch)) - right).abs().max())
        assert differences[method] < TOLERANCE, f"{name}: {method} differs from naive by {differences[method]:.2g}"
    seconds = median_seconds(steps, repeats)
    base = statistics.median(seconds[NAIVE])
    return [
        {
            "model": name,
            "method": method,
            "tokens": tokens(model, method, batch),
            "difference": differences[method],
            "median_s": statistics.median(found),
            "min_s": min(found),
            "max_s": max(found),
            "ratio": statistics.median(found) / base,
        }
        for method, found in seconds.items()
    ]


def sections(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and cells of every table that has rows."""
    counts, memory, time = [], [], []
    for r in found["tokens"]:
        cells = [r["sentences"], r["method"], f"{r['naive_median']:.0f}", f"{r['median']:.0f}"]
        cells += [f"{r['ratio_median']:.3f}", f"{r['ratio_worst']:.3f}", f"{r['bound']:.2f}", f"{r['within']:.1%}"]
        counts.append(cells)
    for r in found["memory"]:
        cells = [r["sentences"], r["dtype"], r["attention"], r["method"], str(r["tokens"])]
        cells += [f"{r['peak'] / 1e6:.1f}", f"{r['ratio']:.3f}"]
        cells += [f"{BOUNDS['memory']:.2f}" if r["method"] in LEAN else "", r["at"].split(".")[1]]
        memory.append(cells)
    for r in found["time"]:
        cells = [r["model"], r["method"], str(r["tokens"]), f"{r['difference']:.1e}"]
        time.append(cells + [f"{r[key]:.3f}" for key in ("median_s", "min_s", "max_s", "ratio")])
    made = [
        (
            f"Tokens of {BATCH} prompts",
            ["sentences", "method", "naive, median", "median", "of naive, median", "worst", "wanted <=", "within"],
            counts,
        ),
        (
            "Peak memory beyond the weights, OPT-1.3B's shape",
            ["sentences", "dtype", "attention", "method", "tokens", "MB", "of naive", "wanted <=", "peak at"],
            memory,
        ),
        (
            "Seconds of a scoring forward on this CPU, fp32",
            ["model", "method", "tokens", "difference", "median", "min", "max", "of naive"],
            time,
        ),
    ]
    return [section for section in made if section[2]]


def measured(texts: dict[str, list[str]], tokenizer: Any, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """All rows, and what else is to be said."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, Any] = {"tokens": [], "memory": [], "time": []}
    notes: list[str] = []
    model, _ = opt_1_3b(torch.float16)
    medians = []
    for name, own in texts.items():
        rng = random.Random(0)
        batches = [rng.sample(own, BATCH) for _ in range(args.batches)]
        encoded = [prompts(batch, tokenizer) for batch in batches]
        rows, middle = counted(name, model, encoded)
        found["tokens"] += rows
        found["memory"] += traced(name, encoded[middle])
        medians.append((batches[middle], encoded[middle]))
        words = statistics.fmean(len(text.split()) for text in own)
        notes.append(f"{name}: {len(own)} sentences, {words:.1f} words in the mean")
    if args.repeats:
        notes.append(f"memory: the median batch of each file; time: that of {next(iter(texts))}")
        batch, examples = medians[0]
        found["time"] += timed("random OPT, 8 layers of 512", random_opt(), examples, args.repeats)
        if args.model is not None:
            net = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
            examples = prompts(batch, AutoTokenizer.from_pretrained(args.model, trust_remote_code=False))
            found["time"] += timed(args.model.name, net, examples, args.repeats)
    return found, notes


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    files = [path for path in (CACHE / "movie_reviews_test.csv",) if path.is_file()]
    folder = CACHE / "SmolLM2-135M-Instruct"
    there = folder if (folder / "config.json").is_file() else None
    parser.add_argument(
        "--sentences",
        nargs="+",
        type=Path,
        default=files,
        metavar="FILE",
        help=".csv or .jsonl files, each measured (default: the demo's test file; without it sixteen of this file's)",
    )
    parser.add_argument(
        "--column",
        nargs="+",
        default=["text"],
        metavar="NAME",
        help="of the sentences, one for all files or one for each (default: text)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=there,
        metavar="DIR",
        help="(default: the demo's; without it a BPE trained on the sentences)",
    )
    parser.add_argument(
        "--model", type=Path, default=there, metavar="DIR", help="another model to time (default: the demo's, if there)"
    )
    parser.add_argument("--batches", type=int, default=200, help="random batches of each file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; 0: time nothing (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the files (default: none are written)")
    args = parser.parse_args(words)
    if args.sentences and len(args.column) == 1:
        args.column *= len(args.sentences)
    if args.sentences and len(args.column) != len(args.sentences):
        parser.error(f"--column: {len(args.column)} names for {len(args.sentences)} files")
    if args.batches < 1 or args.repeats < 0:
        parser.error("--batches begins at 1, --repeats at 0")
    return args


def main(words: list[str] | None = None) -> int:
    args = arguments_of(words)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    notes = []
    try:
        texts = {
            path.name: [row["sentence"] for row in read_rows(path, {"sentence": column})]
            for path, column in zip(args.sentences, args.column, strict=bool(args.sentences))
        }
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if few := [name for name, own in texts.items() if len(own) < BATCH]:
        print(f"error: --sentences: {few[0]} has less than {BATCH} rows", file=sys.stderr)
        return 2
    if not texts:
        texts = {"written here": list(SENTENCES)}
        notes.append("no file of sentences: the sixteen of `python bench scoring`, so all batches are the same")
    if args.tokenizer is None:
        tokenizer = trained([text for own in texts.values() for text in own])
        notes.append("no tokenizer: a BPE of at most 4000 tokens, trained on the sentences themselves")
    else:
        tokenizer = begun(transformers.AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False))
        notes.append(f"tokens of {args.tokenizer.name}, with one in front of every prompt as OPT has it")

    found, more = measured(texts, tokenizer, args)
    notes += more
    console = Console(width=None if sys.stdout.isatty() else 160)
    for title, head, cells in sections(found):
        table = Table(*head, title=title, title_justify="left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    about = machine() | {"transformers": transformers.__version__, "date": datetime.date.today().isoformat()}
    for note in (*notes, "  ".join(f"{key} {value}" for key, value in about.items())):
        console.print(note)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "scoring.json"
        path.write_text(json.dumps({"about": about, "notes": notes} | found, indent=1) + "\n")
        lines = ["# Scoring a batch of 16 SST-2 prompts", ""]
        lines += [line for part in __doc__.split("\n\n")[1:3] for line in (part.replace("\n", " "), "")]
        lines += [*(f"- {key}: {value}" for key, value in about.items()), *(f"- {note}" for note in notes), ""]
        lines += [line for title, *own in sections(found) for line in (f"## {title}", "", *tables.table(*own))]
        path.with_suffix(".md").write_text("\n".join(lines))
        console.print(f"written to {path} and {path.with_suffix('.md').name}")
    return 0

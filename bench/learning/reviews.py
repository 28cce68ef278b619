"""Movie reviews for SmolLM2-135M-Instruct, in the demo's prompt and in that of SST-2."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaguar.models.adapters import Adapter
from jaguar.models.load import load, select_trainable
from jaguar.tasks import Encoder, TextClassification
from jaguar.tasks.questions import Example
from jaguar.tasks.rows import Row, read_rows
from jaguar.tasks.sampling import drawn, train_and_dev
from learning.works import Work
from registry import ROOT

sys.path.append(str(ROOT / "demo"))
import prepare

LABELS = ("negative", "positive")
# Prompt, and what stands for the labels: the demo's, and MeZO's for SST-2.
PROMPTS = {
    "reviews": (r"Review: {text}\nSentiment:", (" negative", " positive")),
    "sst2": ("{text} It was", (" terrible", " great")),
}


class Reviews(Work):
    """The demo's model learns from the demo's reviews which of two words follows a prompt, 16 rows a step.

    Rows to learn from and dev rows are of the demo's training file, reported rows of its test file. Matrix products
    are in bf16 where the processor has them (`precision` says so); trained weights, the residual stream, normalisation
    and the scores of the two words are fp32.

    Args:
        name: of `PROMPTS`.
        model: a folder with the model, beside which the files of rows lie; None: the demo's, fetched if need be.
    """

    variants = ("norms", "lora", "full")
    grid, points, watched = (0.316, 1.0, 3.16), 6, False
    passes = 240
    batch, dev_rows, held_rows = 16, 192, 256
    window = 4  # batches of similar length are made of as many

    def __init__(self, name: str, model: Path | None = None) -> None:
        super().__init__()
        self.name = name
        if model is None:
            prepare.prepare()
        folder = model or prepare.MODEL
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load(str(folder), dtype="float32", use_cpu=self.device.type == "cpu")
        template, words = PROMPTS[name]
        task = TextClassification(template.replace(r"\n", "\n"), LABELS, words)
        encoder = Encoder(loaded.tokenizer, loaded.kind, loaded.max_length)

        def examples(rows: Sequence[Row]) -> list[Example]:
            return encoder([task.question(row, masked=False) for row in rows])

        pool = read_rows(folder.parent / prepare.TRAIN.name, task.columns)
        train, dev = train_and_dev(pool, None, self.dev_rows, seed=0)
        held = drawn(read_rows(folder.parent / prepare.TEST.name, task.columns), self.held_rows, seed=0)
        self.rows = {"train": examples(train), "dev": examples(dev), "held_out": examples(held)}
        options = {choice.targets for part in self.rows.values() for e in part for choice in e.choices}
        if len(options) != len(words) or any(len(targets) != 1 for targets in options):
            raise ValueError(f"the words {words} are not a token each for the tokenizer of {folder}")
        self._options = torch.tensor([c.targets[0] for c in self.rows["dev"][0].choices], device=self.device)
        self._pad, self._net = loaded.pad_id, loaded.model
        if self.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.precision = "bf16"

    def seeds(self, variant: str) -> int:
        """One run of all weights: its forward passes cost the most."""
        return 1 if variant == "full" else 3

    def network(self, variant: str) -> Any:
        """Weights of normalisation layers, LoRA of rank 8 beside queries and values, or all weights."""
        net = copy.deepcopy(self._net)
        if variant == "lora":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                net = Adapter("lora").applied(net, "causal")
        else:
            select_trainable(net, {"norms": "norm", "full": "all"}[variant])
        for module in net.modules() if self.precision == "bf16" else ():
            frozen = isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters())
            if frozen and module is not net.get_output_embeddings():
                module.to(torch.bfloat16)  # what autocast would do in every forward pass
        return net

    def losses(self, net: Any, seed: int, by_row: bool = False) -> Iterator[Callable[[], Tensor]]:
        """Batches of rows of similar length, every row once before one comes again."""
        rows, generator = self.rows["train"], torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for batch in self._grouped(order, rows, generator):
                yield lambda batch=batch: self._losses(net, batch) if by_row else self._losses(net, batch).mean()

    def _grouped(
        self, order: list[int], rows: Sequence[Example], generator: torch.Generator
    ) -> Iterator[list[Example]]:
        size = self.window * self.batch
        for first in range(0, len(order) - self.batch + 1, size):
            near = sorted((rows[i] for i in order[first : first + size]), key=lambda example: example.length)
            batches = [near[i : i + self.batch] for i in range(0, len(near) - self.batch + 1, self.batch)]
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())

    def held_out(self, net: Any, dev: bool) -> float:
        """Mean cross-entropy over the two words."""
        rows = sorted(self.rows["dev" if dev else "held_out"], key=lambda example: example.length)
        with torch.no_grad():
            parts = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
            return sum(float(self._losses(net, part).sum()) for part in parts) / len(rows)

    def _losses(self, net: Any, batch: Sequence[Example]) -> Tensor:
        """The model's own body reads the prompts, and its head is asked about two words at the last place."""
        longest = max(example.length for example in batch)
        ids = torch.full((len(batch), longest), self._pad)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, example in enumerate(batch):
            ids[row, longest - example.length :] = torch.tensor(example.choices[0].ids)
            mask[row, longest - example.length :] = 1
        labels = torch.tensor([example.label for example in batch], device=self.device)
        base = net.get_base_model() if hasattr(net, "get_base_model") else net
        with self._products():
            body = base.model(ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        head = base.get_output_embeddings().weight[self._options]
        return F.cross_entropy(F.linear(body.last_hidden_state[:, -1].float(), head), labels, reduction="none")

    def _products(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

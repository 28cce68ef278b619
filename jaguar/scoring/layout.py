"""Layout of a batch's tokens for a forward pass: shared prefixes once, and no more padding than is needed.

The public codes score every option in a row of its own, padded to a multiple of eight of the longest. Here the choices
of a question are merged into a tree (a causal LM) or into one row for all options of equal length (a masked LM), and
rows are padded to the longest or packed one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jaguar.tasks.questions import Choice

# A place in a layout: row, column.
Place = tuple[int, int]


@dataclass
class Line:
    """Tokens that are processed together.

    Attributes:
        ids: the tokens.
        depths: place of each token in its own sequence.
        links: for a causal LM the token before each one (-1: none), which is not always its neighbour; for a masked LM
            the number of each token's sequence.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """True if a causal mask alone would let a token see tokens of another sequence."""
        return any(link != place - 1 for place, link in enumerate(self.links))

    def visible(self, causal: bool) -> Tensor:
        """bool (tokens, tokens): the tokens that each token attends to."""
        n = len(self.ids)
        if not causal:
            part = torch.tensor(self.links)
            return part[:, None] == part[None, :]
        seen = torch.eye(n, dtype=torch.bool)
        rows = seen.numpy()  # shares memory; row copies cost half of torch's
        for place, link in enumerate(self.links):
            if link >= 0:
                rows[place] |= rows[link]
        return seen


@dataclass
class Layout:
    """Lines, and where the logits of every choice are read: one place for each target."""

    lines: list[Line]
    places: list[list[Place]]

    @property
    def tokens(self) -> int:
        """Tokens processed, padding included."""
        return len(self.lines) * max(len(line.ids) for line in self.lines)

    def cost(self, width: int) -> int:
        """Multiplications per layer and unit of width: 12 width a token in the matrices, 2 a pair in attention."""
        longest = max(len(line.ids) for line in self.lines)
        return self.tokens * (12 * width + 2 * longest)


def _forest(choices: Sequence[Choice]) -> tuple[Line, list[list[int]]]:
    """All sequences with equal beginnings merged, and the nodes along each sequence."""
    line, children, paths = Line(), dict[tuple[int, int], int](), []
    for choice in choices:
        node, path = -1, []
        for depth, token in enumerate(choice.ids):
            key = (node, token)
            if key not in children:
                children[key] = len(line.ids)
                line.ids.append(token)
                line.depths.append(depth)
                line.links.append(node)
            node = children[key]
            path.append(node)
        paths.append(path)
    return line, paths


def trees(groups: Sequence[Sequence[Choice]]) -> Layout:
    """A line for each group of choices: its tree of prefixes. (For a causal LM that takes masks of one's own.)"""
    lines, places = [], []
    for row, choices in enumerate(groups):
        line, paths = _forest(choices)
        lines.append(line)
        places += [[(row, path[p]) for p in c.positions] for c, path in zip(choices, paths, strict=True)]
    return Layout(lines, places)


def chains(groups: Sequence[Sequence[Choice]]) -> Layout:
    """A line for each sequence that is not the beginning of another one of its group. (For any causal LM.)"""
    lines: list[Line] = []
    places: list[list[Place]] = []
    for choices in groups:
        tree, paths = _forest(choices)
        inner, home = set(tree.links), dict[int, Place]()
        for path in paths:
            if path[-1] not in inner and path[-1] not in home:
                for depth, node in enumerate(path):
                    home.setdefault(node, (len(lines), depth))
                n = len(path)
                lines.append(Line([tree.ids[node] for node in path], list(range(n)), list(range(-1, n - 1))))
        places += [[home[path[p]] for p in c.positions] for c, path in zip(choices, paths, strict=True)]
    return Layout(lines, places)


def masked(groups: Sequence[Sequence[Choice]]) -> Layout:
    """A line for each different input: options of equal length share theirs. (For a masked LM or a classifier.)"""
    lines: list[Line] = []
    places: list[list[Place]] = []
    for choices in groups:
        home: dict[tuple[int, ...], int] = {}
        for choice in choices:
            if choice.ids not in home:
                home[choice.ids] = len(lines)
                n = len(choice.ids)
                lines.append(Line(list(choice.ids), list(range(n)), [0] * n))
            places.append([(home[choice.ids], p) for p in choice.positions])
    return Layout(lines, places)


def packed_trees(groups: Sequence[Sequence[Choice]]) -> Layout:
    """One line for the whole batch: a beginning that all prompts share, an instruction say, is processed once."""
    return trees([[choice for choices in groups for choice in choices]])


def packed_masked(groups: Sequence[Sequence[Choice]]) -> Layout:
    """One line for the whole batch of a masked LM: its sequences one after another."""
    layout, whole, starts = masked(groups), Line(), []
    for number, line in enumerate(layout.lines):
        starts.append(len(whole.ids))
        whole.ids += line.ids
        whole.depths += line.depths
        whole.links += [number] * len(line.ids)
    return Layout([whole], [[(0, starts[row] + column) for row, column in place] for place in layout.places])


def padded_ids(lines: Iterable[Line], fill: int) -> Tensor:
    """int64 (lines, tokens): the ids, short lines filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(line.ids) for line in lines], batch_first=True, padding_value=fill
    )

"""Fuzzed journals: whatever was done to a file, reading, resuming and replaying it keep the laws of test_journal.py.

FUZZ_SECONDS=600 draws new examples for so long, with another seed each time (`make fuzz`); without it there are a few,
always the same.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jaguar
from helpers import journals
from helpers.journals import FIRST, HEADER, SIZE
from jaguar.record import DamagedJournal, Journal, Mark, Record

pytest.importorskip("hypothesis", exc_type=ImportError)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
DATA = journals.file()
HEAD = len(journals.packed(HEADER))
WRITTEN = [thing.pack() for thing in journals.RECORDS]


def fuzzed(law: partial[None], examples: st.SearchStrategy[Any], few: int, share: float) -> None:
    """Tries a law with examples: a few that never change, or new ones for a share of `FUZZ_SECONDS`."""
    tried = [0]

    def try_one(example: Any) -> None:
        tried[0] += 1
        law(example)

    checks = settings(
        max_examples=250 if SECONDS else few,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if SECONDS else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    if not SECONDS:
        return checks(given(examples)(try_one))()
    end, number = time.monotonic() + SECONDS * share, int(time.time())
    while time.monotonic() < end:
        seed(number)(checks(given(examples)(try_one)))()
        number += 1
    print(f"\n{law.func.__name__}: {tried[0]} examples in {SECONDS * share:.0f} s", flush=True)


# -- bytes -------------------------------------------------------------------------------------------------------------

Edit = Callable[[bytes], bytes]


def put(at: int, new: bytes) -> Edit:
    return lambda data: data[: at % (len(data) + 1)] + new + data[at % (len(data) + 1) + len(new) :]


def splice(at: int, n: int, new: bytes) -> Edit:
    return lambda data: data[: at % (len(data) + 1)] + new + data[at % (len(data) + 1) + n :]


def moved(start: int, n: int, to: int) -> Edit:
    """A piece of the file, once more at another place."""

    def edit(data: bytes) -> bytes:
        at, there = start % (len(data) + 1), to % (len(data) + 1)
        return data[:there] + data[at : at + n] + data[there:]

    return edit


def frames(start: int, n: int, to: int) -> Edit:
    return moved(HEAD + start * SIZE, n * SIZE, HEAD + to * SIZE)


places, lengths = st.integers(0, len(DATA)), st.integers(0, 3 * SIZE)
numbers = st.integers(0, 17)
edits = st.one_of(
    st.builds(put, places, st.binary(min_size=1, max_size=8)),
    st.builds(put, places, st.integers(1, 600).map(bytes)),
    st.builds(splice, places, lengths, st.binary(max_size=40)),
    st.builds(splice, numbers.map(lambda i: HEAD + i * SIZE), st.integers(0, 3).map(lambda n: n * SIZE), st.just(b"")),
    st.builds(moved, places, lengths, places),
    st.builds(frames, numbers, st.integers(1, 3), numbers),
    st.integers(0, len(DATA)).map(lambda n: lambda data: data[:n]),
    st.binary(max_size=200).map(lambda tail: lambda data: data + tail),
)


def law_of_bytes(done: list[Edit], path: Path) -> None:
    data = DATA
    for edit in done:
        data = edit(data)
    path.write_bytes(data)
    found = journals.read(path)
    intact = data.startswith(DATA[:HEAD])
    assert found == (journals.expected(data) if intact else None) or (not intact and len(data) >= HEAD)
    if found is not None:
        assert found.records == WRITTEN[: len(found.records)]
    check_resume(found, data, path)


def check_resume(found: journals.Read | None, data: bytes, path: Path) -> None:
    """Resume takes what read takes, cuts off the rest, and goes on; what is refused stays as it is."""
    if found is None:
        with pytest.raises(DamagedJournal):
            Journal.resume(path)
        assert path.read_bytes() == data
        return
    with Journal.resume(path) as journal:
        assert path.read_bytes() == data[: len(data) - found.dropped]
        new = Record(journal.next_step, (), (0.5,))
        if journal._size >= 7 + len(new.pack()):
            journal.append(new)
            found = journals.Read([*found.records, new.pack()], found.marks, 0)
        else:
            found = journals.Read(found.records, found.marks, 0)
    assert journals.read(path) == found


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda _: None)
    return tmp_path / "j"


def test_edited_bytes(path: Path) -> None:
    fuzzed(partial(law_of_bytes, path=path), st.lists(edits, min_size=1, max_size=4), 300, 0.35)


# -- entries with right checksums --------------------------------------------------------------------------------------

floats = st.floats(allow_nan=True, allow_infinity=True)
some = st.lists(floats, max_size=4).map(tuple)
records = st.builds(
    Record,
    st.one_of(st.integers(FIRST - 1, FIRST + 14), st.integers(0, 2**64 - 1)),
    some,
    some,
    skipped=st.booleans(),
    frozen=st.integers(0, 2**32 - 1),
    taus=some,
    errors=some,
    rows=st.integers(0, 2**32 - 1),
)
marks = st.builds(
    Mark,
    st.one_of(st.integers(FIRST - 1, FIRST + 14), st.integers(0, 2**64 - 1)),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.booleans(),
)
payloads = st.one_of(
    records.map(journals.payload),
    marks.map(journals.payload),
    st.tuples(st.integers(0, 255), st.binary(max_size=SIZE - 7)),
    st.sampled_from([journals.payload(thing) for thing in journals.things()]),
)
rights = st.lists(st.tuples(payloads, st.none() | st.integers(0, 2**16 - 1)), max_size=8)


def law_of_entries(drawn: tuple[int, list[Any], bytes], path: Path) -> None:
    n, new, tail = drawn
    head = DATA[:HEAD]
    data = (
        DATA[: HEAD + n * SIZE] + b"".join(journals.entry(head, k, p, length=length) for (k, p), length in new) + tail
    )
    path.write_bytes(data)
    found = journals.read(path)
    assert found == journals.expected(data)
    check_resume(found, data, path)


def test_entries_with_right_checksums(path: Path) -> None:
    fuzzed(partial(law_of_entries, path=path), st.tuples(st.integers(0, 16), rights, st.binary(max_size=100)), 200, 0.2)


# -- headers with right checksums --------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | floats
    | st.text(max_size=8)
    | st.sampled_from([10**400, "Method", "Gaussian", "TwoSided", "float32", "os.system", [2**40, 2**40]]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["kind", "dtype", "name", "group"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def headers(draw: Any, header: Any) -> Any:
    """A header in which some values, wherever they stand, are others, lacking, or there twice."""
    found = copy.deepcopy(header)
    for _ in range(draw(st.integers(1, 3))):
        inner: Any = found
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(inner[key], (dict, list)) and inner[key] and draw(st.integers(0, 4)):
                inner = inner[key]
                continue
            what = draw(st.integers(0, 5))
            if what == 0:
                del inner[key]
            elif what == 1 and isinstance(inner, list):
                inner.append(copy.deepcopy(inner[key]))
            elif what == 2 and isinstance(inner, dict):
                inner[draw(st.text(max_size=6))] = copy.deepcopy(inner[key])
            else:
                inner[key] = copy.deepcopy(draw(plain))  # samples are shared
            break
    return found


def law_of_headers(header: Any, path: Path) -> None:
    """Read or refused; what is read was written for it."""
    head = journals.packed(header)
    size = header.get("entry")
    fits = isinstance(size, int) and 80 <= size <= 2**16
    data = head + b"".join(
        journals.entry(head, *journals.payload(thing), size=size if fits else SIZE) for thing in journals.things()
    )
    path.write_bytes(data)
    found = journals.read(path)
    if found is not None:
        assert found == journals.expected(data)
    check_resume(found, data, path)


def test_headers_with_right_checksums(path: Path) -> None:
    fuzzed(partial(law_of_headers, path=path), headers(HEADER), 200, 0.15)


# -- replay ------------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
    for number, p in enumerate(made.parameters()):
        p.copy_(torch.linspace(-1.0, 1.0, p.numel()).reshape(p.shape) + number)
    return made


def state_of(of: nn.Module) -> list[Any]:
    return [(p.requires_grad, p.clone()) for p in of.parameters()]


def ran(options: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a run."""
    path.unlink(missing_ok=True)
    of = model()
    params = [(name, p) for name, p in of.requires_grad_().named_parameters()]
    optimizer = jaguar.JaguarSignSGD(params, **options)
    with Journal.follow(optimizer, path) as journal:
        for _ in range(3):
            optimizer.step(lambda: of(torch.ones(3, 4).cumsum(0)).square().mean(1))
    with Journal.read(path) as journal:
        return journal.header, list(journal)


OPTIONS: list[dict[str, Any]] = [{"lr": 1e-3, "n_directions": 2}, {"lr": "auto", "tau": "auto"}]


@st.composite
def runs(draw: Any, of: list[tuple[dict[str, Any], list[Record]]]) -> tuple[Any, list[Record], bool]:
    """A header and records, one of them another; True: only records are."""
    header, kept = draw(st.sampled_from(of))
    kept = list(kept)
    if draw(st.booleans()):
        return draw(headers(header)), kept, False
    values = {name: getattr(kept[-1], name) for name in Record.__slots__}
    for name in draw(
        st.lists(st.sampled_from(["lrs", "losses", "skipped", "frozen", "taus", "errors", "rows"]), min_size=1)
    ):
        old = values[name]
        if isinstance(old, tuple):
            new = st.lists(floats, min_size=len(old), max_size=len(old)).map(tuple) | some
        else:
            new = st.booleans() if name == "skipped" else st.integers(0, 2**32 - 1)
        values[name] = draw(new)
    return header, [*kept[:-1], Record(**values)], True


def law_of_replays(drawn: tuple[Any, list[Record], bool], path: Path) -> None:
    """Replayed, or refused with a ValueError; the model is then as before, but for steps that were whole."""
    header, records, same_header = drawn
    size = header.get("entry")
    fits = isinstance(size, int) and 64 <= size <= 2**16
    path.write_bytes(journals.file(header, records, size if fits else 4096))
    of = model()
    before = state_of(of)
    try:
        jaguar.replay(of, path)
    except ValueError:
        now = state_of(of)
        assert [flag for flag, _ in now] == [flag for flag, _ in before]
        if not same_header:
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(now, before, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_replays_of_other_headers_and_records(path: Path) -> None:
    torch.set_num_threads(1)
    of = [ran(options, path) for options in OPTIONS]
    fuzzed(partial(law_of_replays, path=path), runs(of), 20, 0.3)


def test_the_laws_can_fail(path: Path) -> None:
    """A law that is no law is found out."""

    def no_law(example: list[Edit], path: Path) -> None:
        law_of_bytes(example, path)
        assert journals.read(path) is not None

    with pytest.raises(AssertionError):
        fuzzed(partial(no_law, path=path), st.lists(edits, min_size=1, max_size=4), 500, 0.01)

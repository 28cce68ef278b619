"""Records: their bytes, damage, what does not fit; and the losses that come out of closures."""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib

import pytest
import torch

from helpers.laws import TAU
from helpers.steps import warned
from helpers.tensors import bits, weights
from jaguar import JaguarSignSGD
from jaguar.record import Record

RECORDS = {
    "plain": Record(0, (1e-4,), (0.5, 0.25)),
    "late": Record(2**64 - 1, (1e-4, 3e-7, 0.0), (0.1, 0.2, 0.3, 0.4)),
    "skipped": Record(3, (1e-4,), (math.inf, 0.25), skipped=True),
    "extremes": Record(1, (5e-324, 1.7e308), (-0.0, 0.1 + 0.2, -1e-310)),
    "no-losses": Record(1, (), ()),
}


@pytest.mark.parametrize("case", RECORDS)
def test_round_trip(case: str) -> None:
    record = RECORDS[case]
    again = Record.unpack(record.pack())
    assert again == record and again.pack() == record.pack()
    assert [math.copysign(1, v) for v in again.losses] == [math.copysign(1, v) for v in record.losses]


def test_nan_survives() -> None:
    again = Record.unpack(Record(1, (1.0,), (math.nan, 1.0), skipped=True).pack())
    assert math.isnan(again.losses[0]) and again.losses[1] == 1.0 and again.skipped


def test_layout() -> None:
    """u64 step, u8 flags, u16 rates, u16 losses, doubles, CRC-32 of all before it; little-endian without padding."""
    body = struct.pack("<QBHH3d", 2**40 + 3, 1, 1, 2, 1e-4, 0.5, math.inf)
    assert Record(2**40 + 3, (1e-4,), (0.5, math.inf), skipped=True).pack() == body + struct.pack(
        "<I", zlib.crc32(body)
    )


@pytest.mark.parametrize("case", ["plain", "late"])
def test_every_flipped_bit_is_noticed(case: str) -> None:
    data = RECORDS[case].pack()
    for i in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        with pytest.raises(ValueError, match="record"):
            Record.unpack(bytes(damaged))


@pytest.mark.parametrize("case", RECORDS)
def test_cut_short_or_too_long(case: str) -> None:
    data = RECORDS[case].pack()
    for damaged in [data[:n] for n in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(ValueError, match="bytes"):
            Record.unpack(damaged)


def test_mean_loss() -> None:
    assert Record(0, (), (1.0, 2.0, 4.0, 5.0)).loss == 3.0
    assert Record(0, (), (1e16, 1.0, -1e16, 1.0)).loss == 0.5, "summed exactly"
    assert math.isnan(Record(0, (), (1.0, math.inf), skipped=True).loss)
    assert Record(0, (), (1.5e308, 1.5e308)).loss == 1.5e308, "whose sum is more than a double holds"


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS["plain"].step = 3  # type: ignore[misc]
    assert len({RECORDS["plain"], Record(0, (1e-4,), (0.5, 0.25))}) == 1


def run(n: int) -> tuple[torch.Tensor, JaguarSignSGD, list[Record]]:
    x = torch.linspace(-1, 1, 40).requires_grad_()
    opt = JaguarSignSGD([x], coordinates=0.5, lr=1e-2)
    records = []
    for _ in range(n):
        opt.step(lambda: (x**3).sum())
        records.append(opt.last_record)
    return x, opt, records


def test_bytes_of_a_run_are_enough_to_replay_it() -> None:
    x, _, records = run(20)
    fresh, opt, _ = run(0)
    for data in [record.pack() for record in records]:
        opt.apply_(Record.unpack(data))
    assert torch.equal(x, fresh)
    assert all(r.losses == tuple(float(torch.tensor(v, dtype=torch.float32)) for v in r.losses) for r in records)
    assert [r.step for r in records] == list(range(20))
    assert len(records[0].pack()) == 13 + 8 * 3 + 4


def foreign(record: Record) -> dict[str, tuple[Record, str]]:
    return {
        "future": (dataclasses.replace(record, step=6), "record is of step 6.*finished 5"),
        "past": (dataclasses.replace(record, step=4), "record is of step 4.*finished 5"),
        "rates": (dataclasses.replace(record, lrs=(1.0, 2.0)), "2 learning rates for 1"),
        "no-rates": (dataclasses.replace(record, lrs=()), "0 learning rates for 1"),
        "negative-rate": (dataclasses.replace(record, lrs=(-1.0,)), "at least 0"),
        "nan-rate": (dataclasses.replace(record, lrs=(math.nan,)), "finite"),
        "losses": (dataclasses.replace(record, losses=(1.0, 2.0, 3.0)), "3 losses"),
        "no-losses": (dataclasses.replace(record, losses=()), "0 losses"),
        "unmarked": (dataclasses.replace(record, losses=(1.0, math.inf)), "non-finite"),
    }


@pytest.mark.parametrize("case", foreign(RECORDS["plain"]))
def test_a_record_that_does_not_fit_changes_nothing(case: str) -> None:
    x, opt, _ = run(5)
    good = opt.measure(lambda: (x**3).sum())
    before = (x.detach().clone(), opt.state[x]["momentum"].clone())
    bad, message = foreign(good)[case]
    with pytest.raises(ValueError, match=message):
        opt.apply_(bad)
    assert torch.equal(x, before[0]) and torch.equal(opt.state[x]["momentum"], before[1]) and opt.steps_done == 5
    opt.apply_(good)
    assert opt.steps_done == 6 and not torch.equal(x, before[0])


@pytest.mark.parametrize(
    ("taus", "errors", "message"),
    [
        *(((tau,), (0.1,), "positive in fp32") for tau in (5e-324, 1e-46, 0.0, -1.0, math.inf, math.nan)),
        *(((1e-3,), (error,), "squared standard errors") for error in (-0.1, math.inf, math.nan)),
    ],
)
def test_numbers_of_automatic_steps_that_no_step_has(
    taus: tuple[float, ...], errors: tuple[float, ...], message: str
) -> None:
    good = Record(0, (0.1,), (1.0, 2.0), taus=(1e-45,), errors=(0.0,), rows=2)
    numbers = {"step": 0, "n_lrs": 1, "n_losses": 2, "n_errors": 1}
    good.check(**numbers)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, taus=taus, errors=errors).check(**numbers)


@pytest.mark.parametrize("thing", [None, 3, (5, (1.0,), (1.0, 2.0)), b"bytes"], ids=["none", "int", "tuple", "bytes"])
def test_only_records_are_applied(thing: object) -> None:
    _, opt, _ = run(1)
    with pytest.raises(TypeError, match="Record"):
        opt.apply_(thing)
    assert opt.steps_done == 1


def graphed(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return x.sum()


ODD_LOSSES = {
    "bfloat16": (lambda x: x.sum().bfloat16(), r"bfloat16.*1\.95"),
    "float16": (lambda x: x.sum().half(), r"float16.*0\.24"),
    "shape": (lambda x: x.sum().reshape(1), r"shape \(1,\)"),
    "graph": (graphed, "graph"),
}


@pytest.mark.parametrize("case", ODD_LOSSES)
def test_odd_losses_warn_once(case: str) -> None:
    make_loss, message = ODD_LOSSES[case]
    x = weights(torch.float32, 50).requires_grad_()
    opt = JaguarSignSGD([x], tau=TAU)
    with pytest.warns(UserWarning, match=message):
        opt.step(lambda: make_loss(x))
    assert not warned(opt, lambda: make_loss(x), 3) and opt.steps_done == 4


BAD_LOSSES = {
    "matrix": (lambda x: x.reshape(5, 10), ValueError, r"one number, or a vector.*\(5, 10\)"),
    "nothing": (lambda x: None, TypeError, "NoneType"),
    "text": (lambda x: "0.5", TypeError, "str"),
    "tuple": (lambda x: (x.sum(), x), TypeError, "tuple"),
    "empty": (lambda x: x[:0], ValueError, "one number"),
    "bool": (lambda x: True, TypeError, "bool"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_raise_and_restore(case: str) -> None:
    make_loss, error, message = BAD_LOSSES[case]
    x = weights(torch.float32, 50).requires_grad_()
    before, opt = bits(x), JaguarSignSGD([x], tau=TAU)
    with pytest.raises(error, match=message):
        opt.step(lambda: make_loss(x))
    assert bits(x) == before and opt.steps_done == 0


def test_a_plain_number_is_a_loss() -> None:
    x = weights(torch.float32, 50).requires_grad_()
    opt, twin = JaguarSignSGD([x], tau=TAU), JaguarSignSGD([x.detach().clone().requires_grad_()], tau=TAU)
    twin_x = twin.slots[0].tensor
    opt.step(lambda: x.sum().item())
    twin.step(lambda: twin_x.sum())
    assert bits(x) == bits(twin_x)


def test_the_closure_must_be_callable() -> None:
    x = weights(torch.float32, 50).requires_grad_()
    with pytest.raises(TypeError, match="callable"):
        JaguarSignSGD([x]).step(x.sum())


@pytest.mark.parametrize(("size", "steps", "expected"), [(100, 9, 0), (100, 10, 1), (100, 25, 1), (99, 25, 0)])
def test_ten_bit_equal_steps_warn(size: int, steps: int, expected: int) -> None:
    opt = JaguarSignSGD([torch.zeros(size, requires_grad=True)], coordinates=1.0)
    messages = warned(opt, lambda: torch.tensor(0.5), steps)
    assert len(messages) == expected and all("bit-equal" in m for m in messages)


def test_bit_equal_steps_must_be_in_a_row() -> None:
    x = torch.zeros(200, requires_grad=True)
    opt, t = JaguarSignSGD([x], coordinates=1.0), [0]

    def closure() -> torch.Tensor:
        t[0] += 1
        return torch.tensor(float(t[0] == 17))

    assert not warned(opt, closure, 17)


@pytest.mark.parametrize("size", [3, 200])
def test_ten_zero_losses_warn(size: int) -> None:
    opt = JaguarSignSGD([torch.zeros(size, requires_grad=True)], coordinates=1.0)
    assert not warned(opt, lambda: torch.zeros(()), 9)
    with pytest.warns(UserWarning, match=r"exactly 0\.0"):
        opt.step(lambda: torch.zeros(()))

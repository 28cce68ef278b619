"""Models of FSDP2 beside the same ones unsharded: what the processes of `test_fully_sharded` do."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.laws import CONFIGS, built
from helpers.tensors import bits
from jaguar import ZOSGD, ForwardGrad, JaguarMuon, JaguarSignSGD, Journal, ZerothOrder
from jaguar.method import params
from jaguar.optimizers import fully_sharded
from jaguar.optimizers.replay import replay

ROWS = torch.arange(10).view(2, 5)
# Of those rows that move one tensor while its module runs, or are dual numbers in it, and are refused.
WHOLE = {"gaussian-module", "rademacher-module", "forward-grad"}
SHARDED = [config for config in CONFIGS if config not in WHOLE]


class Net(nn.Module):
    """Tied weights, a padding row, rows that two processes cannot halve, and a tensor of which one has nothing."""

    def __init__(self, dtype: torch.dtype, padding: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6, padding_idx=9 if padding else None)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) * 0.3)
        self.norm, self.one = nn.LayerNorm(6), nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) * self.fixed
        h = h + self.down(torch.tanh(self.up(h)))
        for expert in self.experts:
            h = h + torch.tanh(h @ expert)
        return nn.functional.cross_entropy(self.head(self.norm(h) * self.one).float().flatten(0, 1), x.flatten())


def columns(parameter: nn.Parameter) -> Shard:
    """Along the second dimension, where it is even."""
    even = parameter.dim() > 1 and parameter.shape[1] % dist.get_world_size() == 0
    return Shard(1 if even else 0)


def sharded(net: Net, mesh: DeviceMesh | None = None, by_column: bool = False, reshard: bool | None = None) -> Net:
    given: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    for module in (net.up, net.down, net):
        fully_shard(module, shard_placement_fn=columns if by_column else None, **given)
    return net


def made(config: str, net: nn.Module, **more: Any) -> ZerothOrder:
    cls, options = CONFIGS[config]
    named = list(net.named_parameters())
    options = {"tau": 2.0**-6, "seed": 3, "backend": "reference"} | options | more
    options |= {"layers": ("up", "down")} if config == "layers" else {}
    options |= {"project": ("up", "experts")} if config == "dizo" else {}
    return built(cls, [{"params": named}] if cls.by_role else named, options)


def full(net: nn.Module) -> dict[str, bytes]:
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = net.named_parameters()
    return {name: bits(p.full_tensor() if isinstance(p, DTensor) else p) for name, p in named}


def differences(
    config: str,
    dtype: torch.dtype,
    steps: int = 3,
    padding: bool = False,
    group: Any = None,
    n_directions: int | None = None,
    **how: Any,
) -> list[Any]:
    """Where the run of the shards is not that of the whole, record by record and parameter by parameter."""
    whole, parts = Net(dtype, padding), sharded(Net(dtype, padding), **how)
    more = {} if n_directions is None else {"n_directions": n_directions}
    one, other = made(config, whole, **more), made(config, parts, direction_group=group, **more)
    start = full(whole)
    for _ in range(steps):
        one.step(lambda: whole(ROWS))
        other.step(lambda: parts(ROWS))
        if one.last_record != other.last_record:
            return [one.last_record, other.last_record]
    if one.lost_share != other.lost_share:
        return [one.lost_share, other.lost_share]
    got, wanted = full(parts), full(whole)
    assert wanted != start and list(got) == list(wanted)
    return [name for name in wanted if got[name] != wanted[name]]


class Sent(TorchDispatchMode):
    """Counts collective operations: by whom (FSDP2 "c10d", DTensor "_c10d_functional"), and the bytes of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and ("gather" in func.__name__ or "reduce" in func.__name__):
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            self.calls.append((func.namespace, max(t.numel() * t.element_size() for t in tensors)))
        return result


def counted(function: Callable[[], Any]) -> list[tuple[str, int]]:
    with Sent() as sent:
        function()
    return sent.calls


def sent_in_a_step(config: str, dtype: torch.dtype, **more: Any) -> tuple[Any, Any]:
    """What two forward passes send, and what a step of two evaluations sends."""
    net = sharded(Net(dtype, False), reshard=True)
    optimizer = made(config, net, **more)
    optimizer.step(lambda: net(ROWS))  # the first counts what rounding swallows
    with torch.no_grad():
        passes = counted(lambda: (net(ROWS), net(ROWS)))
    return passes, counted(lambda: optimizer.step(lambda: net(ROWS)))


def stale(reshard: bool | None, guarded: bool) -> tuple[list[float], list[float], list[bool]]:
    """Losses of two steps of the whole and of the shards; and whether the model shows the moved weights afterwards."""
    whole, parts = Net(torch.float32, False), sharded(Net(torch.float32, False), reshard=reshard)
    one, other = (
        JaguarSignSGD(net.named_parameters(), lr=1e-2, coordinates=0.3, backend="reference") for net in (whole, parts)
    )
    losses: tuple[list[float], list[float]] = [], []
    moved = []
    with _unguarded() if not guarded else warnings.catch_warnings():
        for _ in range(2):
            for net, optimizer, found in ((whole, one, losses[0]), (parts, other, losses[1])):
                optimizer.step(lambda net=net: net(ROWS))
                found += optimizer.last_record.losses
            with torch.no_grad():
                moved.append(bool(parts(ROWS) == whole(ROWS)))
        # An evaluation between the two halves of a step leaves a copy as well.
        record = one.measure(lambda: whole(ROWS))
        other.measure(lambda: parts(ROWS))
        with torch.no_grad():
            parts(ROWS)
        one.apply_(record)
        other.apply_(record)
        with torch.no_grad():
            moved.append(bool(parts(ROWS) == whole(ROWS)))
    return *losses, moved


@contextmanager
def _unguarded() -> Iterator[None]:
    with patch.object(fully_sharded.FullySharded, "reshard", lambda self: None):
        yield


def mutated() -> list[Any]:
    """`differences`, with parts whose place is ignored."""
    real = params._part

    def broken(slot: Any, shard: Any) -> Any:
        return dataclasses.replace(real(slot, shard), start=0)

    with patch.object(params, "_part", broken):
        return differences("fraction", torch.float32)


def continued(config: str) -> tuple[bool, str]:
    """Whether a run that is saved and loaded goes on as one that is not; and what loading another rank's state says."""
    nets = [sharded(Net(torch.bfloat16, False)) for _ in range(2)]
    one, other = (made(config, net) for net in nets)
    one.step(lambda: nets[0](ROWS))
    other.step(lambda: nets[1](ROWS))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = made(config, nets[0])
    again.load_state_dict(loaded)
    again.step(lambda: nets[0](ROWS))
    other.step(lambda: nets[1](ROWS))
    boxes: list[Any] = [None, None]
    dist.all_gather_object(boxes, loaded)
    return full(nets[0]) == full(nets[1]), said(
        lambda: made(config, nets[0]).load_state_dict(boxes[1 - dist.get_rank()])
    )


def replayed(config: str) -> bool:
    """Whether the journal of the shards leads to the same weights, in a whole model and in other shards."""
    nets = [sharded(Net(torch.bfloat16, False)), Net(torch.bfloat16, False), sharded(Net(torch.bfloat16, False))]
    optimizers = [made(config, net) for net in nets]
    path = Path(tempfile.mkdtemp(), "journal.jaguar")
    with Journal.follow(optimizers[0], path):
        for _ in range(3):
            optimizers[0].step(lambda: nets[0](ROWS))
    for optimizer in optimizers[1:]:
        replay(optimizer, path)
    return full(nets[0]) == full(nets[1]) == full(nets[2])


def said(function: Callable[[], Any]) -> str:
    """What the error of a call says."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,))
    net = sharded(Net(torch.float32, False))
    values = torch.zeros(4, 4)
    partial = DTensor.from_local(values, mesh, [Partial()])
    cut = distribute_tensor(values, mesh, [Shard(0)])
    found = {
        "module": said(lambda: ZOSGD(net.named_parameters(), restore="module")),
        "dual numbers": said(lambda: ForwardGrad(net.named_parameters())),
        "partial": said(lambda: ZOSGD([("w", partial)])),
        "shards": said(lambda: ZOSGD([("w", cut.requires_grad_())], shards={"w": params.Shard((4, 4))})),
    }
    with torch.no_grad():
        net(ROWS)
    late = ZOSGD(net.named_parameters(), backend="reference")  # of the root's copies, which it kept
    found["copies"] = said(lambda: late.step(lambda: net(ROWS)))
    moved = sharded(Net(torch.float32, False))
    optimizer = ZOSGD(moved.named_parameters(), backend="reference")
    moved.double()
    found["moved"] = said(lambda: optimizer.step(lambda: moved(ROWS)))
    return found


def by_hand(dtype: torch.dtype) -> list[Any]:
    """DTensors without FSDP2, cut along uneven columns, and replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = [torch.randn(5, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    placements = [Shard(1), Replicate(), Shard(0)]
    whole = [(f"p{i}", v.clone().requires_grad_()) for i, v in enumerate(values)]
    parts = [
        (f"p{i}", nn.Parameter(distribute_tensor(v, mesh, [p])))
        for i, (v, p) in enumerate(zip(values, placements, strict=True))
    ]
    found = []
    for cls, more in ((JaguarSignSGD, {"coordinates": 0.3}), (JaguarMuon, {"coordinates": 0.3})):
        for named in (whole, parts):
            groups: Any = [{"params": named, "ns": True}] if cls is JaguarMuon else named
            optimizer = cls(groups, lr=1e-2, tau=2.0**-4, backend="reference", **more)

            def closure(named: Any = named) -> Tensor:
                tensors = [p.full_tensor() if isinstance(p, DTensor) else p for _, p in named]
                return sum(((t.float() - 0.1 * i) ** 2).sum() for i, t in enumerate(tensors))

            for _ in range(3):
                optimizer.step(closure)
        found += [n for (n, p), (_, q) in zip(whole, parts, strict=True) if bits(p) != bits(q.full_tensor())]
    return found


def alone() -> list[Any]:
    """One row, of which the second process has nothing: as long as a guard waits for coordinates that never come."""
    whole, parts = (nn.Linear(5, 1, bias=False) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    fully_shard(parts)
    one, other = (JaguarSignSGD(net.named_parameters(), coordinates=1.0, backend="reference") for net in (whole, parts))
    for _ in range(12):
        one.step(lambda: whole(torch.ones(5)).square().mean())
        other.step(lambda: parts(torch.ones(5)).square().mean())
    return [] if full(whole) == full(parts) else [full(whole), full(parts)]


def cases(rank: int) -> dict[str, Any]:
    """All that two processes find out for the default suite."""
    warnings.filterwarnings("ignore", "tau is too small")
    found: dict[str, Any] = {}
    for i, config in enumerate(SHARDED):  # `every_case` has each of them in all forms
        found[config] = differences(config, (torch.float32, torch.bfloat16)[i % 2], by_column=i % 4 > 1)
    found["padding row"] = differences("all", torch.bfloat16, padding=True)
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        found[f"mesh {shape}"] = differences("muon", torch.float32, mesh=mesh)
        shared = {"mesh": mesh, "group": mesh.get_group("copies"), "n_directions": 3}
        found[f"mesh {shape}, directions"] = differences("fraction", torch.float32, **shared)
    found["one row"] = alone()
    found["by hand"] = by_hand(torch.bfloat16)
    found["start ignored"] = mutated()
    for reshard in (None, False, True):
        found[f"stale {reshard} guarded"] = stale(reshard, True)
        found[f"stale {reshard} unguarded"] = stale(reshard, False)
    found |= {f"continued {config}": continued(config) for config in ("all", "muon", "dizo")}
    found |= {f"replayed {config}": replayed(config) for config in ("fraction", "muon", "dizo")}
    found["refused"] = refused()
    for config in ("fraction", "adamm", "muon", "zo-muon"):
        found[f"sent {config}"] = sent_in_a_step(config, torch.float32)
    return found


def every_case(rank: int) -> dict[str, Any]:
    """Every method in every dtype, cut either way, on a mesh of copies and parts where there are four processes."""
    warnings.filterwarnings("ignore", "tau is too small")
    meshes: dict[str, Any] = {"one dimension": None}
    found: dict[str, Any] = {}
    if dist.get_world_size() == 4:
        mesh = meshes["two dimensions"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
        twice = distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0), Shard(1)])
        words = said(lambda: ZOSGD([("w", twice)]))
        found["cut twice"] = [] if "parameter 'w' is a DTensor, and it is placed as (S(0), S(1))" in words else [words]
        for config in ("fraction", "gaussian-copy", "muon"):
            shared = {"mesh": mesh, "group": mesh.get_group("copies"), "n_directions": 3}
            found[f"{config} directions"] = differences(config, torch.float32, **shared)
    return found | {
        f"{config} {dtype} {name} {by_column}": differences(config, dtype, mesh=mesh, by_column=by_column, reshard=True)
        for config in SHARDED
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for name, mesh in meshes.items()
        for by_column in (False, True)
    }

"""Several processes with a model each: they take the steps of one process, to the bit, or stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from helpers import processes, replicas
from helpers.trainers import arguments
from jaguar import Journal
from jaguar.trainer.replicas import all_rows, disagreeing


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return processes.run(replicas.cases, 2, tmp_path_factory.mktemp("two"), True)


def expect_the_runs_of_one(found: list[dict[str, Any]], folder: Path) -> None:
    world = len(found)
    wanted = {
        "rows": replicas.trained(
            folder, gradient_accumulation_steps=world
        ),  # the micro-batches in the order of the ranks
        "few directions": replicas.trained(folder, **replicas.FEW_DIRECTIONS),
        "many directions": replicas.trained(folder, **replicas.MANY_DIRECTIONS),
    }
    assert [{name: one[name] for name in wanted} for one in found] == [wanted] * world


def test_two_processes_take_the_steps_of_one(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """All 200 records, and the weights: of rows that are spread, and of directions, whose batches may be short."""
    expect_the_runs_of_one(two, tmp_path)


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    (tmp_path / "four").mkdir()
    found = processes.run(replicas.cases, 4, tmp_path / "four", False)
    expect_the_runs_of_one(found, tmp_path)
    assert {one["noticed"].split(" had other")[0] for one in found} == {"ReplicasDiffer: after 4 steps process 3 of 4"}


def test_a_process_that_disagrees_stops_all(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["noticed"].startswith("ReplicasDiffer: after 4 steps process 1 of 2 had other weights")
        assert found["noticed at the end"].startswith("ReplicasDiffer: after 5 steps process 1 of 2 had other weights")
    assert (two[0]["ended"], two[1]["ended"]) == ([(5, False)], [])  # the first one's journal has not come to its end
    assert two[0]["not looked"] != two[1]["not looked"]


def test_directions_of_different_rows_stop_all(two: list[dict[str, Any]]) -> None:
    assert all("after 0 steps process 1 of 2 had other rows" in found["other rows"] for found in two)


def test_a_sharded_model_is_refused(two: list[dict[str, Any]]) -> None:
    words = "down.bias is sharded: every process of a ZOTrainer has a whole model"
    assert all(words in found["sharded"] for found in two)


def test_an_optimizer_and_its_trainer_share_the_same(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "has no direction_group, and direction_parallel needs one" in found["directions and no group"]
        assert "give direction_parallel=True" in found["rows and a group"]


@pytest.mark.parametrize(
    ("found", "wrong"),
    [("aaa", []), ("aab", [2]), ("baa", [0]), ("ab", [1]), ("abc", [1, 2]), ("bbaac", [2, 3, 4]), ("a", [])],
)
def test_the_majority_is_right_and_without_one_the_first(found: str, wrong: list[int]) -> None:
    assert disagreeing([one.encode() for one in found]) == wrong


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(replicas.rows())


def test_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="direction_parallel needs a data set with a length"):
        all_rows(DataLoader(Stream()))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"optim_zo": "fo-sgd", "tau": None, "coordinates": None}, "the first-order baseline has no directions"),
        ({"train_sampling_strategy": "batch_rebalance"}, "with direction_parallel all have the same rows"),
        ({"check_replicas_steps": -1}, "check_replicas_steps=-1: give a number of steps, or 0 for never"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, direction_parallel=True, **given)


def test_one_process_shares_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="direction_parallel has no effect: there is one process"):
        assert arguments(tmp_path, direction_parallel=True).row_processes == 1


def test_processes_that_died_go_on_from_one_journal(tmp_path: Path) -> None:
    """Replayed steps are evaluated in none; the first process's journal is that of all."""
    (tmp_path / "two").mkdir()
    found = processes.run(replicas.going_on, 2, tmp_path / "two", str(tmp_path))
    assert found[0].keys() == {"no checkpoint", "checkpoint", "directions"}
    for name, (weights, passes) in found[0].items():
        assert len(weights) == 2 and weights[0] == weights[1] and found[1][name][0] == weights
        # Four steps are left, of three directions with two evaluations each, which two processes may share; a few more
        # evaluations tell how the model divides its loss.
        least, most = (2, 4) if name == "directions" else (6, 6)
        assert 4 * least <= passes < 5 * most
    with Journal.read(tmp_path / "no checkpoint" / "died" / "journal.jaguar") as journal:
        assert journal.ended and len(journal) == 12

"""Direction parallel: a group of processes takes the steps of one that evaluates all directions, to the bit."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import direction_groups, processes


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes found, and the first two of them as a pair."""
    return processes.run(direction_groups.cases, 3, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("config", direction_groups.CONFIGS)
def test_a_group_takes_the_steps_of_one_process(three: list[dict[str, Any]], config: str, world: int) -> None:
    """Records, parameters, state; 1, 2, 4 or 5 directions; each process evaluates its share of them."""
    found = [{k: v for k, v in one.items() if k.startswith(f"{config} ") and k.endswith(f" {world}")} for one in three]
    assert [len(one) for one in found[:world]] == [2] * world
    assert all(wrong == [] for one in found for wrong in one.values())


def test_the_law_notices_another_order(three: list[dict[str, Any]]) -> None:
    assert all(found["out of order"] for found in three)


def test_all_make_the_record_of_the_first(three: list[dict[str, Any]]) -> None:
    assert len({found["other bits"] for found in three}) == 1


def test_a_loss_that_is_not_finite_skips_the_step_of_all(three: list[dict[str, Any]]) -> None:
    stayed, n_skipped, *_ = three[0]["skipped"]
    assert stayed and n_skipped == 1 and all(found["skipped"] == three[0]["skipped"] for found in three)


def test_all_fail_with_one_and_all_can_go_on(three: list[dict[str, Any]]) -> None:
    own = "process 1 of the direction group failed while it measured step 0"
    assert [found["failed"][0] for found in three] == [own, "this evaluation fails", own]
    assert all(found["failed"][1] and found["failed"][2:] == three[0]["failed"][2:] for found in three)


def test_processes_at_different_steps_are_noticed(three: list[dict[str, Any]]) -> None:
    for rank, other in ((0, 2), (1, 2), (2, 0)):
        assert f"process {other} of the direction group is at step {int(other == 2)}" in three[rank]["apart"]


def test_who_is_left_alone_ends_within_the_timeout(three: list[dict[str, Any]]) -> None:
    for found in three[:2]:
        unmoved, words, seconds = found["left alone"]
        assert unmoved and words and seconds < direction_groups.PATIENCE + 60


def test_a_copy_evaluates_all_by_itself(three: list[dict[str, Any]]) -> None:
    assert all(found["copied"] for found in three)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("walk", "measures the directions of a step apart, not possible with restore='walk'"),
        ("automatic", "measures the directions of a step apart, not possible with an automatic step"),
        ("conservative", "measures the directions of a step apart, not possible with the estimator 'conservative'"),
        ("two places", "measures the directions of a step apart, not possible with the estimator 'two-places'"),
        ("dual numbers", "measures the directions of a step apart, not possible with the estimator 'forward-mode'"),
        ("search", "each evaluation of a search follows from those before it"),
        ("no group", "direction_group must be a torch.distributed.ProcessGroup"),
    ],
)
def test_what_cannot_be_measured_apart_is_refused(three: list[dict[str, Any]], case: str, match: str) -> None:
    assert all(match in found["refused"][case] for found in three)

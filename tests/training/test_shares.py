"""Who does what of shared work."""

import pytest

from hf_poss.training.shares import Share


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 3])
def test_every_item_has_one_owner(count):
    owners = [[share for share in range(count) if Share(share, count).owns(item)] for item in range(10)]
    assert all(len(of_item) == 1 for of_item in owners)
    loads = [owners.count([share]) for share in range(count)]
    assert max(loads) - min(loads) <= 1


def test_one_process_does_all():
    assert Share.of_process() == Share(0, 1)


def test_processes_of_a_launch_and_launches_multiply(monkeypatch):
    """Two launches of three processes are six processes, each with a share of its own."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = set()
    for launch in range(2):
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            shares.add(Share.of_process(launch, 2))
    assert shares == {Share(index, 6) for index in range(6)}


def test_one_process_of_a_machine_draws_the_bar(monkeypatch):
    assert Share().shows_progress
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not Share().shows_progress


@pytest.mark.parametrize(("shard", "count"), [(2, 2), (-1, 2), (0, 0), (None, 2), (1, None)])
def test_shards_that_do_not_exist_are_refused(shard, count):
    with pytest.raises(ValueError, match="--shard"):
        Share.of_process(shard, count)

from collections import deque

import pytest
import torch

from mmkd.distillers import memory
from mmkd.distillers.memory import ClassMemory, enqueue


def random_rows(number, classes, start=0):
    """Rows whose two channels say their class and when they came, and which of them are there."""
    when = start + torch.arange(number).float()[:, None].expand(-1, classes)
    rows = torch.stack([torch.arange(classes).float().expand(number, -1), when], 2)
    return rows, torch.rand(number, classes) < torch.tensor([0.0, 0.2, 0.5, 1.0])[:classes]


def entries(keys, count):
    """What each class's ring has, as sets of rows."""
    return [
        {tuple(row) for row in ring[: min(number, len(ring))].tolist()} for ring, number in zip(keys, count.tolist())
    ]


@pytest.mark.parametrize('number', [1, 3, 8, 30])
def test_queues_as_plain_loops(number):
    """Rings of 8 that wrap, with fewer and with more rows at a time than they have places."""
    keys, count = torch.zeros(4, 8, 2), torch.zeros(4, dtype=torch.long)
    queues = [deque(maxlen=8) for _ in range(4)]
    total = [0] * 4
    for step in range(20):
        rows, there = random_rows(number, 4, step * number)
        enqueue(keys, count, rows, there)
        for row, valid in zip(rows.tolist(), there.tolist()):
            for k in range(4):
                if valid[k]:
                    queues[k].append(tuple(row[k]))
                    total[k] += 1
        assert count.tolist() == total
        assert entries(keys, count) == [set(queue) for queue in queues]
        for ring, queue, next_row in zip(keys.tolist(), queues, total):  # the oldest is overwritten next
            if len(queue) == 8:
                assert tuple(ring[next_row % 8]) == queue[0]
    assert total[0] == 0
    assert total[3] == 20 * number
    assert not keys[0].any()


def test_the_same_rows_make_the_same_queues():
    rows, there = random_rows(20, 4)
    results = []
    for _ in range(3):
        keys, count = torch.arange(48.0).view(4, 6, 2), torch.tensor([0, 4, 6, 11])
        enqueue(keys, count, rows, there)
        results.append((keys, count))
    for keys, count in results[1:]:
        assert torch.equal(keys, results[0][0])
        assert torch.equal(count, results[0][1])


def test_all_processes_have_the_same_queues_of_all(monkeypatch):
    """Whatever process it is, and whatever the state of its random generator: what counts is what was gathered."""
    parts = [random_rows(5, 4, start) for start in (0, 100, 200)]
    packed = [torch.cat([rows, there[..., None].float()], -1) for rows, there in parts]
    memories = [ClassMemory(4, 7, 2) for _ in parts]
    for rank, (rows, there) in enumerate(parts):

        def all_gather(own, rank=rank):
            assert torch.equal(own, packed[rank])
            return packed

        torch.manual_seed(rank)
        monkeypatch.setattr(memory, 'all_gather', all_gather)
        memories[rank].add(rows, there)
    for each in memories[1:]:
        assert torch.equal(each.keys, memories[0].keys)
        assert torch.equal(each.count, memories[0].count)
    assert memories[0].count.tolist() == sum(there.sum(0) for _, there in parts).tolist()
    assert set(memories[0].keys[3, :, 1].tolist()) == {103, 104, 200, 201, 202, 203, 204}


def test_a_resumed_memory_goes_on_where_it_was():
    one, two = ClassMemory(4, 5, 2), ClassMemory(4, 5, 2)
    one.add(*random_rows(4, 4))
    two.load_state_dict(one.state_dict())
    later = random_rows(3, 4, 4)
    for each in (one, two):
        each.add(*later)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert set(one.state_dict()) == {'keys', 'count'}


def test_full_queues_are_drawn_from_at_the_same_places_and_none_twice():
    queues = ClassMemory(3, 50, 2)
    queues.add(*(each[:, 3:].expand(-1, 3, *each.shape[2:]) for each in random_rows(70, 4)))
    drawn, there = queues.draw(20)
    assert drawn.shape == (60, 2)
    assert there.all()
    drawn = drawn.view(3, 20, 2)[..., 1]
    assert len(set(drawn[0].tolist())) == 20
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].tolist()) <= set(range(20, 70))
    assert not torch.equal(drawn[0], queues.draw(20)[0].view(3, 20, 2)[0, :, 1])


@pytest.mark.parametrize('filled', [1, 3, 12])
def test_what_is_not_filled_is_never_drawn(filled):
    """All of a few entries are, and a class without any has none."""
    queues = ClassMemory(2, 40, 2)
    rows = 1 + torch.arange(filled).float()[:, None, None].expand(-1, 2, 2)
    queues.add(rows, torch.tensor([True, False]).expand(filled, -1))
    drawn, there = queues.draw(30)
    assert there.tolist() == [True] * 30 + [False] * 30
    assert set(drawn[:30, 0].tolist()) <= set(range(1, filled + 1))
    assert filled == 12 or set(drawn[:30, 0].tolist()) == set(range(1, filled + 1))
    assert not ClassMemory(2, 40, 2).draw(30)[1].any()

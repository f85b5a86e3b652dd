"""Two torchrun agents that know of each other by an address alone, each with one process.

In two network namespaces that a cable joins, or (of ``make test-long``) on loopback.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tool import free_port, kill, start, train_together, wait_until

from mmkd.testing.runs import distilled, shapes_config

IN_NAMESPACES = pytest.param('namespaces', marks=pytest.mark.cluster)
METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))


@dataclass
class Node:
    """Where an agent runs: its address, its variables, and the command that takes it there."""

    address: str
    env: dict
    inside: tuple[str, ...] = ()


def joined_namespaces(name):
    """Two network namespaces with a cable between them."""
    spaces = [f'{name}a', f'{name}b']
    steps = [f'netns add {space}' for space in spaces]
    steps.append(f'link add {spaces[0]} netns {spaces[0]} type veth peer name {spaces[1]} netns {spaces[1]}')
    for number, space in enumerate(spaces, 1):
        steps += [f'-n {space} addr add 10.77.0.{number}/24 dev {space}', f'-n {space} link set {space} up']
        steps.append(f'-n {space} link set lo up')
    for step in steps:
        done = subprocess.run(['ip', *step.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f'network namespaces cannot be joined here (ip {step}: {done.stderr.strip()})')
    return [
        Node(f'10.77.0.{number}', dict(GLOO_SOCKET_IFNAME=space), ('ip', 'netns', 'exec', space))
        for number, space in enumerate(spaces, 1)
    ]


@pytest.fixture
def nodes(request):
    if request.param == 'loopback':
        yield [Node('127.0.0.1', {})] * 2
        return
    name = f'mmkd{os.getpid()}'
    try:
        yield joined_namespaces(name)
    finally:
        for each in ('a', 'b'):
            subprocess.run(['ip', 'netns', 'del', f'{name}{each}'], capture_output=True, check=False)


class Job:
    """A training on two nodes: ``config`` in ``folder``."""

    def __init__(self, config, folder: Path, nodes, **env):
        config.work_dir = str(folder)
        self.path = folder.with_suffix('.py')
        config.dump(self.path)
        self.folder, self.nodes = folder, nodes
        self.logs = [folder.with_suffix(f'.{rank}.log') for rank in range(2)]
        self.env = dict(env, NNODES=2, MASTER_ADDR=nodes[0].address, PORT=free_port())
        self.agents = [None, None]

    def start(self, rank):
        node = self.nodes[rank]
        env = dict(self.env, **node.env, NODE_RANK=rank, NODE_ADDR=node.address)
        self.agents[rank] = start(self.logs[rank], 'dist_train.sh', self.path, 1, env=env, inside=node.inside)

    def end(self):
        """Wait until both agents have ended well; the weights of both processes."""
        wait_until(lambda: all(agent.poll() is not None for agent in self.agents), self.logs)
        assert [agent.returncode for agent in self.agents] == [0, 0], '\n'.join(
            log.read_text()[-3000:] for log in self.logs
        )
        return [torch.load(self.folder / f'rank{rank}.pth') for rank in range(2)]

    def __enter__(self):
        for rank in range(2):
            self.start(rank)
        return self

    def __exit__(self, *_):
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait()


@pytest.fixture
def config(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=8, batch=2)
    config.default_hooks.checkpoint.interval = 3
    config.custom_hooks = [dict(type='mmkd.testing.runs.SaveEachRank')]
    return config


@pytest.fixture
def expected(tmp_path, config):
    """The weights after a run on one machine that nothing happens to."""
    config.work_dir = str(tmp_path / 'whole')
    config.dump(tmp_path / 'whole.py')
    train_together(tmp_path / 'whole.py', 2)
    return torch.load(tmp_path / 'whole' / 'rank0.pth')


def assert_equal(found, expected):
    for weights in found:
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize('nodes', [IN_NAMESPACES], indirect=True)
def test_two_nodes_train_as_one_machine_does(tmp_path, config, expected, nodes):
    with Job(config, tmp_path / 'two', nodes) as job:
        assert_equal(job.end(), expected)


@pytest.mark.parametrize('nodes', [pytest.param('loopback', marks=pytest.mark.long), IN_NAMESPACES], indirect=True)
def test_a_node_is_lost_and_comes_back(tmp_path, config, expected, nodes):
    """An agent and its process are killed between two checkpoints, and the agent is started anew."""
    config.custom_hooks.append(dict(type='mmkd.testing.runs.PauseAt', iteration=5))
    with Job(config, tmp_path / 'parts', nodes, MAX_RESTARTS=1) as job:
        paused = [job.folder / f'paused{rank}' for rank in range(2)]
        wait_until(lambda: all(each.exists() for each in paused), job.logs)
        of_lost = {int(each.read_text()) for each in paused} & children(job.agents[1].pid)
        assert len(of_lost) == 1
        kill(job.agents[1].pid, *of_lost)
        job.agents[1].wait()
        (job.folder / 'go_on').touch()
        job.start(1)
        assert_equal(job.end(), expected)
    assert 'resumed epoch: 0, iter: 3' in ''.join(log.read_text() for log in job.logs)


def children(process: int) -> set[int]:
    """Of a process, those that it started itself."""
    lists = Path(f'/proc/{process}/task').glob('*/children')
    return {int(each) for path in lists for each in path.read_text().split()}

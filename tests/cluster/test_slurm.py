"""Slurm itself, with its controller and its node daemon on this machine: see slurm.sh.

Without Slurm and root there is nothing to test here, and ``make test`` says so; ``make test-cluster`` runs these and the
other tests of several machines.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tool import start, tool, train_together, wait_until

from mmkd.testing import segmentors
from mmkd.testing.runs import distilled, streets_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        shutil.which('slurmctld') is None, reason='Slurm is not installed (Debian: apt-get install slurm-wlm munge)'
    ),
    pytest.mark.skipif(os.getuid() != 0, reason='Slurm has to be started by root'),
]
SLURM = Path(__file__).with_name('slurm.sh')
TWO = dict(GPUS=2, GRES='', CPUS_PER_TASK=1)


@pytest.fixture(scope='module', autouse=True)
def _slurm(tmp_path_factory):
    """Two cores, for one job at a time."""
    folder = tmp_path_factory.mktemp('slurm')
    subprocess.run([SLURM, 'up', folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SLURM_CONF', str(folder / 'slurm.conf'))
        yield
    subprocess.run([SLURM, 'down', folder], check=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of a run under torchrun that nothing happens to, whose config is beside it.

    A segmentor is trained for 20 iterations in two processes, with a checkpoint at the end alone.
    """
    folder = tmp_path_factory.mktemp('whole') / 'whole'
    model = distilled(folder.parent, dict(kd=dict(type='KD')), segmentors.pspnet(), segmentors.pspnet(24))
    config = streets_config(folder.parent, model, iterations=20, batch=2)
    config.custom_hooks = [dict(type='mmkd.testing.runs.SaveEachRank')]
    config.work_dir = str(folder)
    config.dump(folder.with_suffix('.py'))
    train_together(folder.with_suffix('.py'), 2)
    return folder


@pytest.fixture
def config(whole):
    return Config.fromfile(whole.with_suffix('.py'))


def assert_equal(folder, whole):
    """Both processes have ended with the same weights as in the other run.

    Not with the same statistics of batch norms: each process has its own, and a checkpoint has those of the first.
    """
    for rank in range(2):
        found, expected = (torch.load(each / f'rank{rank}.pth') for each in (folder, whole))
        for name, value in expected.items():
            if rank == 0 or 'running_' not in name:
                assert torch.equal(found[name], value), (rank, name)


def slurm(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(log, script, *arguments, **env):
    """A script to its end, started here as a user would."""
    started = start(log, script, *arguments, env={**TWO, **env})
    assert started.wait(timeout=300) == 0, log.read_text()[-3000:]
    return log.read_text()


def test_the_scripts_train_as_torchrun_does_and_test_as_one_process(tmp_path, whole):
    path, folder = whole.with_suffix('.py'), tmp_path / 'slurm'
    run(tmp_path / 'train.log', 'slurm_train.sh', 'cpu', 'kd', path, folder)
    assert_equal(folder, whole)
    checkpoint, metrics = folder / 'iter_20.pth', r'aAcc: \S+ +mIoU: \S+ +mAcc: \S+'
    printed = run(tmp_path / 'test.log', 'slurm_test.sh', 'cpu', 'kd', path, checkpoint)
    assert re.search(metrics, printed)[0] == re.search(metrics, tool('test', path, checkpoint))[0]


def test_a_step_that_fails_fails_the_script(tmp_path):
    started = start(tmp_path / 'log', 'slurm_train.sh', 'cpu', 'kd', tmp_path / 'none.py', tmp_path, env=TWO)
    assert started.wait(timeout=60) == 1
    assert 'none.py: no such file' in (tmp_path / 'log').read_text()


def test_without_srun_the_launcher_is_refused(tmp_path, config):
    """In a batch script that forgot it, where Slurm has set most variables."""
    config.dump(tmp_path / 'c.py')
    log = tmp_path / 'log'
    command = f'{sys.executable} tools/train.py {tmp_path / "c.py"} --launcher slurm --no-check'
    submitted = subprocess.run(
        ['sbatch', '--wait', '--ntasks=2', f'--output={log}', f'--wrap={command}'], check=False, cwd=SLURM.parents[2]
    )
    assert submitted.returncode == 1
    assert 'error: --launcher slurm: ' in log.read_text()
    assert 'start with srun' in log.read_text()


class Job:
    """A training that ``slurm_train.sh --requeue`` submitted, and that waits after its fifth iteration."""

    def __init__(self, config, folder, **env):
        config.custom_hooks.append(dict(type='mmkd.testing.runs.PauseAt', iteration=5))
        config.train_dataloader.num_workers = 1  # signals reach data workers as well
        config.dump(folder.with_suffix('.py'))
        self.folder = folder
        self.number = run(
            folder.with_suffix('.log'),
            'slurm_train.sh',
            '--requeue',
            'cpu',
            'kd',
            folder.with_suffix('.py'),
            folder,
            **env,
        ).split()[-1]
        self.log = folder / f'slurm-{self.number}.out'

    def wait(self):
        """Until both processes are held."""
        wait_until(lambda: all((self.folder / f'paused{rank}').exists() for rank in range(2)), [self.log])

    def go_on(self):
        (self.folder / 'go_on').touch()

    def state(self, key='JobState'):
        return re.search(rf'\b{key}=(\S+)', slurm('scontrol', 'show', 'job', self.number))[1]

    def end(self):
        """Until it has ended well; what it printed in all its lives."""
        done = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
        wait_until(lambda: self.state() in done, [self.log], seconds=240)
        assert self.state() == 'COMPLETED', self.log.read_text()[-3000:]
        return self.log.read_text()


def told_by_a_signal(job, tmp_path):
    """As Slurm sends it before the time limit."""
    slurm('scancel', '--signal=USR1', job.number)


def requeued_by_hand(job, tmp_path):
    slurm('scontrol', 'requeue', job.number)


def preempted(job, tmp_path):
    slurm('sbatch', '--partition=urgent', '--ntasks=2', f'--output={tmp_path}/urgent', '--wrap=sleep 1')
    wait_until(lambda: job.state('PreemptTime') != 'None')


@pytest.mark.parametrize('how', [told_by_a_signal, requeued_by_hand, preempted])
def test_a_job_that_has_to_leave_comes_back_and_goes_on_where_it_was(tmp_path, config, whole, how):
    """It saves a checkpoint at the next iteration, and ends as if nothing had happened."""
    job = Job(config, tmp_path / 'job')
    job.wait()
    how(job, tmp_path)
    job.go_on()
    printed = job.end()
    (iteration,) = re.findall(r'resumed epoch: 0, iter: (\d+)', printed)
    assert 5 < int(iteration) < 20
    assert job.state('Restarts') == '1'
    assert_equal(job.folder, whole)


def test_a_training_that_fails_is_not_queued_again(tmp_path, config):
    config.train_dataloader.dataset.data_root = str(tmp_path / 'none')
    job = Job(config, tmp_path / 'job')
    wait_until(lambda: job.state() == 'FAILED', [job.log])
    assert job.state('Restarts') == '0'

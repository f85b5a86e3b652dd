"""tools/gpu.py without a GPU: its dry run, and that what fails or hangs is a row of the report."""

import importlib.util
import json
import time

import pytest
import torch
from tool import ROOT, tool

from mmkd.testing.device import NoWaiting, RandomOnCPU
from mmkd.testing.elsewhere import ELSEWHERE, elsewhere
from mmkd.testing.gpu.__main__ import SECTIONS
from mmkd.testing.gpu.cases import compare, method_cases, source_cases
from mmkd.testing.gpu.correctness import waiting
from mmkd.testing.gpu.section import Finding, Setting, Skip, run_section

CPU = torch.device('cpu')
TOOL = ROOT / 'tools' / 'gpu.py'
spec = importlib.util.spec_from_file_location('gpu', TOOL)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def setting(folder='.', quick=True, seconds=60.0):
    return Setting(CPU, quick, folder, time.monotonic() + seconds)


def rows_of(section, seconds=60.0):
    """The rows of a section that is run in this process."""
    rows = []
    run_section('it', section, setting(seconds=seconds), lambda **row: rows.append(row))
    return rows


@pytest.mark.long
def test_a_dry_run_passes_and_says_that_it_is_one(tmp_path):
    page, figures = tmp_path / 'new' / 'page.md', tmp_path / 'figures.json'
    printed = tool('gpu', '--device', 'cpu', '--quick', '--output', page, '--json', figures, folder=tmp_path)
    text, found = page.read_text(), json.loads(figures.read_text())
    assert text.startswith('# Dry run on a CPU')
    assert '**Nothing here was run on a GPU**' in text
    assert found['facts']['device'].startswith('CPU')
    assert found['facts']['torch'] == torch.__version__
    assert {row['section'] for row in found['rows']} == set(gpu.QUICK)
    bad = [row for row in found['rows'] if row['status'] in ('failed', 'not run')]
    assert not bad
    for row in found['rows']:
        assert f'| {row["case"]} | {row["found"]} |' in text
    assert f'{len(found["rows"])} of {len(found["rows"])} rows without failure' in printed
    assert {row['status'] for row in found['rows']} == {'passed', 'figure', 'skipped'}


def test_the_tool_has_a_time_for_each_section():
    assert list(gpu.SECONDS) == list(SECTIONS)


def test_without_a_gpu_it_is_one_line():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    printed = tool('gpu', expect=1)
    assert printed.strip().splitlines()[-1].startswith('error: torch finds no CUDA device; a dry run is')


def test_a_failure_is_a_row_and_the_others_go_on():
    def section(setting):
        yield 'good', lambda: Finding('1', '2')
        yield 'bad', lambda: 1 / 0
        yield 'not met', lambda: Finding('3', '2', False)
        yield 'a figure', lambda: Finding('3 ms', '', None)
        yield 'elsewhere', skip

    def skip():
        raise Skip('no such thing here')

    rows = rows_of(section)
    assert [row['status'] for row in rows] == ['passed', 'failed', 'failed', 'figure', 'skipped']
    assert rows[1]['found'] == 'ZeroDivisionError: division by zero'

    def broken(setting):
        raise RuntimeError('no networks')
        yield

    (row,) = rows_of(broken)
    assert (row['case'], row['status'], row['found']) == ('all', 'failed', 'RuntimeError: no networks')


def test_what_there_is_no_time_for_is_not_run():
    def section(setting):
        for name in 'abc':
            yield name, lambda: time.sleep(0.3) or Finding('1')

    def found(seconds):
        return [(row['case'], row['status']) for row in rows_of(section, seconds)]

    assert found(-1.0) == [('all', 'not run')]
    assert found(0.2) == [('a', 'passed'), ('b', 'not run'), ('c', 'not run')]
    assert found(0.8) == [('a', 'passed'), ('b', 'passed'), ('c', 'passed')]


@pytest.mark.slow
def test_a_hung_or_crashed_section_is_ended_and_the_others_run(tmp_path):
    """With sections of its own: one that hangs, one that ends its process, a good one."""
    (tmp_path / 'worker.py').write_text("""
import os, sys, time
from mmkd.testing.gpu.__main__ import SECTIONS, main
from mmkd.testing.gpu.section import Finding

def hangs(setting):
    yield 'first', lambda: Finding('1')
    yield 'second', lambda: time.sleep(1000)

def crashes(setting):
    yield 'first', lambda: os._exit(9)

def works(setting):
    yield 'first', lambda: Finding('1')

SECTIONS.update(hangs=hangs, crashes=crashes, works=works)
main()
""")
    seconds = "SECONDS = {'hangs': 1, 'crashes': 5, 'works': 5, "
    code = TOOL.read_text().replace('SECONDS = {', seconds).replace('GRACE = 20.0', 'GRACE = 0.5')
    code = code.replace("WORKER = 'mmkd.testing.gpu'", "WORKER = 'worker'")
    (tmp_path / 'gpu.py').write_text(code.replace('Path(__file__).parents[1]', f'Path({str(ROOT)!r})'))
    options = ('--device', 'cpu', '--output', tmp_path / 'page.md', '--sections', 'hangs', 'crashes', 'works')
    tool(tmp_path / 'gpu', *options, expect=1, env=dict(PYTHONPATH=tmp_path), folder=tmp_path)
    rows = json.loads((tmp_path / 'page.json').read_text())['rows']
    assert [(row['section'], row['case'], row['status']) for row in rows] == [
        ('hangs', 'first', 'passed'),
        ('hangs', 'the rest', 'failed'),
        ('crashes', 'the rest', 'failed'),
        ('works', 'first', 'passed'),
    ]
    assert rows[1]['found'].startswith('ended after ')
    assert rows[2]['found'] == 'its process ended with status 9'


@pytest.mark.parametrize(
    ('waits', 'operation'),
    [
        (True, lambda x: x.sum().item()),
        (True, lambda x: bool((x > 0).any())),
        (True, lambda x: x.nonzero()),
        (True, lambda x: x[x > 0]),
        (True, lambda x: torch.equal(x, x)),
        (False, lambda x: x[torch.tensor([1, 0])]),
        (False, lambda x: x.masked_fill(x > 0, 0).topk(2)),
        (False, lambda x: torch.where(x > 0, x, 0).sum()),
    ],
)
def test_operations_that_need_a_value_on_the_host_are_refused(waits, operation):
    guard, x = NoWaiting(CPU), torch.randn(4, requires_grad=True)
    if waits:
        with pytest.raises(RuntimeError, match='waits for the device'), guard:
            operation(x)
        with guard, guard.paused():
            operation(x)
        operation(x)
    else:
        with guard:
            operation(x)


def test_they_are_refused_in_the_backward_pass_as_well():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    loss = Waits.apply(torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match='waits for the device'), NoWaiting(CPU):
        loss.backward()


def test_random_tensors_are_drawn_on_the_cpu():
    torch.manual_seed(0)
    with RandomOnCPU():
        found = torch.rand(2, 3, device='meta'), torch.randperm(5), torch.rand(3)
    torch.manual_seed(0)
    torch.rand(2, 3)
    assert found[0].device.type == 'meta'
    assert torch.equal(found[1], torch.randperm(5))
    assert torch.equal(found[2], torch.rand(3))


def test_differences_are_relative_to_the_largest_value_of_each_tensor():
    expected = dict(a=torch.tensor([1.0, 100.0]), b=torch.tensor([1e-9]), c=torch.zeros(0))
    found = dict(a=torch.tensor([2.0, 100.0]), b=torch.tensor([2e-9]), c=torch.zeros(0))
    assert compare(found, expected, 1e-3) == pytest.approx(0.01)
    assert compare(found, expected, 0.0) == pytest.approx(1.0)
    with pytest.raises(AssertionError):
        compare(dict(a=found['a']), expected, 0.0)


def names_of_methods():
    return [name for name, *_ in (*method_cases(False), *source_cases(False))]


@pytest.mark.long
@pytest.mark.parametrize('name', names_of_methods())
def test_no_method_and_no_source_waits_for_the_device_or_leaves_a_tensor_on_the_host(name):
    """What a CPU can show of it, see :class:`NoWaiting` and :func:`elsewhere`; `make gpu` asks CUDA."""
    check = dict(waiting(setting(quick=False)._replace(device=ELSEWHERE)))[name]
    with elsewhere():
        assert check().found.startswith('never waits')

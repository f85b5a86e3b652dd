"""Everything that only a GPU can show, in one command of about ten minutes; writes docs/gpu.md and docs/gpu.json.

    make gpu                                          # or: python tools/gpu.py
    python tools/gpu.py --device cpu --quick          # a dry run: the same code on small models, written elsewhere

It needs one CUDA device, mmdet and mmseg, and no data, checkpoint or network. What fails is a row of the report, and the
rest goes on: the sections, of mmkd/testing/gpu, run in a process of their own, which is ended where one hangs, and
started anew where a CUDA error has taken its device. The exit status is 0 if nothing failed and everything was run.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = 'mmkd.testing.gpu'
SECONDS = {
    "mmcv's ops": 30,
    'Values': 120,
    'Waiting for the device': 90,
    'Mixed precision': 120,
    'Processes': 120,
    'Step: gid_retinanet': 60,
    'Step: cwd_retinanet': 60,
    'Step: gid_faster_rcnn': 60,
    'Step: mimic_faster_rcnn': 60,
    'Step: gid_gfl': 60,
    'Step: cwd_pspnet': 60,
    'Step: dist_deeplabv3': 60,
    'Training': 150,
    'Compiled and captured': 180,
}
"""The sections in their order, and how long each may take; on an idle GPU they take less."""
QUICK = [name for name in SECONDS if not name.startswith('Step: ') or name == 'Step: gid_retinanet']
GRACE = 20.0
"""Seconds that a section has beyond its time to end its last case."""


def watch(args: argparse.Namespace, rows: Path) -> None:
    """Have all sections run; what hangs is ended, and what is lost is written down."""
    names, end = list(args.sections), time.monotonic() + 60 * args.minutes
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    while names:
        left = end - time.monotonic()
        if left <= 0:
            for name in names:
                append(rows, name, 'not run', 'the time was over')
            return
        command = [sys.executable, '-W', 'ignore', '-m', WORKER, '--device', args.device, '--rows', str(rows)]
        command += ['--seconds', str(left), *(['--quick'] if args.quick else [])]
        child = subprocess.Popen(
            [*command, *(f'{name}={SECONDS[name]}' for name in names)], env=env, start_new_session=True
        )
        before, running, since, why = len(read(rows)), None, time.monotonic(), ''
        while child.poll() is None:
            time.sleep(0.2)
            now, started = time.monotonic(), [each for each in read(rows)[before:] if each['event'] == 'start']
            if started and started[-1]['section'] != running:
                running, since = started[-1]['section'], now
            limit = SECONDS[running] if running else 120  # imports
            if now > min(since + limit, end) + GRACE:
                why = f'ended after {now - since:.0f} s'
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        done = {each['section'] for each in read(rows) if each['event'] == 'end'}
        names = [name for name in names if name not in done]
        if names:  # the process ended in the first of them
            append(rows, names.pop(0), 'failed', why or f'its process ended with status {child.returncode}')


def append(rows: Path, section: str, status: str, found: str) -> None:
    row = dict(
        event='row', section=section, case='the rest', status=status, seconds=0.0, found=found, bound='', figures={}
    )
    with rows.open('a') as file:
        file.write(json.dumps(row) + '\n')


def read(rows: Path) -> list[dict]:
    """The whole lines of the file."""
    content = rows.read_text() if rows.exists() else ''
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith('\n')]


def report(args: argparse.Namespace, events: list[dict], facts: dict, seconds: float) -> str:
    """The page."""
    rows = [each for each in events if each['event'] == 'row']
    about = {each['section']: each['about'] for each in events if each['event'] == 'start'}
    numbers = {
        status: sum(row['status'] == status for row in rows) for status in ('passed', 'failed', 'skipped', 'not run')
    }
    summary = ', '.join(f'{number} {status}' for status, number in numbers.items() if number)
    lines = ['# On a GPU', '']
    if args.device == 'cpu':
        lines = [
            '# Dry run on a CPU',
            '',
            '**Nothing here was run on a GPU**, and no figure says anything about one.',
            '',
        ]
    lines += [f'`{command(args)}`: {summary}, in {seconds:.0f} s.', '', '| | |', '|---|---|']
    lines += [f'| {key} | {value} |' for key, value in facts.items()]
    for name in args.sections:
        lines += ['', f'## {name}', '', about.get(name, ''), '', f'`{command(args, name)}`', '']
        lines += ['| | found | bound | |', '|---|---|---|---|']
        own = [row for row in rows if row['section'] == name]
        lines += [f'| {row["case"]} | {row["found"]} | {row["bound"]} | {row["status"]} |' for row in own]
    return '\n'.join(lines) + '\n'


def command(args: argparse.Namespace, section: str | None = None) -> str:
    options = ['--device cpu'] * (args.device == 'cpu') + ['--quick'] * args.quick
    return ' '.join(['python tools/gpu.py', *options, *([f'--sections "{section}"'] if section else [])])


def has_cuda() -> bool:
    check = [sys.executable, '-c', 'import torch; print(torch.cuda.is_available())']
    return subprocess.run(check, text=True, capture_output=True, check=False).stdout.strip() == 'True'


def main() -> int:
    parser = argparse.ArgumentParser(description='Everything that only a GPU can show; writes a page and JSON.')
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='cpu: a dry run')
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='default docs/gpu.md; of a dry run below work_dirs/'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='default: beside the page')
    parser.add_argument('--quick', action='store_true', help='a few small cases of each section')
    parser.add_argument('--minutes', type=float, default=9.0, help='what is not begun by then is not run; default 9')
    parser.add_argument('--sections', nargs='+', choices=list(SECONDS), metavar='NAME', help='default: all')
    args = parser.parse_args()
    args.sections = args.sections or (QUICK if args.quick else list(SECONDS))
    if args.device == 'cuda' and not has_cuda():
        sys.exit('error: torch finds no CUDA device; a dry run is python tools/gpu.py --device cpu --quick')
    page = args.output or ROOT / ('docs/gpu.md' if args.device == 'cuda' else 'work_dirs/gpu_dry_run.md')
    figures = args.json or page.with_suffix('.json')
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        watch(args, Path(folder, 'rows'))
        events = read(Path(folder, 'rows'))
    seconds = time.monotonic() - start
    facts = next((each['facts'] for each in events if each['event'] == 'facts'), {})
    rows = [{key: each[key] for key in each if key != 'event'} for each in events if each['event'] == 'row']
    content = dict(command=command(args), seconds=round(seconds, 1), facts=facts, rows=rows)
    for file, text in (
        (page, report(args, events, facts, seconds)),
        (figures, json.dumps(content, indent=1) + '\n'),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for row in rows:
        print(
            f'{row["status"]:8} {row["section"]}: {row["case"]}: {row["found"]}  [{row["bound"]}]  {row["seconds"]} s'
        )
    bad = sum(row['status'] in ('failed', 'not run') for row in rows)
    print(f'{len(rows) - bad} of {len(rows)} rows without failure, in {seconds:.0f} s; written to {page} and {figures}')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())

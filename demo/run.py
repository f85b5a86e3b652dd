"""The demos: a small network learns from a larger one, on generated data, with a table and a report.

python demo/run.py detection                   # one seed, what `make demo` runs
python demo/run.py segmentation                # what `make demo-seg` runs
python demo/run.py detection --seeds 0 1 2     # mean and spread
"""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools'))

from report import print_table, write_report
from runs import Run, RunFailed

from mmkd import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=['detection', 'segmentation'])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/demo_<task>')
    args = parser.parse_args()
    start = time.time()
    work_dir = args.work_dir or Path(f'work_dirs/demo_{args.task}')
    with cli.clear_errors():
        demo = import_module(args.task).DEMO  # a segmentation user needs no mmdet
        print(f'Data: {demo.suite.generate()}', flush=True)
        configs = f'mmkd::{demo.suite.name}'
        teacher = Run('teacher', f'{configs}/{demo.teacher}.py', work_dir / 'teacher')
        students: dict[str, list[Run]] = {name: [] for name in demo.students}
        for seed in args.seeds:
            for name, config in demo.students.items():
                options = {'randomness.seed': seed}
                if name != 'student alone':
                    options['model.teacher.checkpoint'] = str(teacher.checkpoint)
                folder = work_dir / f'{config}_seed{seed}'
                students[name].append(Run(name, f'{configs}/{config}.py', folder, options))
        runs = [teacher, *(run for of_seed in zip(*students.values()) for run in of_seed)]
        for number, run in enumerate(runs, 1):
            try:
                run.train(f'[{number}/{len(runs)}]')
            except RunFailed as error:
                sys.exit(f'error: {error}')
        print_table(demo, teacher, students)
        report = write_report(demo, teacher, students, work_dir / 'report.html')
    print(f'Report: {report}  ({time.time() - start:.0f} s in all)')


if __name__ == '__main__':
    main()

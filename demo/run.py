"""The demo: a small RetinaNet learns from a larger one, on generated data, with a table and a report.

python demo/run.py                   # one seed, what `make demo` runs
python demo/run.py --seeds 0 1 2     # mean and spread
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools'))

from report import print_table, write_report
from runs import Run, RunFailed

from mmkd import cli
from mmkd.testing import shapes

STUDENTS = {'student alone': 'retinanet_student', 'CWD': 'cwd_retinanet', 'GID': 'gid_retinanet'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    start = time.time()
    with cli.clear_errors():
        print(f'Data: {shapes.generate("data/shapes")} (1200 generated images)', flush=True)
        teacher = Run('teacher', 'mmkd::shapes/retinanet_teacher.py', args.work_dir / 'teacher')
        students: dict[str, list[Run]] = {name: [] for name in STUDENTS}
        for seed in args.seeds:
            for name, config in STUDENTS.items():
                options = {'randomness.seed': seed}
                if name != 'student alone':
                    options['model.teacher.checkpoint'] = str(teacher.checkpoint)
                folder = args.work_dir / f'{config}_seed{seed}'
                students[name].append(Run(name, f'mmkd::shapes/{config}.py', folder, options))
        runs = [teacher, *(run for of_seed in zip(*students.values()) for run in of_seed)]
        for number, run in enumerate(runs, 1):
            try:
                run.train(f'[{number}/{len(runs)}]')
            except RunFailed as error:
                sys.exit(f'error: {error}')
        print_table(teacher, students)
        report = write_report(teacher, students, args.work_dir / 'report.html')
    print(f'Report: {report}  ({time.time() - start:.0f} s in all)')


if __name__ == '__main__':
    main()

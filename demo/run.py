"""The demos: a small network learns from a larger one, on generated data, with a table and a report.

python demo/run.py detection                   # one seed, what `make demo` runs
python demo/run.py segmentation                # what `make demo-seg` runs
python demo/run.py detection --seeds 0 1 2     # mean and spread
"""

import argparse
import sys
import time
from pathlib import Path

from mmkd import cli
from mmkd.experiments.demos import TASKS, run_demo
from mmkd.experiments.runs import RunFailed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/demo_<task>')
    args = parser.parse_args()
    start = time.time()
    with cli.clear_errors():
        try:
            report = run_demo(args.task, args.seeds, args.work_dir or Path(f'work_dirs/demo_{args.task}'))
        except RunFailed as error:
            sys.exit(f'error: {error}')
    print(f'Report: {report}  ({time.time() - start:.0f} s in all)')


if __name__ == '__main__':
    main()

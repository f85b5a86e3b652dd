"""Train every method of a folder of configs, several seeds each, and compare it with its student alone.

mmkd compare my_configs                           # your own configs, on your own data
mmkd compare my_configs --report-only             # table and chart of what is finished
mmkd compare shapes                               # all of configs/shapes, on generated data; or streets
mmkd compare shapes gid_retinanet pkd_retinanet   # these two, and what they are compared with
mmkd compare shapes --share 0.5                   # all methods pulling equally strongly, see below

A folder holds methods (configs with model.distillers), for each its student alone (the same model and validation data,
without distillers), and the teachers' configs. Teachers that lie in the folder are trained first; those from elsewhere
are used with their checkpoints. Then come, seed by seed, students alone and methods. Finished runs are reused,
interrupted ones resumed. Writes table.md, chart.png, report.html and results.json to the work directory.

With --share no method has the loss weights of its config: all its losses are multiplied by the factor with which their
gradient at the backbone is that share of its sum with the task's, as `mmkd check` measures it after the warm-up of the
student. The methods' runs and the report then go to a folder of their own in the work directory.
"""

import argparse
import signal
import sys
from pathlib import Path

from mmkd import cli
from mmkd.experiments.comparison import run_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', default='shapes', help='of configs; or shapes (the default) or streets')
    parser.add_argument('methods', nargs='*', help='configs of that folder, such as gid_retinanet; default all')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=1, help='runs trained at the same time; they share the CPU cores')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/compare_<folder>')
    parser.add_argument(
        '--score', metavar='KEY', help='what ranks the models, as the logs name it; default: what the configs say'
    )
    parser.add_argument(
        '--share',
        type=float,
        metavar='S',
        help='of the gradient at the backbone, the same for all methods; such as 0.5',
    )
    parser.add_argument('--report-only', action='store_true', help='train nothing, report what is finished')
    cli.add_debug_option(parser)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trainings too
    if args.jobs < 1:
        parser.error(f'--jobs: expected at least 1, but got {args.jobs}')
    if args.share is not None and not 0 < args.share < 1:
        parser.error(f'--share: expected a number between 0 and 1, but got {args.share:g}')
    with cli.clear_errors(args.debug):
        try:
            results = run_comparison(
                args.folder,
                args.methods,
                args.seeds,
                args.jobs,
                args.work_dir,
                args.score,
                args.report_only,
                args.share,
            )
        except KeyboardInterrupt:
            sys.exit('Interrupted; the same command continues.')
    if results['failed']:
        sys.exit(1)

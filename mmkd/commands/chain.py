"""Train configs one after the other: each is taught by, or goes on from, the ones before.

mmkd chain teacher.py assistant.py small.py       # a teacher's assistant
mmkd chain first.py again.py again.py             # born-again generations: again.py's teacher is first.py's model
mmkd chain one.py two.py --go-on                  # progressive teachers: the student starts from where it was

A teacher whose model is that of an earlier config gets the weights that it ended with; other teachers keep their own
checkpoints. The same command goes on where it stopped.
"""

import argparse
import signal
import sys
from pathlib import Path

from mmkd import cli
from mmkd.experiments.chain import stages, train_chain
from mmkd.experiments.runs import Run, RunFailed
from mmkd.experiments.suites import score_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='in their order')
    parser.add_argument('--go-on', action='store_true', help='start each student from the weights of the one before')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/chain_<first>_<last>')
    cli.add_debug_option(parser)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the training too
    with cli.clear_errors(args.debug):
        folder = (
            args.work_dir or Path('work_dirs') / f'chain_{Path(args.configs[0]).stem}_{Path(args.configs[-1]).stem}'
        )
        try:
            train_chain(stages(args.configs, folder, args.go_on), done=say)
        except RunFailed as error:
            sys.exit(f'error: {error}')
        except KeyboardInterrupt:
            sys.exit('Interrupted; the same command continues.')


def say(run: Run) -> None:
    """A line on what a stage gave."""
    key = score_key(run.read())
    print(f'{run.name}: {key} {run.scores().get(key, float("nan")):.4g}, {run.checkpoint}')

"""``mmkd COMMAND ...``: the tools by one name, wherever mmkd is installed; ``python -m mmkd`` is the same."""

import argparse
import sys
from importlib import import_module

from mmkd import __version__

COMMANDS = {
    'train': 'train a student, or any plain model',
    'test': 'evaluate a checkpoint',
    'export': 'write the plain student: checkpoint and config',
    'inspect': 'show what a config distills: layers, pairs, costs, schedules',
    'check': 'check teachers, classes, losses and memory before training, with pictures',
    'chain': 'train configs one after the other, each taught by those before',
    'pseudo_label': 'write what a model predicts for images as labels',
    'compare': 'train the configs of a folder, several seeds each, and compare them',
    'report': 'report on a training that ended: curves, classes, pictures',
    'benchmark': 'time and memory of a training step',
}


def main() -> None:
    listed = '\n'.join(f'  {name:14}{purpose}' for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='mmkd',
        description='Knowledge distillation for mmdet and mmsegmentation.',
        epilog=f'commands:\n{listed}\n\nmmkd COMMAND --help has the options of each.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'mmkd {__version__}')
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help='see below')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='those of the command')
    args = parser.parse_args(sys.argv[1:] or ['--help'])
    sys.argv = [f'mmkd {args.command}', *args.arguments]  # what the command calls itself in its help and its errors
    import_module(f'mmkd.commands.{args.command}').main()


if __name__ == '__main__':
    main()

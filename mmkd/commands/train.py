"""Train a student, or any plain model, with mmengine's Runner.

mmkd train configs/gid_retinanet.py
"""

import argparse

import torch

from mmkd import checks, cli
from mmkd.analysis.scores import check_scores
from mmkd.errors import ConfigError
from mmkd.hosts.checkpoints import check_continues
from mmkd.hosts.interrupts import Interrupted, StopOnSignal
from mmkd.hosts.samples import leave_out_samples
from mmkd.hosts.terminal import readable_terminal

SCORED = 16
"""Validation images that a teacher is evaluated on before its first training."""


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a model; options as in mmdet and mmseg.')
    parser.add_argument('config', help="a config file, or a config of mmkd: 'mmkd::gid_retinanet.py'")
    cli.add_common_options(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, or without one from the latest in the work directory',
    )
    parser.add_argument(
        '--leave-out',
        type=int,
        default=0,
        metavar='N',
        help='leave out up to N samples that cannot be read, with a warning each; default: the first one ends the training',
    )
    parser.add_argument(
        '--full-log',
        action='store_true',
        help='show all on a terminal that the log file has, not a line for each interval',
    )
    parser.add_argument(
        '--no-check',
        action='store_true',
        help='do not evaluate the teachers on a few validation images, which the first run of a work directory begins with',
    )
    args = parser.parse_args()
    stop = StopOnSignal()
    stop.listen()
    with cli.clear_errors(args.debug) as begun:
        config = cli.read_config(args)
        cli.check_work_dir(args, config)
        if not args.full_log:
            readable_terminal(config.model.get('distillers') or ())
        if args.amp:
            if not torch.cuda.is_available():
                raise ConfigError('--amp: mmengine trains in mixed precision on accelerators alone, and none was found')
            config.optim_wrapper.type = 'AmpOptimWrapper'
            config.optim_wrapper.setdefault('loss_scale', 'dynamic')
        if args.auto_scale_lr:
            cli.scale_learning_rate(config)
        leave_out_samples(args.leave_out)
        cli.join_processes(config)
        before, warnings = cli.resume(config, args.resume)
        warnings += checks.check_config(config)
        trained = cli.was_trained(config)  # before the Runner writes to its work directory
        runner = cli.build_runner(config)
        runner.register_hook(begun)
        cli.watch(runner, stop)
        if before or not config.get('resume'):  # else nobody knows how far it got
            cli.repeatable(runner, before['meta']['iter'] if before else 0)
        if before:
            check_continues(before, config.load_from, runner)
        warnings += checks.check_model(config, cli.bare_model(runner))
        for line in warnings:
            runner.logger.warning(line)
        for each in check_scores(config, 0 if args.no_check or trained else SCORED):
            runner.logger.info(str(each))
        try:
            runner.train()
        except Interrupted:
            cli.end_processes()
            raise
        cli.end_processes()

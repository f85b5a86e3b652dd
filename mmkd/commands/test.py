"""Evaluate a checkpoint; of a distilled model the student alone runs, and no teacher weights are needed.

mmkd test configs/gid_retinanet.py work_dirs/gid_retinanet/epoch_24.pth
"""

import argparse

from mmkd import checks, cli


def main() -> None:
    parser = argparse.ArgumentParser(description='Test a model; options as in mmdet and mmseg.')
    parser.add_argument('config', help="a config file, or a config of mmkd: 'mmkd::gid_retinanet.py'")
    parser.add_argument('checkpoint', help='weights of the student')
    cli.add_common_options(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show-dir', metavar='FOLDER', help='write a picture of each prediction to this folder')
    args = parser.parse_args()
    with cli.clear_errors(args.debug) as begun:
        cli.check_outputs(args)
        config = cli.read_config(args)
        cli.check_work_dir(args, config)
        config.load_from = args.checkpoint
        cli.join_processes(config)
        checks.check_names(config, ('test',))
        checks.check_parts(config, ('test',))
        checks.check_data(config, ('test',))
        checks.check_heads(config, 'test')
        checks.check_checkpoint(config, 'checkpoint')
        runner = cli.build_runner(config)
        runner.register_hook(begun)
        checks.check_fit(config, cli.bare_model(runner))
        pictures = cli.draw_predictions(runner, args.show_dir) if args.show_dir else None
        if args.out:
            cli.dump_predictions(runner, args.out)
        runner.test()
        if pictures:
            print(f'{pictures.written} pictures are in {pictures.folder}')
        cli.end_processes()

"""Evaluate a checkpoint; of a distilled model the student alone runs, and no teacher weights are needed.

python tools/test.py configs/gid_retinanet.py work_dirs/gid_retinanet/epoch_24.pth
"""

import argparse

from mmkd import cli


def main() -> None:
    parser = argparse.ArgumentParser(description='Test a model; options as in mmdet and mmseg.')
    parser.add_argument('config', help="a config file, or a config of mmkd: 'mmkd::gid_retinanet.py'")
    parser.add_argument('checkpoint', help='weights of the student')
    cli.add_common_options(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show-dir', help='write pictures of the predictions to this folder')
    args = parser.parse_args()
    with cli.clear_errors():
        config = cli.read_config(args)
        config.load_from = args.checkpoint
        if args.show_dir:
            cli.draw_predictions(config, args.show_dir)
        cli.check_data(config, ('test',))
        runner = cli.build_runner(config)
        if args.out:
            cli.dump_predictions(runner, args.out)
        runner.test()
        cli.end_processes()


if __name__ == '__main__':
    main()

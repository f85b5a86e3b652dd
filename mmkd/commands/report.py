"""Report on a training that ended: one HTML file with all that its work directory tells, and with pictures.

    mmkd report work_dirs/gid_retinanet
    mmkd report work_dirs/gid_retinanet --alone work_dirs/retinanet_r50 --teacher work_dirs/retinanet_r101
    mmkd report work_dirs/gid_retinanet --teacher mmdet::retinanet/retinanet_r101_fpn_2x_coco.py r101.pth

All metrics of student, student alone and teacher, and how much of the gap is closed; curves; AP or IoU by class, sorted by
what changed; the images that changed most, for better and for worse; what was distilled, how the configs differ, versions,
time and memory. For any detector or segmentor that mmengine's Runner trained, distilled or plain. The models are run
on the validation images, with a GPU if there is one.
"""

import argparse
from pathlib import Path

from mmkd import cli
from mmkd.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dir', metavar='WORK_DIR', help='of the training')
    parser.add_argument('--alone', metavar='WORK_DIR', help='of the same student, trained without distillers')
    parser.add_argument(
        '--teacher',
        nargs='+',
        default=(),
        metavar=('WORK_DIR', 'CHECKPOINT'),
        help="the teacher's work directory; or its config and its checkpoint, which is evaluated",
    )
    parser.add_argument('--out', type=Path, metavar='FILE.html', help='default WORK_DIR/report.html')
    parser.add_argument(
        '--score', metavar='KEY', help='what ranks the models, as the logs name it; default: what the config says'
    )
    parser.add_argument('--images', type=int, default=4, metavar='N', help='shown of each kind; default 4')
    parser.add_argument(
        '--no-pictures', action='store_true', help='run no model: no pictures and no scores by class; needs no data'
    )
    cli.add_debug_option(parser)
    args = parser.parse_args()
    if len(args.teacher) > 2:
        parser.error('--teacher: expected a work directory, or a config and a checkpoint')
    if args.images < 0:
        parser.error(f'--images: expected at least 0, but got {args.images}')
    with cli.clear_errors(args.debug):
        try:
            from mmkd.experiments.run_report import write_report
        except ModuleNotFoundError as error:
            if error.name not in ('jinja2', 'matplotlib', 'tqdm', 'rich', 'PIL'):
                raise
            raise ConfigError(f"mmkd report needs {error.name}: pip install 'mmkd[experiments]'") from None
        report = write_report(
            args.work_dir, args.alone, args.teacher, args.out, args.score, args.images, not args.no_pictures
        )
    print(f'Report: {report}')

"""Write what a model predicts for images without labels as labels, for a student to be trained on.

mmkd pseudo_label CONFIG CHECKPOINT IMAGES OUT.json       # a detector: a COCO file
mmkd pseudo_label CONFIG CHECKPOINT IMAGES OUT            # a segmentor: a folder of label maps, 255 where it is not sure
mmkd pseudo_label ... --augment --like labelled.json      # data distillation

The same command goes on where it stopped.
"""

import argparse
from pathlib import Path

from mmkd import cli
from mmkd.data.pseudo_labels import PseudoLabels, boxes_per_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="a config file, or a config of mmkd: 'mmkd::gid_retinanet.py'")
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('images', type=Path, help='the folder of images')
    parser.add_argument('out', type=Path, help='what is written')
    parser.add_argument(
        '--score', type=float, default=0.5, help='least probability of a box or of a pixel; default 0.5'
    )
    parser.add_argument(
        '--like',
        type=Path,
        metavar='COCO.json',
        help='of a detector: as many boxes for each image as this labelled file has, in place of --score',
    )
    parser.add_argument(
        '--augment', action='store_true', help='merge predictions for several scales and mirrored images'
    )
    parser.add_argument('--batch-size', type=int, default=1)
    cli.add_common_options(parser)
    args = parser.parse_args()
    with cli.clear_errors(args.debug):
        per_image = boxes_per_image(args.like) if args.like else None
        labels = PseudoLabels(cli.read_config(args), args.checkpoint, args.images, args.out, args.score, args.augment)
        if args.like and not labels.detects:
            parser.error('--like counts boxes; a segmentor has none')
        labels(args.batch_size)
        if labels.detects:
            found = labels.write(per_image)
            print(f'{args.out}: {found["boxes"]} boxes of at least {found["score"]:.3g} in {found["images"]} images')
        else:
            print(f'{args.out}: label maps of {len(labels.images)} images')


if __name__ == '__main__':
    main()

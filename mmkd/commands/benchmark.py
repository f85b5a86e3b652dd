"""Time and peak memory of one training step: plain student, stock teacher, distilled; in turn, in one process.

    mmkd benchmark configs/gid_retinanet.py --shape 2 3 256 320 --json gid_retinanet.json

The weights are random: neither data nor checkpoints are needed. "Floor ratio" is the distilled step over the sum of the
plain student's step, the teachers' forward passes as stock mmdet or mmseg runs them, as far as the same layers, and the
steps of peers, trained alone.
"""

import argparse
import json
from pathlib import Path

import torch

from mmkd import cli
from mmkd.errors import ConfigError
from mmkd.testing.steps import device_name, measure, networks, steps


def main() -> None:
    parser = argparse.ArgumentParser(description='Time and peak memory of one training step.')
    parser.add_argument('config', help='a distilled config')
    parser.add_argument('--shape', type=int, nargs=4, default=(2, 3, 256, 320), metavar=('B', 'C', 'H', 'W'))
    parser.add_argument('--objects', type=int, default=8, help='objects per image')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to this file, too')
    cli.add_common_options(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds: expected at least 1, but got {args.rounds}')
    with cli.clear_errors(args.debug):
        device = torch.device(args.device)
        config = cli.read_config(args)
        if 'teacher' not in config.model:
            raise ConfigError(f'{args.config}: trains a plain model; what is measured is the cost of a distilled step')
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        built = networks(config, tuple(args.shape), args.objects, device)
        found = measure(built, steps(built, args.amp), device, args.rounds)

    on = device_name(device)
    shape = 'x'.join(map(str, args.shape))
    print(f'{args.config} at {shape}{" with AMP" if args.amp else ""}, {on}, torch {torch.__version__}')
    print(f'{"":16}{"ms":>10}{"(min)":>10}{"peak MiB":>12}')
    for name, of_step in found['steps'].items():
        print(f'{name:16}{of_step["median_ms"]:10.1f}{of_step["min_ms"]:10.1f}{of_step["peak_mib"]:12.1f}')
    print(f'floor ratio      {found["floor_ratio"]:.3f}  (distilled / all of the others, median)')
    print(f'memory ratio     {found["memory_ratio"]:.3f}  (distilled / (plain student + peers + teacher weights))')
    if args.json:
        about = {
            'config': args.config,
            'options': dict(args.cfg_options),
            'shape': list(args.shape),
            'objects': args.objects,
            'amp': args.amp,
            'device': on,
            'torch': torch.__version__,
        }
        args.json.write_text(json.dumps({**about, **found}, indent=2) + '\n')

"""Check a distillation before it is trained: teachers, classes, losses, memory, and pictures of what the networks see.

mmkd check configs/gid_retinanet.py                     # writes work_dirs/gid_retinanet/check.html
mmkd check configs/gid_retinanet.py --images 200        # teachers on more validation images
mmkd check configs/gid_retinanet.py --warm-up 500       # gradients after 500 steps of the student's own losses
"""

import argparse
import json
import logging
import textwrap
from pathlib import Path

import torch
from mmengine.runner import set_random_seed
from rich.console import Console
from rich.table import Table

from mmkd import checks, cli
from mmkd.analysis import first_steps
from mmkd.analysis.first_steps import Memory, Term
from mmkd.analysis.pictures import draw_batch
from mmkd.analysis.scores import check_scores
from mmkd.errors import ConfigError
from mmkd.experiments.pages import embed, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="a distilled config, or one of mmkd: 'mmkd::gid_retinanet.py'")
    parser.add_argument(
        '--images', type=int, default=32, help='validation images for each teacher; default 32, 0: none'
    )
    parser.add_argument('--batches', type=int, default=3, help='training batches for losses and gradients; default 3')
    parser.add_argument(
        '--warm-up',
        type=int,
        default=0,
        metavar='STEPS',
        help="train so many steps by the student's own losses before gradients are measured; default 0",
    )
    cli.add_common_options(parser)
    args = parser.parse_args()
    if args.images < 0 or args.batches < 1 or args.warm_up < 0:
        parser.error('--images and --warm-up: expected at least 0, and --batches at least 1')
    logging.disable(logging.INFO)
    with cli.clear_errors(args.debug):
        config = cli.read_config(args)
        if args.launcher != 'none':
            raise ConfigError('--launcher: the check runs in one process; leave it out')
        if 'student' not in config.model:
            raise ConfigError('model: it has no student; a plain model learns from nobody')
        cli.check_work_dir(args, config)
        warnings = checks.check_config(config)
        scores = [str(each) for each in check_scores(config, args.images)]
        set_random_seed((config.get('randomness') or {}).get('seed') or 0)
        model = first_steps.build(config)
        warnings += checks.check_model(config, model)
        data = first_steps.batches(config, args.batches)
        if not data:
            raise ConfigError('train_dataloader: it yields no batch')
        if args.warm_up:
            first_steps.warm_up(model, config, args.warm_up)
        terms, together = first_steps.measure(model, data)
        batch = model.data_preprocessor(data[0], True)
        pictures = embed(draw_batch(model, batch['inputs'], batch['data_samples']), 'png')
        memory = first_steps.memory(model, data[0])
        folder = Path(config.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        page, figures = folder / 'check.html', folder / 'check.json'
        page.write_text(
            render(
                'check.html',
                config=args.config,
                scores=scores or ['not evaluated'],
                batches=len(data),
                warm_up=args.warm_up,
                together=together,
                terms=terms,
                memory=describe(memory),
                warnings=warnings,
                pictures=pictures,
            )
        )
        figures.write_text(
            json.dumps(
                dict(
                    scores=scores,
                    losses=[{**each._asdict(), 'advice': each.advice} for each in terms],
                    together=together,
                    warm_up=args.warm_up,
                    memory=memory._asdict(),
                    warnings=warnings,
                    torch=torch.__version__,
                ),
                indent=1,
            )
            + '\n'
        )
    console = Console(width=80, highlight=False)
    for line in scores:
        console.print(line, markup=False)
    console.print(losses(terms))
    console.print(f'All of distillation together: {together:.2g} times the task.')
    for line in [*(f'{each.name}: {each.advice}' for each in terms if each.advice), describe(memory), *warnings]:
        console.print(textwrap.fill(line, 80), markup=False)
    console.print(f'Pictures: {page}', soft_wrap=True, markup=False)


def losses(terms: list[Term]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ('gradient of', 'value', 'share', 'cosine', 'times task'):
        table.add_column(column, justify='left' if column == 'gradient of' else 'right')
    for each in terms:
        table.add_row(
            each.name, f'{each.value:.4g}', f'{100 * each.share:.1f} %', f'{each.cosine:.2f}', f'{each.times:.2g}'
        )
    return table


def describe(memory: Memory) -> str:
    line = f'Training in float32 with SGD takes {memory.step:.0f} of {memory.there:.0f} MiB of {memory.device}.'
    if memory.step > 0.9 * memory.there:
        line += ' That is close to all there is, or above: use a smaller batch, or --amp.'
    return line

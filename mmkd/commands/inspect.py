"""Show what a config distills, before anything is trained: neither data nor weights are needed.

mmkd inspect configs/gid_retinanet.py
mmkd inspect configs/gid_retinanet.py --filter 'bbox_head.*'     # names of layers, for layer=...
mmkd inspect configs/gid_retinanet.py --json overview.json
"""

import argparse
import json
import logging
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmkd import cli
from mmkd.analysis.layers import Layer
from mmkd.analysis.overview import Network, Overview, overview
from mmkd.errors import ConfigError

WIDTH = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="a distilled config, or one of mmkd: 'mmkd::gid_retinanet.py'")
    parser.add_argument('--filter', metavar='PATTERN', help="show the layers of this name, such as 'bbox_head.*'")
    parser.add_argument('--depth', type=int, default=2, help='without --filter: parts of a name; default 2')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help="of images; default: the pipeline's")
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all of it to this file, too')
    cli.add_common_options(parser)
    args = parser.parse_args()
    if args.depth < 1 or min(args.shape or [1]) < 1:
        parser.error('--depth and --shape: expected positive numbers')
    logging.disable(logging.INFO)  # what is said when a model is built is told below
    with cli.clear_errors(args.debug):
        if args.json and not args.json.absolute().parent.is_dir():
            raise ConfigError(f'--json {args.json}: there is no such folder')
        seen = overview(cli.read_config(args), tuple(args.shape) if args.shape else None)
        if args.json:
            args.json.write_text(json.dumps(seen.as_dict(), indent=1) + '\n')
    console = Console(width=WIDTH, highlight=False)
    for network in seen.networks:
        size = 'x'.join(map(str, network.survey.size))
        console.print(f'[bold]{network.name}[/]: {network.kind}, layers for an image of {size} (* is tapped)')
        console.print(layers(network, args.filter, args.depth))
        console.print()
    console.print('[bold]Costs[/], for an image of ' + 'x'.join(map(str, seen.image)))
    console.print(costs(seen))
    for title, lines in (('What is compared', methods(seen)), ('Training', training(seen))):
        console.print(f'\n[bold]{title}[/]')
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)


def layers(network: Network, pattern: str | None, depth: int) -> Table | str:
    """A network's layers, a line each: those that match, or those up to a depth and the tapped ones."""
    found = [
        each
        for each in network.survey.layers
        if (fnmatchcase(each.name, pattern) if pattern else each.depth <= depth and each.calls)
        or (not pattern and each.name in network.tapped)
    ]
    if not found:
        return f'  none is called {pattern}'
    table = _table('', 'layer', 'type', 'calls', 'puts out')
    for each in found:
        tapped = each.name in network.tapped
        table.add_row(
            '*' if tapped else '', each.name, each.kind, str(each.calls), output(each), style='bold' if tapped else ''
        )
    return table


def _table(*columns: str, right: tuple[str, ...] = ('calls',)) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for each in columns:
        table.add_column(each, overflow='fold', justify='right' if each in right else 'left')
    return table


def output(layer: Layer) -> str:
    """``256 x 32x32 /8``; of several maps of one width ``256 /8 /16 /32``."""
    if not layer.calls:
        return 'not called in a forward pass'
    if not layer.tappable:
        return 'changed in place later'
    if len(layer.shapes) == 1:
        (shape,), (stride,) = layer.shapes, layer.strides
        return f'{shape[0]} x {"x".join(map(str, shape[1:]))} /{stride}' if stride else 'x'.join(map(str, shape))
    parts, before = [], None
    for shape, stride in zip(layer.shapes, layer.strides):
        channels = 'x'.join(map(str, shape)) if stride is None else str(shape[0])
        parts.append((f'{channels} ' if channels != before else '') + ('' if stride is None else f'/{stride}'))
        before = channels
    return ' '.join(part.strip() for part in parts[:12] if part.strip()) + (' ...' if len(parts) > 12 else '')


def costs(seen: Overview) -> Table:
    counted = ('parameters', 'multiply-adds', 'as far as tapped')
    table = _table('', 'network', 'type', *counted, right=counted)
    for each in seen.networks:
        table.add_row(
            '',
            each.name,
            each.kind,
            f'{each.whole.parameters / 1e6:.2f} M',
            f'{each.whole.flops / 1e9:.2f} G',
            '' if each.name == 'student' else f'{each.cost.flops / 1e9:.2f} G',
        )
    return table


def methods(seen: Overview) -> Iterator[str]:
    for name, lines in seen.methods.items():
        yield f'  {name}: {lines[0]}'
        for line in lines[1:]:
            yield textwrap.fill(line, WIDTH, initial_indent='    ', subsequent_indent='      ')
    yield textwrap.fill(
        f'Of a training step {100 * seen.share:.0f} % of the multiplications (a backward pass taken for two forward passes), and '
        f"{100 * seen.memory_share:.0f} % of weights, gradients and momenta, are not the student's; mmkd benchmark measures it.",
        WIDTH,
        initial_indent='  ',
        subsequent_indent='  ',
    )


def training(seen: Overview) -> Iterator[str]:
    if seen.curves:
        yield f'  {seen.iterations} iterations of {seen.batch} images'
        wide = max(len(each.name) for each in seen.curves)
        for each in seen.curves:
            drawn = 'constant' if each.constant else each.draw(WIDTH - wide - 16)
            yield f'  {each.name:{wide}}  {drawn} {max(each.values):.3g}'
    for note in seen.notes:
        yield textwrap.fill(note, WIDTH, initial_indent='  ', subsequent_indent='  ')

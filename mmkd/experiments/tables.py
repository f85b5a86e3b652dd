"""The table of a comparison, for the terminal, as Markdown, and as rows of text."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

LEGEND = (
    'mean ± standard deviation over the seeds. Gain: over the student alone, mean over the seeds that both have. SE: '
    'standard error of the gain, sqrt(s1²/n + s2²/n), which of few seeds is itself a rough estimate. Gap closed: '
    "gain / (teacher - alone). Step time: median time of a training iteration over the student alone's."
)
FACTOR = (
    ' Factor: of all losses of a method, instead of its own weights; with it the gradient of distillation at the '
    "backbone, after a warm-up by the student's own losses, is {:g} % of its sum with the task's, norm by norm."
)


def columns(results: Mapping) -> tuple[str, ...]:
    score = results['score']['name']
    return (
        'method', 'student', 'teacher', score, f'{score} of seeds', 'gain', 'SE', 'gain / SE', '> 2 SE', 'gap closed',
        'step time', *(('factor',) if results.get('share') else ()),
    )  # fmt: skip


def rows(results: Mapping) -> list[dict[str, str]]:
    """The table, grouped by student: the student alone, its teachers, the methods, best first."""
    score_name, form = results['score']['name'], f'.{results["score"]["digits"]}f'

    def text(value: float | None, form: str = form) -> str:
        return '' if value is None else format(value, form)

    def row(method: str, student: str, teacher: str = '', of: Mapping = {}) -> dict[str, str]:
        made = dict.fromkeys(columns(results), '')
        made |= {'method': method, 'student': family(student), 'teacher': teacher}
        if 'scores' in of:
            spread = '' if of['deviation'] is None else f' ± {text(of["deviation"])}'
            made[score_name] = text(of['mean']) + spread or 'not finished'
            made[f'{score_name} of seeds'] = ' '.join(
                text(of['scores'][seed]) if seed in of['scores'] else '-' for seed in seeds
            )
        return made

    seeds = [str(seed) for seed in results['seeds']]
    table = []
    for student, alone in results['students'].items():
        methods = {name: each for name, each in results['methods'].items() if each['student'] == student}
        table.append(row('student alone', student, of=alone))
        for teacher in dict.fromkeys(teacher for each in methods.values() for teacher in each['teachers']):
            known = teacher in results['teachers']
            score = (text(results['teachers'][teacher]) or 'not finished') if known else 'not measured'
            table.append({**row('teacher', '', family(teacher)), score_name: score})
        for name, each in best_first(methods):
            error = each['unpaired']
            table.append(
                row(name, student, ' + '.join(map(family, each['teachers'])), each)
                | {
                    'gain': text(each['gain'], f'+{form}'),
                    'SE': text(error['error']),
                    'gain / SE': text(error['ratio'], '.1f'),
                    '> 2 SE': {None: '', True: 'yes', False: 'no'}[error['significant']],
                    'gap closed': text(each['gap_closed'], '.0%').replace('%', ' %'),
                    'step time': text(each['step_time'], '.2f'),
                }
                | ({'factor': text(each['factor'], '.3g')} if results.get('share') else {})
            )
    return table


def family(name: str) -> str:
    """A config's name without what it is: ``retinanet`` of ``retinanet_teacher`` and ``mmdet::.../retinanet.py``."""
    name = Path(name).stem if name.endswith('.py') else name
    return name.removesuffix('_student').removesuffix('_teacher')


def best_first(methods: Mapping[str, Mapping]) -> list[tuple[str, Mapping]]:
    return sorted(methods.items(), key=lambda item: math.inf if item[1]['mean'] is None else -item[1]['mean'])


def notes(results: Mapping) -> list[str]:
    """What failed, a line each, and what is missing, a line for each config."""
    lines = [f'Failed: {text}' for text in results['failed'].values()]
    missing: dict[str, list[str]] = {}
    for folder, state in results['missing'].items():
        name, _, seed = Path(folder).name.partition('_seed')
        missing.setdefault(name, []).append(f'seed {seed} {state}' if seed else state)
    for name, states in missing.items():
        none = len(states) == len(results['seeds']) and all(state.endswith('not begun') for state in states)
        lines.append(f'Missing: {name}: {"not begun" if none else ", ".join(states)}')
    return lines


def legend(results: Mapping) -> str:
    share = results.get('share')
    return f'{results["about"]}; {LEGEND}' + (FACTOR.format(100 * share) if share else '')


def markdown(results: Mapping) -> str:
    names = columns(results)
    lines = [f'| {" | ".join(names)} |', '|' + '---|' * len(names)]
    lines += [f'| {" | ".join(row.values())} |' for row in rows(results)]
    lines += ['', legend(results)]
    if notes(results):
        lines += ['', *(f'- {note}' for note in notes(results))]
    return '\n'.join(lines) + '\n'


def print_rows(title: str, content: list[dict[str, str]], left: int = 1, sections: str = '') -> None:
    """Print a table; the first ``left`` columns are flush left, a row that begins with ``sections`` gets a line above."""
    table = Table(title=title)
    for index, column in enumerate(content[0]):
        table.add_column(column, justify='left' if index < left else 'right', no_wrap=True)
    for row in content:
        cells = list(row.values())
        if cells[0] == sections:
            table.add_section()
        table.add_row(*cells)
    Console(width=1000).print(table)  # as wide as its cells: what does not fit would be cut off


def print_comparison(results: Mapping) -> None:
    images = f', {results["images"]} validation images' if results['images'] else ''
    title = f'{results["suite"]}{images}, seeds {" ".join(map(str, results["seeds"]))}'
    print_rows(title, rows(results), left=3, sections='student alone')
    print('\n'.join(notes(results)))

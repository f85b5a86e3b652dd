"""Train every method of a task on generated data, several seeds each, and compare it with its student alone.

python tools/compare.py                                      # all of configs/shapes, seeds 0, 1, 2
python tools/compare.py streets                              # all of configs/streets
python tools/compare.py shapes gid_retinanet pkd_retinanet   # these two, and what they are compared with
python tools/compare.py shapes --report-only                 # table and chart of what is finished

Teachers are trained first, then, seed by seed, students alone and methods. Finished runs are reused, interrupted ones
resumed. Writes table.md, chart.png, report.html and results.json to the work directory.
"""

import argparse
import fcntl
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pages import embed, render
from rich.console import Console
from rich.table import Table
from runs import Run, read, train_all
from suites import SUITES, Suite
from tqdm import tqdm

from mmkd import cli
from mmkd.errors import ConfigError, nearest

matplotlib.use('Agg')
WARM_UP = 0.1  # of a run's iterations, left out of its step time
LEGEND = (
    'mean ± standard deviation over the seeds. Gain: over the student alone, mean over the seeds that both have. SE: '
    'standard error of the gain, sqrt(s1²/n + s2²/n), which of few seeds is itself a rough estimate. Gap closed: '
    "gain / (teacher - alone). Step time: median time of a training iteration over the student alone's."
)


@dataclass(frozen=True)
class Method:
    """A config that distills, and the configs it is compared with; names without ``.py``."""

    name: str
    student: str
    teacher: str


def discover(folder: Path, only: Sequence[str] = ()) -> list[Method]:
    """The methods in a folder of configs: every config with distillers; ``only`` restricts them by name.

    A method's student alone is the ``*_student.py`` with the same model and validation data, which must have the same
    schedule.

    Raises:
        ConfigError: for a name that is not there, and for a config that cannot be compared.
    """
    students = {path.stem: read(str(path)) for path in sorted(folder.glob('*_student.py'))}
    names = [path.stem for path in sorted(folder.glob('*.py')) if not path.stem.endswith(('_student', '_teacher'))]
    for name in only:
        if name not in names:
            raise ConfigError(f'{name}: no such method in {folder}; the nearest are {nearest(name, names)}')
    methods = []
    for name in only or names:
        config = read(str(folder / f'{name}.py'))
        if 'distillers' not in config.model:
            continue
        alone = [
            each
            for each, plain in students.items()
            if plain.model == config.model.student and plain.val_dataloader == config.val_dataloader
        ]
        if len(alone) != 1:
            raise ConfigError(
                f'{name}: its student is the model of {len(alone)} configs {folder}/*_student.py, expected 1; what it is '
                f'compared with must be the same model, on the same images'
            )
        if students[alone[0]].train_cfg != config.train_cfg:
            raise ConfigError(f'{name}: its train_cfg is not that of {alone[0]}; both must have the same budget')
        teacher = config.model.teacher
        teacher = Path(
            (teacher if isinstance(teacher, str) else teacher.config).removeprefix(f'mmkd::{folder.name}/')
        ).stem
        if not (folder / f'{teacher}.py').is_file():
            raise ConfigError(f"{name}: its teacher's config, {teacher}, is not in {folder}")
        methods.append(Method(name, alone[0], teacher))
    return sorted(methods, key=lambda method: (method.student, method.name))


class Comparison:
    """All the runs of a comparison.

    Args:
        suite: Whose configs they are.
        methods: What to compare.
        seeds: Each student is trained with each of them.
        folder: The runs' work directories go in here.
    """

    def __init__(self, suite: Suite, methods: Sequence[Method], seeds: Sequence[int], folder: Path) -> None:
        self.suite = suite
        self.methods = list(methods)
        self.seeds = list(dict.fromkeys(seeds))
        names = dict.fromkeys(method.teacher for method in methods)
        self.teachers = {name: Run(name, f'mmkd::{suite.name}/{name}.py', folder / name) for name in names}
        self.runs: dict[str, dict[int, Run]] = {}
        for name in dict.fromkeys(method.student for method in methods):
            self.runs[name] = {seed: self._run(name, seed, folder) for seed in self.seeds}
        for method in methods:
            teacher = {'model.teacher.checkpoint': str(self.teachers[method.teacher].checkpoint)}
            self.runs[method.name] = {seed: self._run(method.name, seed, folder, teacher) for seed in self.seeds}

    def _run(self, name: str, seed: int, folder: Path, options: Mapping[str, object] = {}) -> Run:
        config = f'mmkd::{self.suite.name}/{name}.py'
        at_the_end = {'train_cfg.val_interval': read(config).train_cfg.max_iters}
        options = {'randomness.seed': seed, **at_the_end, **options}
        return Run(f'{name}, seed {seed}', config, folder / f'{name}_seed{seed}', options)

    def queue(self) -> list[Run]:
        """The students alone and the methods, seed by seed."""
        return [of_seed[seed] for seed in self.seeds for of_seed in self.runs.values()]

    def check(self) -> None:
        """Raise ConfigError if a run was begun with another config."""
        for run in [*self.teachers.values(), *self.queue()]:
            run.check_unchanged()

    def train(self, jobs: int) -> dict[str, str]:
        """Train what is not finished, ``jobs`` runs at a time; the failed ones, folder to error line."""
        threads = max(1, (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()) // jobs)
        failed = train_all(list(self.teachers.values()), jobs, threads)
        untaught = {}
        for method in self.methods:
            teacher = self.teachers[method.teacher]
            if str(teacher.folder) in failed:
                for run in self.runs[method.name].values():
                    untaught[str(run.folder)] = f'{run.name} not trained: its teacher, {teacher.name}, failed'
        ready = [run for run in self.queue() if str(run.folder) not in untaught]
        return failed | train_all(ready, jobs, threads) | untaught

    def missing(self) -> dict[str, str]:
        """The runs that are not finished: folder to how far each is."""
        found = {}
        for run in [*self.teachers.values(), *self.queue()]:
            if not run.finished:
                losses = run.losses()
                found[str(run.folder)] = f'stopped after iteration {losses[-1]["step"]}' if losses else 'not begun'
        return found

    def results(self, failed: Mapping[str, str] = {}) -> dict:
        """Everything that table and chart show, as JSON holds it."""
        missing = self.missing()

        def finished(runs: Mapping[int, Run]) -> dict[int, Run]:
            return {seed: run for seed, run in runs.items() if str(run.folder) not in missing}

        def score(run: Run) -> float:
            return run.evaluations()[-1][self.suite.key]

        def scores(runs: Mapping[int, Run]) -> dict[int, float]:
            return {seed: score(run) for seed, run in finished(runs).items()}

        teachers = {name: None if str(run.folder) in missing else score(run) for name, run in self.teachers.items()}
        students = {name: summary(scores(self.runs[name])) for name in self.runs if name.endswith('_student')}
        methods = {}
        for method in self.methods:
            own, alone = finished(self.runs[method.name]), finished(self.runs[method.student])
            common = [seed for seed in own if seed in alone]
            methods[method.name] = {
                'student': method.student,
                'teacher': method.teacher,
                **summary(scores(own)),
                **compare(scores(alone), scores(own), teachers[method.teacher]),
                'step_time': ratio_of_times([own[seed] for seed in common], [alone[seed] for seed in common]),
            }
        return {
            'suite': self.suite.name,
            'seeds': self.seeds,
            'teachers': teachers,
            'students': students,
            'methods': methods,
            'failed': dict(failed),
            'missing': {folder: state for folder, state in missing.items() if folder not in failed},
        }


def summary(scores: Mapping[int, float]) -> dict:
    """Score by seed, mean, and standard deviation (of two seeds or more)."""
    values = list(scores.values())
    return {
        'scores': {str(seed): score for seed, score in scores.items()},
        'mean': statistics.mean(values) if values else None,
        'deviation': statistics.stdev(values) if len(values) > 1 else None,
    }


def compare(alone: Mapping[int, float], distilled: Mapping[int, float], teacher: float | None) -> dict:
    r"""The gain of a method over its student alone, over the :math:`n` seeds that both have.

    With :math:`d_i` the difference of the two scores of seed :math:`i` and :math:`s` standard deviations,

    .. math::
        \text{gain} = \frac{1}{n} \sum_i d_i, \qquad
        \text{SE}_\text{unpaired} = \sqrt{\frac{s_\text{alone}^2}{n} + \frac{s_\text{distilled}^2}{n}}, \qquad
        \text{SE}_\text{paired} = \frac{s_d}{\sqrt{n}}

    Args:
        alone: Seed to score of the student alone.
        distilled: Seed to score of the same student with the method.
        teacher: The teacher's score.

    Returns:
        ``gain``, ``gap_closed`` (gain over the teacher's lead), and for both kinds of standard error ``error``,
        ``ratio`` (gain over it) and ``significant`` (the gain is more than two of them). What cannot be known
        is ``None``: everything without a common seed, errors of one seed, the ratio to an error of zero.
    """
    seeds = [seed for seed in distilled if seed in alone]
    if not seeds:
        return {'gain': None, 'gap_closed': None, 'unpaired': _error(None, None), 'paired': _error(None, None)}
    count = len(seeds)
    base, own = [alone[seed] for seed in seeds], [distilled[seed] for seed in seeds]
    differences = [b - a for a, b in zip(base, own)]
    gain = statistics.mean(differences)
    lead = None if teacher is None else teacher - statistics.mean(base)
    unpaired = paired = None
    if count > 1:
        unpaired = math.sqrt(statistics.variance(base) / count + statistics.variance(own) / count)
        paired = statistics.stdev(differences) / math.sqrt(count)
    return {
        'gain': gain,
        'gap_closed': gain / lead if lead is not None and lead > 0 else None,
        'unpaired': _error(gain, unpaired),
        'paired': _error(gain, paired),
    }


def _error(gain: float | None, error: float | None) -> dict:
    return {
        'error': error,
        'ratio': gain / error if error else None,
        'significant': None if error is None else gain > 2 * error,
    }


def ratio_of_times(distilled: Sequence[Run], alone: Sequence[Run]) -> float | None:
    """Median time of a training iteration, distilled over alone; the first tenth of each run is left out."""

    def times(runs: Iterable[Run]) -> list[float]:
        return [
            entry['time']
            for run in runs
            for entry in run.losses()
            if 'time' in entry and entry['step'] > WARM_UP * run.losses()[-1]['step']
        ]

    own, base = times(distilled), times(alone)
    return statistics.median(own) / statistics.median(base) if own and base else None


def columns(results: Mapping) -> tuple[str, ...]:
    score = SUITES[results['suite']].score
    return (
        'method', 'student', 'teacher', score, f'{score} of seeds', 'gain', 'SE', 'gain / SE', '> 2 SE', 'gap closed',
        'step time',
    )  # fmt: skip


def rows(results: Mapping) -> list[dict[str, str]]:
    """The table, grouped by student: the student alone, its teachers, the methods, best first."""
    suite = SUITES[results['suite']]
    form = f'.{suite.digits}f'

    def text(value: float | None, form: str = form) -> str:
        return '' if value is None else format(value, form)

    def row(method: str, student: str, teacher: str = '', of: Mapping = {}) -> dict[str, str]:
        made = dict.fromkeys(columns(results), '')
        made |= {'method': method, 'student': family(student), 'teacher': family(teacher)}
        if 'scores' in of:
            spread = '' if of['deviation'] is None else f' ± {text(of["deviation"])}'
            made[suite.score] = text(of['mean']) + spread or 'not finished'
            made[f'{suite.score} of seeds'] = ' '.join(
                text(of['scores'][seed]) if seed in of['scores'] else '-' for seed in seeds
            )
        return made

    seeds = [str(seed) for seed in results['seeds']]
    table = []
    for student, alone in results['students'].items():
        methods = {name: each for name, each in results['methods'].items() if each['student'] == student}
        table.append(row('student alone', student, of=alone))
        for teacher in dict.fromkeys(each['teacher'] for each in methods.values()):
            score = results['teachers'][teacher]
            table.append({**row('teacher', '', teacher), suite.score: text(score) or 'not finished'})
        for name, each in best_first(methods):
            error = each['unpaired']
            table.append(
                row(name, student, each['teacher'], each)
                | {
                    'gain': text(each['gain'], f'+{form}'),
                    'SE': text(error['error']),
                    'gain / SE': text(error['ratio'], '.1f'),
                    '> 2 SE': {None: '', True: 'yes', False: 'no'}[error['significant']],
                    'gap closed': text(each['gap_closed'], '.0%').replace('%', ' %'),
                    'step time': text(each['step_time'], '.2f'),
                }
            )
    return table


def family(name: str) -> str:
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


def print_table(results: Mapping) -> None:
    suite = SUITES[results['suite']]
    table = Table(title=f'{suite.name}, {suite.images} validation images, seeds {" ".join(map(str, results["seeds"]))}')
    for index, column in enumerate(columns(results)):
        table.add_column(column, justify='left' if index < 3 else 'right', no_wrap=True)
    for row in rows(results):
        if row['method'] == 'student alone':
            table.add_section()
        table.add_row(*row.values())
    Console(width=180).print(table)
    print('\n'.join(notes(results)))


def legend(results: Mapping) -> str:
    return f'{SUITES[results["suite"]].about}; {LEGEND}'


def markdown(results: Mapping) -> str:
    names = columns(results)
    lines = [f'| {" | ".join(names)} |', '|' + '---|' * len(names)]
    lines += [f'| {" | ".join(row.values())} |' for row in rows(results)]
    lines += ['', legend(results)]
    if notes(results):
        lines += ['', *(f'- {note}' for note in notes(results))]
    return '\n'.join(lines) + '\n'


def chart(results: Mapping) -> Figure:
    """Score of each method as a bar with its standard deviation and a dot per seed; one panel per student.

    Lines: the student alone, with its standard deviation as a band, and the teachers.
    """
    suite = SUITES[results['suite']]
    form = f'.{suite.digits}f'
    panels = {
        student: best_first(
            {
                name: each
                for name, each in results['methods'].items()
                if each['student'] == student and each['mean'] is not None
            }
        )
        for student in results['students']
    }
    panels = {student: methods for student, methods in panels.items() if methods} or {'no finished run': []}
    heights = [len(methods) + 0.2 for methods in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, 0.3 * sum(heights) + 0.7 * len(panels) + 0.6),
        gridspec_kw={'height_ratios': heights},
        sharex=True,
        squeeze=False,
        layout='constrained',
    )
    colours = dict(zip(results['teachers'], ['#444444', '#7d3c98', '#b9770e', '#117864']))
    for axis, (student, methods) in zip(axes[:, 0], panels.items()):
        for place, (_, each) in enumerate(methods):
            colour = '#c8cfd3' if each['unpaired']['significant'] is False else '#7fb3d5'
            axis.barh(
                place, each['mean'], xerr=each['deviation'], height=0.66, color=colour, ecolor='#1a5276', capsize=3
            )
            scores = list(each['scores'].values())
            axis.plot(scores, [place] * len(scores), '.', color='#1a5276', ms=4)
        alone = results['students'].get(student, {'mean': None})
        if alone['mean'] is not None:
            axis.axvline(alone['mean'], color='#c0392b', label=f'student alone {alone["mean"]:{form}}')
            spread = alone['deviation'] or 0
            axis.axvspan(alone['mean'] - spread, alone['mean'] + spread, color='#c0392b', alpha=0.15, lw=0)
        for teacher in dict.fromkeys(each['teacher'] for _, each in methods):
            score = results['teachers'][teacher]
            if score is not None:
                label = f'{family(teacher)} teacher {score:{form}}'
                axis.axvline(score, color=colours.get(teacher, 'black'), ls='--', label=label)
        labels = [
            name.removesuffix(f'_{family(student)}') + ('' if each['gain'] is None else f'  {each["gain"]:+{form}}')
            for name, each in methods
        ]
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_title(f'{family(student)} student', loc='left', fontsize=11, pad=20)  # the legend goes below it
        axis.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False, borderaxespad=0.2)
        axis.grid(axis='x', alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[['top', 'right']].set_visible(False)
    models = [*results['students'].values(), *results['methods'].values()]
    seen = [score for each in models for score in each['scores'].values()]
    seen += [score for score in results['teachers'].values() if score is not None]
    axes[-1, 0].set_xlim(0, 1.04 * max([*seen, 0.01]))
    axes[-1, 0].set_xlabel(
        f'{suite.score} on the validation images: mean, standard deviation, and a dot per seed.\n'
        'After the name: gain over the student alone; grey: no more than two standard errors.'
    )
    return figure


def write(results: Mapping, folder: Path) -> Path:
    """Write table, chart and report; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    (folder / 'table.md').write_text(markdown(results))
    figure = chart(results)
    figure.savefig(folder / 'chart.png', dpi=150)
    report = folder / 'report.html'
    report.write_text(
        render(
            Path(__file__).with_name('compare.html'),
            task=SUITES[results['suite']].task,
            columns=columns(results),
            rows=rows(results),
            seeds=results['seeds'],
            legend=legend(results),
            notes=notes(results),
            chart=embed(figure),
        )
    )
    return report


def lock(folder: Path):
    """Hold ``folder`` for this process: two queues would train the same runs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / 'lock').open('w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f'{folder}: another compare.py is at work there; wait for it or use --report-only') from None
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'suite',
        nargs='?',
        choices=SUITES,
        default='shapes',
        help='the folder of configs, and its data: %(choices)s; default %(default)s',
    )
    parser.add_argument('methods', nargs='*', help='configs of that folder, such as gid_retinanet; default all')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=1, help='runs trained at the same time; they share the CPU cores')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/compare_<suite>')
    parser.add_argument('--report-only', action='store_true', help='train nothing, report what is finished')
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f'--jobs: expected at least 1, but got {args.jobs}')
    suite = SUITES[args.suite]
    folder = args.work_dir or Path(f'work_dirs/compare_{suite.name}')
    failed: dict[str, str] = {}
    with cli.clear_errors(), nullcontext() if args.report_only else lock(folder):
        comparison = Comparison(suite, discover(suite.configs, args.methods), args.seeds, folder)
        comparison.check()
        if not args.report_only:
            tqdm.write(f'Data: {suite.generate()}')
            try:
                failed = comparison.train(args.jobs)
            except KeyboardInterrupt:
                sys.exit('Interrupted; the same command continues.')
        results = comparison.results(failed)
        print_table(results)
        print(f'Report: {write(results, folder)}')
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trainings too
    main()

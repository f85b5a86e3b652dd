"""Pictures of results: the chart of a comparison, and curves over the iterations."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmkd.experiments.runs import Run
from mmkd.experiments.suites import Score
from mmkd.experiments.tables import best_first, family

COLORS = {'teacher': '#444444', 'student alone': '#c0392b'}
OF_TEACHERS = ('#444444', '#7d3c98', '#b9770e', '#117864')
OF_METHODS = ('#2471a3', '#1e8449', '#b9770e', '#7d3c98', '#117864', '#6e2c00')


def chart(results: Mapping) -> Figure:
    """Score of each method as a bar with its standard deviation and a dot per seed; one panel per student.

    Lines: the student alone, with its standard deviation as a band, and the teachers.
    """
    form = f'.{results["score"]["digits"]}f'
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
    figure = Figure(figsize=(9, 0.3 * sum(heights) + 0.7 * len(panels) + 0.6), layout='constrained')
    axes = figure.subplots(len(panels), gridspec_kw={'height_ratios': heights}, sharex=True, squeeze=False)
    colors = dict(zip(results['teachers'], OF_TEACHERS))
    for axis, (student, methods) in zip(axes[:, 0], panels.items(), strict=True):
        for place, (_, each) in enumerate(methods):
            color = '#c8cfd3' if each['unpaired']['significant'] is False else '#7fb3d5'
            axis.barh(
                place, each['mean'], xerr=each['deviation'], height=0.66, color=color, ecolor='#1a5276', capsize=3
            )
            scores = list(each['scores'].values())
            axis.plot(scores, [place] * len(scores), '.', color='#1a5276', ms=4)
        alone = results['students'].get(student, {'mean': None})
        if alone['mean'] is not None:
            axis.axvline(alone['mean'], color='#c0392b', label=f'student alone {alone["mean"]:{form}}')
            spread = alone['deviation'] or 0
            axis.axvspan(alone['mean'] - spread, alone['mean'] + spread, color='#c0392b', alpha=0.15, lw=0)
        for teacher in dict.fromkeys(teacher for _, each in methods for teacher in each['teachers']):
            score = results['teachers'].get(teacher)
            if score is not None:
                label = f'{family(teacher)} teacher {score:{form}}'
                axis.axvline(score, color=colors.get(teacher, 'black'), ls='--', label=label)
        labels = [
            short(name, student) + ('' if each['gain'] is None else f'  {each["gain"]:+{form}}')
            for name, each in methods
        ]
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        title = f'{family(student)} student' if methods else student
        axis.set_title(title, loc='left', fontsize=11, pad=20)  # the legend goes below it
        axis.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False, borderaxespad=0.2)
        axis.grid(axis='x', alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[['top', 'right']].set_visible(False)
    models = [*results['students'].values(), *results['methods'].values()]
    seen = [score for each in models for score in each['scores'].values()]
    seen += [score for score in results['teachers'].values() if score is not None]
    axes[-1, 0].set_xlim(min([*seen, 0]), 1.04 * max([*seen, 0.01]))
    axes[-1, 0].set_xlabel(
        f'{results["score"]["name"]} on the validation images: mean, standard deviation, and a dot per seed.\n'
        'After the name: gain over the student alone; grey: no more than two standard errors.'
    )
    _widen(figure)
    return figure


def _widen(figure: Figure) -> None:
    """Make room for long names: a legend that is wider than its panel would leave no room for the bars."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axis in figure.axes:
        labels = [label.get_window_extent(renderer).width for label in axis.get_yticklabels()]
        legend = axis.get_legend()
        width = legend.get_window_extent(renderer).width if legend else 0
        needed = (max(labels, default=0) + width) / figure.dpi + 0.4
        figure.set_figwidth(max(figure.get_figwidth(), needed))


def short(method: str, student: str) -> str:
    """A method's name without its student's: ``gid`` of ``gid_retinanet`` and of ``retinanet_gid``."""
    return method.removesuffix(f'_{family(student)}').removeprefix(f'{family(student)}_')


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    padded = np.pad(np.asarray(values, float), (width // 2, width // 2), mode='edge')
    return np.convolve(padded, np.ones(width) / width, 'valid')


def curves(
    score: Score, task_loss: Callable[[dict], float], teacher: Run | None, students: Mapping[str, Sequence[Run]]
) -> list[Figure]:
    """Score, task loss, and each method's distillation losses over the iterations, first seed; a figure for each.

    Args:
        score: Of the first figure.
        task_loss: The student's own loss, of an entry of the log.
        teacher: Whose last score is a line, if there is one.
        students: What each is called, and its runs.
    """
    first = {name: runs[0] for name, runs in students.items()}
    distilled = {name: each for name, each in first.items() if 'distillers' in each.read().model}
    colors = COLORS | dict(zip(distilled, OF_METHODS))
    figures = [Figure(figsize=(4.2, 3.4)) for _ in range(2 + len(distilled))]
    axes = [figure.subplots() for figure in figures]
    for name, each in first.items():
        entries = [entry for entry in each.evaluations() if score.key in entry]
        axes[0].plot(
            [e['step'] for e in entries], [e[score.key] for e in entries], 'o-', color=colors.get(name), label=name
        )
        entries = each.losses()
        axes[1].plot(
            [e['step'] for e in entries], smooth([task_loss(e) for e in entries]), color=colors.get(name), label=name
        )
    if teacher is not None:
        last = teacher.scores()[score.key]
        axes[0].axhline(last, color=colors['teacher'], ls='--', label='teacher, at its end')
    axes[0].set(title=f'{score.name} on the validation images', ylim=(0, None))
    axes[1].set(title='task loss')
    axes[0].legend(fontsize=7, loc='best')
    axes[1].legend(fontsize=8)
    for axis, (name, each) in zip(axes[2:], distilled.items(), strict=True):
        entries = each.losses()
        keys = distillation_losses(each)
        for key in keys:
            seen = [e for e in entries if key in e]
            axis.plot([e['step'] for e in seen], smooth([e[key] for e in seen]), label=key)
        axis.set_title('distillation losses' + (f' of {name}' if len(distilled) > 1 else ''))
        if min((e[key] for e in entries for key in keys if key in e), default=1) > 0:
            axis.set_yscale('log')
        else:  # a critic's losses are of either sign
            axis.set_yscale('symlog', linthresh=0.1)
        if keys:
            axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
    axes[0].set_xlabel('epoch' if next(iter(first.values())).unit == 'epoch' else 'iteration')
    for figure in figures:
        figure.tight_layout()
    return figures


def distillation_losses(run: Run) -> list[str]:
    """The keys in a run's log of what its distillers add to the loss."""
    names = tuple(run.read().model.get('distillers', ()))
    keys = dict.fromkeys(key for entry in run.losses() for key in entry)
    return [key for key in keys if key.partition('.')[0] in names and '.loss' in key]

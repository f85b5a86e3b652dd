"""A demo's table and its report, one self-contained HTML file."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from pages import embed, render
from rich.console import Console
from rich.table import Table
from runs import Run
from suites import Suite

matplotlib.use('Agg')
COLOURS = {'teacher': '#444444', 'student alone': '#c0392b', 'CWD': '#2471a3', 'GID': '#1e8449', 'SKD': '#1e8449'}


@dataclass(frozen=True)
class Demo:
    """One task's demo.

    Args:
        suite: Its configs and data.
        teacher: The teacher's config.
        students: What the report calls each student, and its config; the first is the student alone.
        metrics: What the table calls each metric, and its key in the logs; the first is the suite's score.
        task_loss: The student's own loss, of an entry of the log.
        title: Of the report.
        data: What the data are, a sentence.
        metric_note: What a reader has to know of the metrics.
        picture_note: What the pictures show.
        show: From teacher and students: the pictures, as a data URL, and more tables, by title.
    """

    suite: Suite
    teacher: str
    students: dict[str, str]
    metrics: dict[str, str]
    task_loss: Callable[[dict], float]
    title: str
    data: str
    metric_note: str
    picture_note: str
    show: Callable[[Run, dict[str, list[Run]]], tuple[str, dict[str, list[dict[str, str]]]]]


def rows(demo: Demo, teacher: Run, students: dict[str, list[Run]]) -> list[dict[str, str]]:
    """The table: one row per model, its metrics as mean and, of several seeds, standard deviation."""

    def values(runs: list[Run], metric: str) -> list[float]:
        return [each.evaluations()[-1][metric] for each in runs]

    form = f'.{demo.suite.digits}f'
    of_teacher = values([teacher], demo.suite.key)[0]
    alone = values(students['student alone'], demo.suite.key)
    table = []
    for name, runs in {'teacher': [teacher], **students}.items():
        row = {'model': name}
        for title, metric in demo.metrics.items():
            found = values(runs, metric)
            if min(found) < 0:
                row[title] = 'none'  # COCO's -1: no object of this size
            elif len(found) > 1:
                row[title] = f'{statistics.mean(found):{form}} ± {statistics.stdev(found):{form}}'
            else:
                row[title] = f'{found[0]:{form}}'
        row['parameters'] = f'{runs[0].parameters() / 1e3:.0f} k'
        scores = values(runs, demo.suite.key)
        if name in ('teacher', 'student alone'):
            row['gap closed'] = ''
        else:
            closed = [(score - base) / (of_teacher - base) for score, base in zip(scores, alone)]
            row['gap closed'] = f'{100 * statistics.mean(closed):.0f} %'
        if len(alone) > 1:
            row[f'{demo.suite.score} by seed'] = ' '.join(f'{score:{form}}' for score in scores)
        table.append(row)
    return table


def print_table(demo: Demo, teacher: Run, students: dict[str, list[Run]]) -> None:
    content = rows(demo, teacher, students)
    table = Table(title=f'{demo.suite.name}, {demo.suite.images} validation images')
    for column in content[0]:
        table.add_column(column, justify='left' if column == 'model' else 'right', no_wrap=True)
    for row in content:
        table.add_row(*row.values())
    Console(width=180).print(table)


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    padded = np.pad(values, (width // 2, width // 2), mode='edge')
    return np.convolve(padded, np.ones(width) / width, 'valid')


def curves(demo: Demo, teacher: Run, students: dict[str, list[Run]]) -> str:
    """Score, task loss, and each distillation loss over the iterations, first seed."""
    first = {name: runs[0] for name, runs in students.items()}
    distilled = {name: each for name, each in first.items() if name != 'student alone'}
    figure, axes = plt.subplots(1, 2 + len(distilled), figsize=(4.2 * (2 + len(distilled)), 3.4))
    for name, each in first.items():
        entries = each.evaluations()
        axes[0].plot(
            [e['step'] for e in entries], [e[demo.suite.key] for e in entries], 'o-', color=COLOURS[name], label=name
        )
        entries = each.losses()
        task = [demo.task_loss(e) for e in entries]
        axes[1].plot([e['step'] for e in entries], smooth(task), color=COLOURS[name], label=name)
    axes[0].axhline(
        teacher.evaluations()[-1][demo.suite.key], color=COLOURS['teacher'], ls='--', label='teacher, at its end'
    )
    axes[0].set(title=f'{demo.suite.score} on the validation images', ylim=(0, None))
    axes[1].set(title='task loss')
    axes[0].legend(fontsize=7, loc='lower right')
    axes[1].legend(fontsize=8)
    for axis, (name, each) in zip(axes[2:], distilled.items()):
        entries = each.losses()
        names = tuple(each.read().model.distillers)
        keys = [key for key in entries[0] if key.partition('.')[0] in names and '.loss' in key]
        for key in keys:
            axis.plot([e['step'] for e in entries], smooth([e[key] for e in entries]), label=key)
        axis.set_title(f'distillation losses of {name}')
        if min(e[key] for e in entries for key in keys) > 0:
            axis.set_yscale('log')
        else:  # a critic's losses are of either sign
            axis.set_yscale('symlog', linthresh=0.1)
        axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return embed(figure)


def write_report(demo: Demo, teacher: Run, students: dict[str, list[Run]], path: Path) -> Path:
    """Write the report; its path."""
    pictures, tables = demo.show(teacher, students)
    page = render(
        Path(__file__).with_name('report.html'),
        demo=demo,
        tables={'Results': rows(demo, teacher, students), **tables},
        seeds=len(students['student alone']),
        iterations={'teacher': teacher.iterations, 'student': students['student alone'][0].iterations},
        curves=curves(demo, teacher, students),
        pictures=pictures,
    )
    path.write_text(page)
    return path

"""Reports: a table of results with its pictures, one self-contained HTML file."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.experiments.charts import chart, curves
from mmkd.experiments.pages import embed, render
from mmkd.experiments.runs import Run
from mmkd.experiments.suites import Score
from mmkd.experiments.tables import columns, legend, markdown, notes
from mmkd.experiments.tables import rows as comparison_rows


def write_comparison(results: Mapping, folder: Path) -> Path:
    """Write a comparison's ``results.json``, ``table.md``, ``chart.png`` and ``report.html``; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    (folder / 'table.md').write_text(markdown(results))
    figure = chart(results)
    figure.savefig(folder / 'chart.png', dpi=150)
    report = folder / 'report.html'
    report.write_text(
        render(
            'comparison.html',
            heading=results['heading'],
            columns=columns(results),
            rows=comparison_rows(results),
            seeds=results['seeds'],
            legend=legend(results),
            notes=notes(results),
            chart=embed(figure),
        )
    )
    return report


@dataclass(frozen=True)
class Report:
    """What a report on a teacher and its students says.

    Args:
        title: Of the page.
        data: What the data are, a sentence.
        training: How the models were trained, the end of a sentence.
        score: What ranks the models.
        metrics: What the table calls each metric, and its key in the logs; the first is the score.
        task_loss: The student's own loss, of an entry of the log.
        metric_note: What a reader has to know of the metrics.
        picture_note: What the pictures show.
    """

    title: str
    data: str
    training: str
    score: Score
    metrics: Mapping[str, str]
    task_loss: Callable[[dict], float]
    metric_note: str = ''
    picture_note: str = ''

    def rows(self, teacher: Run, students: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
        """The table: one row per model, its metrics as mean and, of several seeds, standard deviation."""

        def values(runs: Sequence[Run], metric: str) -> list[float]:
            return [each.scores()[metric] for each in runs]

        form = f'.{self.score.digits}f'
        of_teacher = values([teacher], self.score.key)[0]
        alone = values(students['student alone'], self.score.key)
        table = []
        for name, runs in {'teacher': [teacher], **students}.items():
            row = {'model': name}
            for title, metric in self.metrics.items():
                found = values(runs, metric)
                if min(found) < 0:
                    row[title] = 'none'  # COCO's -1: no object of this size
                elif len(found) > 1:
                    row[title] = f'{statistics.mean(found):{form}} ± {statistics.stdev(found):{form}}'
                else:
                    row[title] = f'{found[0]:{form}}'
            row['parameters'] = f'{runs[0].parameters() / 1e3:.0f} k'
            scores = values(runs, self.score.key)
            row['gap closed'] = ''
            if name not in ('teacher', 'student alone') and of_teacher > max(alone):  # else there is no gap
                closed = [(score - base) / (of_teacher - base) for score, base in zip(scores, alone, strict=True)]
                row['gap closed'] = f'{100 * statistics.mean(closed):.0f} %'
            if len(alone) > 1:
                row[f'{self.score.name} by seed'] = ' '.join(f'{score:{form}}' for score in scores)
            table.append(row)
        return table

    def write(
        self,
        path: Path,
        teacher: Run,
        students: Mapping[str, Sequence[Run]],
        pictures: str,
        tables: Mapping[str, Sequence[Mapping[str, str]]] = {},
    ) -> Path:
        """Write the page; its path.

        Args:
            path: Of the HTML file.
            teacher: Finished.
            students: What each is called, ``'student alone'`` first, and its runs, one per seed.
            pictures: A data URL.
            tables: More tables, by title: rows of cells by column.
        """
        page = render(
            'report.html',
            report=self,
            tables={'Results': self.rows(teacher, students), **tables},
            seeds=len(students['student alone']),
            lengths={'teacher': _length(teacher), 'student': _length(students['student alone'][0])},
            curves=[embed(each) for each in curves(self.score, self.task_loss, teacher, students)],
            pictures=pictures,
        )
        path.write_text(page)
        return path


def _length(run: Run) -> str:
    return f'{run.length} {"epochs" if run.unit == "epoch" else "iterations"}'

"""The demos: a small network learns from a larger one, on generated data, with a table and a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from mmkd.experiments.report import Report
from mmkd.experiments.runs import Run
from mmkd.experiments.suites import Suite
from mmkd.experiments.tables import print_rows

TASKS = ('detection', 'segmentation')


@dataclass(frozen=True)
class Demo:
    """One task's demo.

    Args:
        suite: Its configs and data.
        teacher: The teacher's config.
        students: What the report calls each student, and its config; the first is the student alone.
        report: What the report says.
        show: From teacher and students: the pictures, as a data URL, and more tables, by title.
    """

    suite: Suite
    teacher: str
    students: dict[str, str]
    report: Report
    show: Callable[[Run, dict[str, list[Run]]], tuple[str, dict[str, list[dict[str, str]]]]]

    def runs(self, seeds: Sequence[int], folder: Path) -> tuple[Run, dict[str, list[Run]]]:
        """The teacher's run, and those of each student, one per seed."""
        teacher = Run('teacher', self.suite.config(self.teacher), folder / 'teacher')
        students: dict[str, list[Run]] = {name: [] for name in self.students}
        for seed in seeds:
            for name, config in self.students.items():
                options: dict[str, object] = {'randomness.seed': seed}
                if name != 'student alone':
                    options['model.teacher.checkpoint'] = str(teacher.checkpoint)
                run = Run(name, self.suite.config(config), folder / f'{config}_seed{seed}', options)
                students[name].append(run)
        return teacher, students


def run_demo(task: str, seeds: Sequence[int], folder: Path) -> Path:
    """Generate the data, train what is not finished, print the table and write the report; its path.

    Args:
        task: ``'detection'`` or ``'segmentation'``.
        seeds: Each student is trained with each of them.
        folder: The runs' work directories and the report go in here.

    Raises:
        RunFailed: if a training fails.
    """
    demo: Demo = import_module(f'{__name__}.{task}').DEMO  # a segmentation user needs no mmdet
    suite = demo.suite
    if suite.generate:
        print(f'Data: {suite.generate()}', flush=True)
    teacher, students = demo.runs(seeds, folder)
    runs = [teacher, *(run for of_seed in zip(*students.values(), strict=True) for run in of_seed)]
    for number, run in enumerate(runs, 1):
        run.train(f'[{number}/{len(runs)}]')
    print_rows(f'{suite.name}, {suite.images} validation images', demo.report.rows(teacher, students))
    pictures, tables = demo.show(teacher, students)
    return demo.report.write(folder / 'report.html', teacher, students, pictures, tables)

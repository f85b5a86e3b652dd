"""Train every method of a folder of configs, several seeds each, and compare it with its student alone."""

import contextlib
import dataclasses
import fcntl
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from mmengine.config import Config
from tqdm import tqdm

from mmkd import checks
from mmkd.errors import ConfigError
from mmkd.experiments import suites
from mmkd.experiments.configs import read, teachers_of
from mmkd.experiments.discovery import Method, beside, discover, stages_before, teachers_there
from mmkd.experiments.report import write_comparison
from mmkd.experiments.runs import Run, RunFailed, train_all
from mmkd.experiments.shares import Share
from mmkd.experiments.statistics import compare, ratio_of_medians, summary
from mmkd.experiments.suites import SUITES, Suite
from mmkd.experiments.tables import print_comparison


class Comparison:
    """All the runs of a comparison.

    Args:
        suite: Whose configs they are.
        methods: What to compare.
        seeds: Each student is trained with each of them.
        folder: The runs' work directories go in here.
        share: Of the gradient at the student's backbone, which every method is given by a factor of all its losses
            (:class:`mmkd.experiments.shares.Share`); ``None``: all have the weights of their configs.

    Attributes:
        reported: Where the report goes: ``folder``, or that of the methods' runs with this share, which lies in it.
    """

    def __init__(
        self, suite: Suite, methods: Sequence[Method], seeds: Sequence[int], folder: Path, share: float | None = None
    ) -> None:
        self.suite = suite
        self.methods = list(methods)
        self.share = share
        self.reported = folder if share is None else folder / f'share_{share:g}'
        self.seeds = list(dict.fromkeys(seeds))
        self._taught_by: dict[str, list[str]] = {}
        for method in methods:
            for name in method.teachers.values():
                self._add_teacher(name)
        names = sorted(self._taught_by, key=self._stage)
        self.teachers = {name: Run(name, suite.config(name), folder / name) for name in names}
        for name, run in self.teachers.items():  # an assistant is taught as well
            run.options = self._teaching(name)
        self.runs: dict[str, dict[int, Run]] = {}
        for name in dict.fromkeys(method.student for method in methods):
            self.runs[name] = {seed: self._run(name, seed, folder) for seed in self.seeds}
        for method in methods:
            options = self._teaching(method.name)
            self.runs[method.name] = {seed: self._run(method.name, seed, self.reported, options) for seed in self.seeds}
        self.shares: dict[str, Share] = {}
        for method in methods if share is not None else ():
            # with the config's own seed: one factor for all seeds, those that are added later too
            folder_of, options = self.reported / f'{method.name}_check', self._teaching(method.name)
            self.shares[method.name] = Share(method.name, suite.config(method.name), folder_of, options, share=share)
            self._apply(method.name)

    def _apply(self, name: str) -> None:
        """Give the runs of a method its factor, once that is known."""
        if self.shares[name].finished:
            with contextlib.suppress(RunFailed):  # there is none: it is not trained
                for run in self.runs[name].values():
                    run.options = {**run.options, **self.shares[name].changes()}

    def _run(self, name: str, seed: int, folder: Path, options: Mapping[str, object] = {}) -> Run:
        run = Run(f'{name}, seed {seed}', self.suite.config(name), folder / f'{name}_seed{seed}')
        run.options = {'randomness.seed': seed, 'train_cfg.val_interval': run.length, **options}
        return run

    def _add_teacher(self, name: str) -> None:
        teachers, _ = teachers_there(read(self.suite.config(name)), self.suite.configs)
        self._taught_by[name] = list(teachers.values())
        for each in teachers.values():
            self._add_teacher(each)

    def _stage(self, teacher: str) -> int:
        return stages_before(teacher, self.suite.configs)

    def _teaching(self, name: str) -> dict[str, object]:
        """Where the teachers of a config are, as changes to it."""
        changes: dict[str, object] = {}
        config = read(self.suite.config(name))
        here, _ = teachers_there(config, self.suite.configs)
        for option, teacher in teachers_of(config).items():
            if option in here:
                changes[f'{option}.checkpoint'] = str(self.teachers[here[option]].checkpoint)
                if not teacher['config'].startswith('mmkd::'):
                    changes[f'{option}.config'] = os.path.abspath(self.suite.config(here[option]))
                continue
            for key in ('config', 'checkpoint'):
                if isinstance(teacher.get(key), str):
                    found = beside(teacher[key], self.suite.configs)
                    changes |= {f'{option}.{key}': found} if found != teacher[key] else {}
        return changes

    def queue(self) -> list[Run]:
        """The students alone and the methods, seed by seed."""
        return [of_seed[seed] for seed in self.seeds for of_seed in self.runs.values()]

    def check(self) -> None:
        """Raise ConfigError if a run was begun with another config."""
        for run in [*self.teachers.values(), *self.shares.values(), *self.queue()]:
            run.check_unchanged()

    def check_inputs(self) -> None:
        """Raise ConfigError if data, or weights of a teacher that is not trained here, are not there."""
        for run in [*self.teachers.values(), *(of_seed[self.seeds[0]] for of_seed in self.runs.values())]:
            try:
                checks.check_data(run.read(), ('train', 'val'))
            except ConfigError as error:
                raise ConfigError(f'{run.config}: {error}') from None
        for method in self.methods:
            if not method.teachers:
                run = self.runs[method.name][self.seeds[0]]
                try:
                    checks.check_teachers(Config(dict(model=run.read().model, launcher='none')))
                except ConfigError as error:
                    raise ConfigError(
                        f'{run.config}: {error}; a teacher whose config lies in {self.suite.configs} is trained first'
                    ) from None

    def train(self, jobs: int) -> dict[str, str]:
        """Train what is not finished, ``jobs`` runs at a time; the failed ones, folder to error line."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        threads = max(1, cores // jobs)
        failed: dict[str, str] = {}
        for _, names in itertools.groupby(self.teachers, self._stage):
            failed |= self._train(
                [(self.teachers[name], self._taught_by[name]) for name in names], failed, jobs, threads
            )
        taught_by = {method.name: list(method.teachers.values()) for method in self.methods}
        if self.shares:
            failed |= self._measure(taught_by, failed, jobs, threads)
        queue = [(runs[seed], taught_by.get(name, [])) for seed in self.seeds for name, runs in self.runs.items()]
        return failed | self._train(queue, failed, jobs, threads)

    def _measure(
        self, taught_by: Mapping[str, Sequence[str]], failed: Mapping[str, str], jobs: int, threads: int
    ) -> dict[str, str]:
        """Find the factor of each method, and give it to its runs; the runs of those that have none, with why."""
        taught = [
            each
            for name, each in self.shares.items()
            if not any(str(self.teachers[teacher].folder) in failed for teacher in taught_by[name])
        ]
        unmeasured = train_all(taught, jobs, threads)
        for name in self.shares:
            self._apply(name)
        return {
            str(run.folder): unmeasured[str(share.folder)]
            for name, share in self.shares.items()
            if str(share.folder) in unmeasured
            for run in self.runs[name].values()
        }

    def _train(
        self, queue: Sequence[tuple[Run, Sequence[str]]], failed: Mapping[str, str], jobs: int, threads: int
    ) -> dict[str, str]:
        """Train the runs whose teachers have not failed; the failed ones and those without a teacher, with why."""
        untaught = {}
        for run, teachers in queue:
            for teacher in (self.teachers[name] for name in teachers):
                if str(teacher.folder) in failed:
                    untaught[str(run.folder)] = f'{run.name} not trained: its teacher, {teacher.name}, failed'
        ready = [run for run, _ in queue if str(run.folder) not in {*untaught, *failed}]
        return train_all(ready, jobs, threads, self.score) | untaught

    def score(self, run: Run) -> float:
        """The score of a finished run.

        Raises:
            ConfigError: if its evaluation logged no such score.
        """
        logged = run.scores()
        if self.suite.score.key not in logged:
            raise ConfigError(
                f'{run.name}: its evaluation logged no {self.suite.score.key!r}; choose one of {", ".join(logged)} with '
                f'--score'
            )
        return logged[self.suite.score.key]

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

        def scores(runs: Mapping[int, Run]) -> dict[int, float]:
            return {seed: self.score(run) for seed, run in finished(runs).items()}

        def times(runs: Mapping[int, Run], seeds: Sequence[int]) -> list[float]:
            return [time for seed in seeds for time in runs[seed].step_times()]

        teachers = {
            name: None if str(run.folder) in missing else self.score(run) for name, run in self.teachers.items()
        }
        students = {
            name: summary(scores(self.runs[name])) for name in dict.fromkeys(each.student for each in self.methods)
        }
        methods = {}
        for method in self.methods:
            own, alone = finished(self.runs[method.name]), finished(self.runs[method.student])
            common = [seed for seed in own if seed in alone]
            taught_by = [teachers[name] for name in method.teachers.values()]
            known = [score for score in taught_by if score is not None]
            all_known = bool(known) and len(known) == len(taught_by) and not method.given
            methods[method.name] = {
                'student': method.student,
                'teachers': [*method.teachers.values(), *method.given.values()],
                **summary(scores(own)),
                **compare(scores(alone), scores(own), max(known) if all_known else None),
                **({'factor': self._factor(method.name)} if self.shares else {}),
                'step_time': ratio_of_medians(times(own, common), times(alone, common)),
            }
        found = [score for score in teachers.values() if score is not None]
        found += [score for each in (*students.values(), *methods.values()) for score in each['scores'].values()]
        return {
            'suite': self.suite.name,
            'heading': self.suite.heading,
            'about': self.suite.about,
            'images': self.suite.images,
            'score': dataclasses.asdict(self.suite.score)
            | {'digits': self.suite.score.digits or (3 if all(abs(score) <= 1 for score in found) else 2)},
            'seeds': self.seeds,
            'share': self.share,
            'teachers': teachers,
            'students': students,
            'methods': methods,
            'failed': dict(failed),
            'missing': {folder: state for folder, state in missing.items() if folder not in failed},
        }

    def _factor(self, name: str) -> float | None:
        share = self.shares[name]
        with contextlib.suppress(RunFailed):
            return share.factor if share.finished else None
        return None


def lock(folder: Path) -> IO:
    """Hold ``folder`` for this process: two queues would train the same runs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / 'lock').open('w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f'{folder}: another comparison is at work there; wait for it or use --report-only') from None
    return file


def suite_of(name: str, methods: Sequence[str] = (), score: str | None = None) -> tuple[Suite, list[Method]]:
    """The suite of a name, ``shapes`` or ``streets``, or of a user's folder, and its methods.

    Raises:
        ConfigError: if there is no such folder, or it cannot be compared.
    """
    if name in SUITES:
        suite = SUITES[name].ranked_by(score) if score else SUITES[name]
        return suite, discover(suite.configs, methods)
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f'{name}: no such folder (looked in {Path.cwd()}); expected one with configs, or {" or ".join(SUITES)}'
        )
    found = discover(folder, methods)
    return suites.of_folder(folder, {each.name: read(str(folder / f'{each.name}.py')) for each in found}, score), found


def run_comparison(
    name: str,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    work_dir: Path | None = None,
    score: str | None = None,
    report_only: bool = False,
    share: float | None = None,
) -> dict:
    """Train what is not finished, write table, chart and report, and print the table.

    Args:
        name: ``shapes``, ``streets`` or a folder of configs.
        methods: Names of configs, without ``.py``; none: every config that distills.
        seeds: Each student is trained with each of them.
        jobs: Runs trained at the same time; they share the CPU cores.
        work_dir: Where the runs and the report go; default ``work_dirs/compare_<name>``.
        score: The key in the logs of what ranks the models; default: the one that the configs name.
        report_only: Train nothing, report what is finished.
        share: Of the gradient, which each method is given instead of its weights, see :class:`Comparison`.

    Returns:
        The results, as ``results.json`` holds them.

    Raises:
        ConfigError: before anything is trained, if the configs cannot be compared; after the first run, if it logged
            no such score.
    """
    suite, found = suite_of(name, methods, score)
    folder = work_dir or Path(f'work_dirs/compare_{suite.name}')
    failed: dict[str, str] = {}
    with contextlib.nullcontext() if report_only else lock(folder):
        comparison = Comparison(suite, found, seeds, folder, share)
        comparison.check()
        if not report_only:
            if suite.generate:
                tqdm.write(f'Data: {suite.generate()}')
            else:
                comparison.check_inputs()
            failed = comparison.train(jobs)
        results = comparison.results(failed)
        print_comparison(results)
        print(f'Report: {write_comparison(results, comparison.reported)}')
    return results

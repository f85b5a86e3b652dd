"""A report on one training of one's own, beside the student alone and the teacher: one self-contained HTML file."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mmkd
from mmkd.analysis.scores import build_evaluator
from mmkd.checks import check_folder
from mmkd.checks.data import check_data
from mmkd.errors import ConfigError
from mmkd.experiments.charts import curves, distillation_losses
from mmkd.experiments.pages import embed, render
from mmkd.experiments.suites import Score, named
from mmkd.experiments.work_dirs import Finished, Given, check_comparable, score_of
from mmkd.hosts.configs import described_sources, plain_model
from mmkd.hosts.datasets import annotation_path, datasets, type_name
from mmkd.hosts.plain import STOCK

ALONE, TEACHER = 'student alone', 'teacher'
OF_TASK = {'mmdet': 'mmkd.experiments.boxes.Boxes', 'mmseg': 'mmkd.experiments.label_maps.LabelMaps'}
NOT_COMPARED = {'work_dir', 'launcher', 'resume', 'load_from', 'experiment_name'}
LINES = 80  # of the configs' difference that are shown


def write_report(
    folder: str,
    alone: str | None = None,
    teacher: Sequence[str] = (),
    out: Path | None = None,
    score: str | None = None,
    images: int = 4,
    pictures: bool = True,
) -> Path:
    """Write the report; its path.

    Args:
        folder: The work directory of a training, distilled or plain.
        alone: The work directory of the same student without distillers.
        teacher: Its work directory, or its config and its checkpoint, which is evaluated.
        out: The file; default ``report.html`` in ``folder``.
        score: The key in the logs of what ranks the models; default: the one that the config names.
        images: How many images are shown of those that got better, and of those that got worse.
        pictures: Run the models on the validation images, for pictures and scores by class; needs the data.

    Raises:
        ConfigError: if something that is needed is not there, or the runs cannot be compared.
    """
    run = Finished('distilled', folder, 'WORK_DIR')
    if not run.distills:
        run.name = 'student'
    ranked = score_of(run, score)
    out = out or run.folder / 'report.html'
    check_folder(str(out.parent), '--out')
    if out.is_dir():
        raise ConfigError(f'--out {out}: is a folder; name a file')
    others: list[Finished] = []
    if alone:
        others.append(Finished(ALONE, alone, '--alone'))
    if len(teacher) == 1:
        others.append(Finished(TEACHER, teacher[0], '--teacher'))
    for other in others:
        check_comparable(run, other, ranked)
    if len(teacher) == 2:
        if not pictures:
            raise ConfigError('--teacher CONFIG CHECKPOINT has to be evaluated, and --no-pictures runs no model')
        others.append(Given(TEACHER, teacher[0], teacher[1], run, '--teacher'))
    runs = {each.name: each for each in [run, *others]}
    seen = _look(runs) if pictures else None
    ordered = {name: runs[name] for name in (ALONE, run.name, TEACHER) if name in runs}
    values = dict(
        title=f'{Path(folder).resolve().name}: {_kind(run.read())}',
        summary=_summary(run, ordered),
        score=ranked.name,
        results_note=_results_note(ordered, run.name),
        results=_results(ordered, run.name, ranked),
        curves=[embed(each) for each in _curves(ranked, ordered)],
        series=_series(ordered, run.name, ranked),
        times=_times(ordered),
        measure=seen.measure if seen else '',
        by_class=[],
        by_class_note='',
        pictures=[],
        distillation=_distillation(run.read()),
        config_note='',
        difference=[],
        versions=_versions(run),
    )
    if seen is not None:
        values['by_class'], values['by_class_note'] = _by_class(seen, ordered, run.name)
        values['pictures'] = list(_pictures(seen, ordered, run.name, images))
    if ALONE in runs:
        difference = config_difference(runs[ALONE].read(), run.read())
        values['config_note'] = f'What differs from the config of the student alone, {len(difference)} lines' + (
            f', of which the first {LINES}:' if len(difference) > LINES else ':'
        )
        values['difference'] = difference[:LINES]
    else:
        values['config_note'] = f'The config is {run.config}.'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render('run.html', **values), encoding='utf-8')
    return out


def _kind(config: Config) -> str:
    return type_name(plain_model(config))


def _look(runs: Mapping[str, Finished]) -> Any:
    """All models' predictions for the validation images; those without a log are evaluated."""
    run = next(iter(runs.values()))
    scope = run.read().get('default_scope')
    if scope not in OF_TASK:
        raise ConfigError(
            f'{run.folder}: default_scope={scope!r}: pictures are made for {" and ".join(OF_TASK)}; --no-pictures leaves '
            f'them out'
        )
    for each in runs.values():
        _ = each.checkpoint  # is there, before any model runs
        try:
            check_data(each.read(), ('val',))
        except ConfigError as error:
            raise ConfigError(
                f'{each.option} {each.folder}: {error}; relative paths begin at the current folder, and --no-pictures '
                f'leaves out what needs the data'
            ) from None
    init_default_scope(scope)
    metrics = {name: build_evaluator(each.read()) for name, each in runs.items() if isinstance(each, Given)}
    module, _, name = OF_TASK[scope].rpartition('.')
    seen = getattr(import_module(module), name)(runs, metrics)  # a segmentation user needs no mmdet
    count = len(next(iter(seen.by_image().values())))
    for name, each in metrics.items():
        runs[name].measured = {key: float(value) for key, value in each.evaluate(count).items()}
    return seen


def _curves(score: Score, runs: Mapping[str, Finished]) -> list:
    students = {name: [each] for name, each in runs.items() if name != TEACHER}
    return curves(
        score, task_loss(*(each for name, each in runs.items() if name != TEACHER)), runs.get(TEACHER), students
    )


def task_loss(*runs: Finished) -> Any:
    """The student's own loss, of an entry of the log: all that mmengine sums but for what distillers and peers add."""
    beside: set[str] = set()
    for run in runs:
        model = run.read().model
        beside |= set(model.get('distillers') or ())
        beside |= {option.rpartition('.')[2] for option, _ in described_sources(run.read())}

    def total(entry: Mapping[str, float]) -> float:
        return sum(
            value
            for key, value in entry.items()
            if 'loss' in key and key != 'loss' and key.partition('.')[0] not in beside
        )

    return total


def _text(value: float | None, digits: int, sign: str = '') -> str:
    if value is None or not math.isfinite(value):
        return ''
    return format(round(value, digits) + 0.0, f'{sign}.{digits}f')  # no -0


def _results(runs: Mapping[str, Finished], name: str, score: Score) -> list[dict[str, str]]:
    """A row for each metric that was logged, the score first: the models', the gain, the share of the gap."""
    scores = {each: run.scores() for each, run in runs.items()}
    keys = sorted(scores[name], key=lambda key: key != score.key)
    short = [named(key).name for key in keys]
    titles = {key: name if short.count(name) == 1 else key for key, name in zip(keys, short)}
    rows = []
    for key in keys:
        values = {each: found.get(key) for each, found in scores.items()}
        known = [value for value in values.values() if value is not None]
        none = min(known) < 0  # COCO's -1: no object of this size
        digits = 3 if max(map(abs, known)) <= 1 else 2
        row = {'metric': titles[key]}
        for each, value in values.items():
            row[each] = 'none' if value is not None and none else _text(value, digits)
        own, base, top = values[name], values.get(ALONE), values.get(TEACHER)
        if ALONE in runs:
            row['gain'] = '' if none or None in (own, base) else _text(own - base, digits, '+')
        if ALONE in runs and TEACHER in runs:
            possible = not none and None not in (own, base, top) and top > base  # else there is no gap
            row['gap closed'] = f'{100 * (own - base) / (top - base):.0f} %' if possible else ''
        rows.append(row)
    return rows


def _results_note(runs: Mapping[str, Finished], name: str) -> str:
    parts = [f'Of the last evaluation: {", ".join(_when(each) for each in runs.values())}.']
    if ALONE in runs and TEACHER in runs:
        parts.append(f'"Gap closed" is ({name} - alone) / (teacher - alone); empty where the teacher is not ahead.')
    missing = [option for option, each in (('--alone', ALONE), ('--teacher', TEACHER)) if each not in runs]
    if missing:
        parts.append(f'Not given: {" and ".join(missing)}.')
    return ' '.join(parts)


def _when(run: Finished) -> str:
    if isinstance(run, Given):
        return f'{run.name} evaluated here'
    return f'{run.name} after {"epoch" if run.unit == "epoch" else "iteration"} {run.length}'


def _summary(run: Finished, runs: Mapping[str, Finished]) -> str:
    config = run.read()
    _, dataset = next(datasets(config.val_dataloader.dataset, 'val_dataloader.dataset'))
    data = annotation_path(dataset) if dataset.get('ann_file') else dataset.get('data_root') or ''
    said = f'{_kind(config)}, trained for {_length(run)}'
    if run.distills:
        methods = ', '.join(type_name(each) for each in config.model.distillers.values())
        said += f', distilled with {methods}'
    return f'{said}. Validation data: {type_name(dataset)} {data}.'


def _length(run: Finished) -> str:
    losses = run.losses()
    return f'{losses[-1]["step"]} iterations' if losses else f'{run.length} {run.unit}s'


def _series(runs: Mapping[str, Finished], name: str, score: Score) -> list[dict[str, str]]:
    """First and last values in the logs: of the score, of the student's own losses, of each distillation loss."""
    rows = []

    def add(title: str, entries: Sequence[Mapping], value: Any, digits: int | None = None) -> None:
        found = [(entry['step'], value(entry)) for entry in entries]
        if found:
            (first, begin), (last, end) = found[0], found[-1]
            largest = max(abs(begin), abs(end))
            shown = digits or (2 if largest > 10 else 3 if largest > 0.1 else 5)
            rows.append(
                {
                    'curve': title,
                    'first': _text(begin, shown),
                    'at': str(first),
                    'last': _text(end, shown),
                    'at ': str(last),
                }
            )

    students = {each: run for each, run in runs.items() if each != TEACHER}
    own = task_loss(*students.values())
    for each, run in students.items():
        add(
            f'{score.name} of {each}',
            [e for e in run.evaluations() if score.key in e],
            lambda entry: entry[score.key],
            score.digits,
        )
    for each, run in students.items():
        add(f'task loss of {each}', run.losses(), own)
    for key in distillation_losses(runs[name]):
        add(key, [e for e in runs[name].losses() if key in e], lambda entry, key=key: entry[key])
    return rows


def _times(runs: Mapping[str, Finished]) -> list[dict[str, str]]:
    """What each training took, as far as it was logged."""
    rows = []
    for name, run in runs.items():
        if not run.losses():
            continue
        steps, seconds, memory = run.losses()[-1]['step'], run.seconds(), run.memory()
        minutes = f'{seconds / 3600:.1f} h' if seconds >= 3600 else f'{seconds / 60:.1f} min'
        rows.append(
            {
                'training of': name,
                'iterations': str(steps),
                'time, without evaluations': minutes if seconds else 'not logged',
                'per iteration': f'{seconds / steps:.3f} s' if seconds else '',
                'GPU memory': f'{memory} MiB' if memory else 'not logged',
            }
        )
    return rows


def _by_class(seen: Any, runs: Mapping[str, Finished], name: str) -> tuple[list[dict[str, str]], str]:
    """A row for each class, sorted by the difference to the student alone, else to the teacher, else by value."""
    scores, digits = seen.by_class(), 3 if seen.share == 1 else 1
    base = next((each for each in (ALONE, TEACHER) if each in runs), None)
    sort_by = scores[name] - scores[base] if base else scores[name]
    order = sorted(range(len(seen.classes)), key=lambda index: -np.nan_to_num(sort_by[index], nan=-np.inf))
    amounts = seen.amounts()

    def row(title: str, amount: str, values: Mapping[str, float], gain: float) -> dict[str, str]:
        made = {'class': title} | ({'gain': _text(gain, digits, '+') or '-'} if base else {})
        return made | {each: _text(values[each], digits) or '-' for each in runs} | {seen.amount: amount}

    rows = [row(seen.classes[i], amounts[i], {each: scores[each][i] for each in runs}, sort_by[i]) for i in order]
    means = {each: _mean(scores[each]) for each in runs}
    rows.append(row('mean', '', means, means[name] - means[base] if base else 0))
    percent = ' in percent' if seen.share == 100 else ''
    note = f'{seen.measure}{percent}, from the predictions for all validation images; "-": none there.'
    if base:
        note += f' Gain: {name} minus {base}.'
    for each, run in runs.items():
        if not run.of_last_evaluation:
            note += f' Those of {each} are of {run.checkpoint.name}, whose last evaluation is another.'
    return rows, note


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _pictures(seen: Any, runs: Mapping[str, Finished], name: str, count: int) -> Iterator[tuple]:
    """Sections of pictures: heading, note, colors of classes, and a row for each image."""
    scores, digits = seen.by_image(), 2 if seen.share == 1 else 1
    base = next((each for each in (ALONE, TEACHER) if each in runs), None)
    differences = scores[name] - scores[base] if base else scores[name]
    known = [int(index) for index in np.argsort(-differences, kind='stable') if np.isfinite(differences[index])]
    if base:
        better = [index for index in known if differences[index] > 0]
        worse = [index for index in reversed(known) if differences[index] < 0]
        sections = [
            (f'Images on which {name} gains most over {base}', better[:count]),
            (f'Images on which {name} loses most to {base}', worse[:count]),
        ]
        tally = f'of {len(known)} images {len(better)} are better than with {base}, {len(worse)} worse'
    else:
        last = known[::-1][: min(count, max(0, len(known) - count))]
        sections = [('Best images', known[:count]), ('Worst images', last)]
        tally = f'{len(known)} images'
    for heading, chosen in sections:
        rows = []
        for index in chosen:
            said = ', '.join(f'{each} {_text(scores[each][index], digits)}' for each in runs)
            panels = seen.panels(index)
            titles = [*runs, *(f'{each}: wrong' for each in runs)]
            titles = [*(title for title in panels if title not in titles), *(each for each in titles if each in panels)]
            shown = {title: panels[title] for title in titles}
            rows.append({'title': f'{seen.title(index)}: {said}', 'panels': shown})
        there = sorted({label for index in chosen for label in seen.classes_in(index)})
        legend = [('#{:02x}{:02x}{:02x}'.format(*map(int, seen.colors[each])), seen.classes[each]) for each in there]
        note = f'Ranked by {seen.by_image_is}; {tally}. {seen.note}' if rows else f'None; {tally}.'
        yield heading, note, legend, rows


def _distillation(config: Config) -> list[dict[str, str]]:
    """What a config distills: a row for each teacher or other source, and for each distiller."""
    rows = []
    for option, source in described_sources(config):
        given = {'config': source} if isinstance(source, str) else dict(source)
        kind = type_name({'type': 'Teacher', **given})
        options = {key: _short(value) for key, value in given.items() if key != 'type'}
        rows.append(
            {'option': option, 'type': kind, 'options': ', '.join(f'{key}={value}' for key, value in options.items())}
        )
    for name, method in (config.model.get('distillers') or {}).items():
        options = ', '.join(f'{key}={_short(value)}' for key, value in method.items() if key != 'type')
        rows.append(
            {'option': f'model.distillers.{name}', 'type': type_name(method), 'options': options or 'its defaults'}
        )
    return rows


def _short(value: object) -> str:
    """A value of a config; of a whole model its class."""
    if isinstance(value, Mapping):
        whole = value.get('model', value)
        if isinstance(whole, Mapping) and 'backbone' in whole:
            return type_name(whole)
        return f'dict({", ".join(f"{key}={_short(each)}" for key, each in value.items())})'
    return str(value)


def config_difference(alone: Config, run: Config) -> list[str]:
    """What differs between two configs, as lines ``- option = value`` and ``+ option = value``.

    A distilled model's student is compared with the plain model; of a teacher's model the class alone is named.
    """
    before, after = (list(_lines(config)) for config in (alone, run))
    marked = difflib.unified_diff(before, after, lineterm='', n=0)
    return [f'{line[0]} {line[1:]}' for line in marked if not line.startswith(('---', '+++', '@@'))]


def _lines(config: Config) -> Iterator[str]:
    parts: dict[str, Any] = {key: config[key] for key in config if key in STOCK and key not in NOT_COMPARED}
    distilled = (
        {f'model.{key}': value for key, value in config.model.items() if key != 'student'}
        if 'student' in config.model
        else {}
    )
    parts['model'] = plain_model(config)
    distilled.pop('model.type', None)
    for key in sorted(parts):
        yield from _flat(key, parts[key])
        if key == 'model':
            for name, value in distilled.items():
                yield from _flat(name, value)


def _flat(key: str, value: Any) -> Iterator[str]:
    if key.startswith('model.teacher') and isinstance(value, Mapping) and 'backbone' in value.get('model', value):
        yield f'{key} = {_short(value)}'
    elif isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(f'{key}.{name}', each)
    elif isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
        for index, each in enumerate(value):
            yield from _flat(f'{key}.{index}', each)
    else:
        yield f'{key} = {value!r}'


def _versions(run: Finished) -> list[dict[str, str]]:
    """What the log says it was trained with, and what is here now."""
    logs = sorted(run.folder.glob('*/*.log'))
    said = logs[-1].read_text(errors='replace')[:20000] if logs else ''
    names = {'torch': 'PyTorch', 'mmengine': 'MMEngine', 'Python': 'Python', 'mmcv': 'MMCV', 'mmdet': 'MMDetection'}
    here = {each: _installed(each) for each in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation')}
    here |= {'mmkd': mmkd.__version__}
    rows = []
    for name, found in here.items():
        logged = re.search(rf'^\s*{names.get(name, name)}: *(\S+)', said, re.MULTILINE)
        if found or logged:
            rows.append(
                {'package': name, "the training's log": logged[1] if logged else '-', 'this report': found or '-'}
            )
    return rows


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ''

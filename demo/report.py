"""The demo's table and its report, one self-contained HTML file."""

import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from mmcv.ops import nms
from mmcv.transforms import Compose
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS
from mmdet.structures.bbox import get_box_tensor
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from pages import embed, render
from rich.console import Console
from rich.table import Table
from runs import Run

from mmkd.taps import Taps, run
from mmkd.teacher import load_weights
from mmkd.testing.shapes import CLASSES

matplotlib.use('Agg')
METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
    'AP small': 'coco/bbox_mAP_s',
    'AP medium': 'coco/bbox_mAP_m',
    'AP large': 'coco/bbox_mAP_l',
}
COLOURS = {'teacher': '#444444', 'student alone': '#c0392b', 'CWD': '#2471a3', 'GID': '#1e8449'}
OF_CLASS = ['#e6194b', '#3cb44b', '#ffe119', '#4363d8', '#f58231', '#f032e6']
PICTURES = 6


def rows(teacher: Run, students: dict[str, list[Run]]) -> list[dict[str, str]]:
    """The table: one row per model, its metrics as mean and, of several seeds, standard deviation."""

    def values(runs: list[Run], metric: str) -> list[float]:
        return [each.evaluations()[-1][metric] for each in runs]

    ap_teacher = values([teacher], METRICS['AP'])[0]
    alone = values(students['student alone'], METRICS['AP'])
    table = []
    for name, runs in {'teacher': [teacher], **students}.items():
        row = {'model': name}
        for title, metric in METRICS.items():
            found = values(runs, metric)
            if min(found) < 0:
                row[title] = 'none'  # COCO's -1: no object of this size
            elif len(found) > 1:
                row[title] = f'{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}'
            else:
                row[title] = f'{found[0]:.3f}'
        row['parameters'] = f'{runs[0].parameters() / 1e3:.0f} k'
        aps = values(runs, METRICS['AP'])
        if name in ('teacher', 'student alone'):
            row['gap closed'] = ''
        else:
            closed = [(ap - base) / (ap_teacher - base) for ap, base in zip(aps, alone)]
            row['gap closed'] = f'{100 * statistics.mean(closed):.0f} %'
        if len(alone) > 1:
            row['AP by seed'] = ' '.join(f'{ap:.3f}' for ap in aps)
        table.append(row)
    return table


def print_table(teacher: Run, students: dict[str, list[Run]]) -> None:
    content = rows(teacher, students)
    table = Table(title='shapes, 200 validation images')
    for column in content[0]:
        table.add_column(column, justify='left' if column == 'model' else 'right', no_wrap=True)
    for row in content:
        table.add_row(*row.values())
    Console(width=180).print(table)


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    padded = np.pad(values, (width // 2, width // 2), mode='edge')
    return np.convolve(padded, np.ones(width) / width, 'valid')


def curves(teacher: Run, students: dict[str, list[Run]]) -> str:
    """AP, task loss, and each distillation loss over the iterations, first seed."""
    first = {name: runs[0] for name, runs in students.items()}
    distilled = {name: each for name, each in first.items() if name != 'student alone'}
    figure, axes = plt.subplots(1, 2 + len(distilled), figsize=(4.2 * (2 + len(distilled)), 3.4))
    for name, each in first.items():
        entries = each.evaluations()
        axes[0].plot(
            [e['step'] for e in entries], [e['coco/bbox_mAP'] for e in entries], 'o-', color=COLOURS[name], label=name
        )
        entries = each.losses()
        task = [e['loss_cls'] + e['loss_bbox'] for e in entries]
        axes[1].plot([e['step'] for e in entries], smooth(task), color=COLOURS[name], label=name)
    axes[0].axhline(
        teacher.evaluations()[-1]['coco/bbox_mAP'], color=COLOURS['teacher'], ls='--', label='teacher, at its end'
    )
    axes[0].set(title='AP on the validation images', ylim=(0, None))
    axes[1].set(title='task loss (classification + box)')
    axes[0].legend(fontsize=7, loc='lower right')
    axes[1].legend(fontsize=8)
    for axis, (name, each) in zip(axes[2:], distilled.items()):
        entries = each.losses()
        for key in (key for key in entries[0] if '.loss' in key):
            axis.plot([e['step'] for e in entries], smooth([e[key] for e in entries]), label=key)
        axis.set(title=f'distillation losses of {name}', yscale='log')
        axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return embed(figure)


def plain_model(of: Run) -> torch.nn.Module:
    """The detector that a run trained, as plain mmdet builds it."""
    config = of.read()
    config.model = config.model.get('student', config.model)
    model = MODELS.build(config.model)
    load_weights(model, str(of.checkpoint), 'checkpoint')
    model.cfg = config
    return model.eval()


def readable(instances: InstanceData) -> InstanceData:
    """Boxes with a score above 0.3, of those that overlap by more than 0.6 the best alone, whatever their classes."""
    instances = instances[instances.scores > 0.3]
    _, kept = nms(instances.bboxes, instances.scores, 0.6)
    return instances[kept]


def show(axis: plt.Axes, image: np.ndarray, instances: InstanceData, labels: bool = True) -> None:
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    for index, (left, top, right, bottom) in enumerate(get_box_tensor(instances.bboxes).tolist()):
        label = int(instances.labels[index]) if labels else None
        colour = OF_CLASS[label] if labels else 'white'
        axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.4))
        text = CLASSES[label] if labels else ''
        if 'scores' in instances:
            text = f'{text} {float(instances.scores[index]):.2f}'.strip()
        box = dict(facecolor=colour if labels else 'black', alpha=0.75, pad=0.5, lw=0)
        axis.text(left, max(top, 6), text, color='white', fontsize=5.5, va='bottom', bbox=box, clip_on=True)


@torch.no_grad()
def selected_instances(of: Run, samples: list[dict]) -> list[InstanceData]:
    """What GID selects in each image, with the student as it is after training."""
    model = MODELS.build(of.read().model).eval()
    weights = torch.load(of.checkpoint, map_location='cpu', weights_only=True)['state_dict']
    model.load_state_dict(weights)
    model._teacher.load()
    gid = model.distillers['gid']
    selected = []
    for sample in samples:
        batch = model.data_preprocessor({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]})
        teacher = model._teacher(batch['inputs'], batch['data_samples'])
        with Taps(model, gid.student_layers) as student:
            run(model, gid.student_layers, batch['inputs'], batch['data_samples'])
        boxes, scores, valid = gid.select(student, teacher, [batch['data_samples'][0].metainfo])
        selected.append(InstanceData(bboxes=boxes[valid], scores=scores[valid]))
    return selected


def pictures(teacher: Run, students: dict[str, list[Run]]) -> str:
    """Ground truth, every model's predictions, and the instances that GID selects, for some validation images."""
    init_default_scope('mmdet')
    config = teacher.read().val_dataloader
    pipeline = Compose([step for step in config.dataset.pipeline if step.type != 'LoadAnnotations'])
    dataset = DATASETS.build(config.dataset)
    # those with the most objects among the first fifty, so that there is something to see
    chosen = sorted(sorted(range(50), key=lambda i: -len(dataset.get_data_info(i)['instances']))[:PICTURES])
    samples = [dataset[i] for i in chosen]
    files = [sample['data_samples'].img_path for sample in samples]
    models = {'teacher': teacher, **{name: runs[0] for name, runs in students.items()}}
    columns: dict[str, list[InstanceData]] = {
        'ground truth': [sample['data_samples'].gt_instances for sample in samples]
    }
    for name, each in models.items():
        results = inference_detector(plain_model(each), files, test_pipeline=pipeline)
        columns[name] = [readable(result.pred_instances) for result in results]
    columns['selected by GID'] = selected_instances(students['GID'][0], samples)

    figure, axes = plt.subplots(len(files), len(columns), figsize=(2.3 * len(columns), 2.3 * len(files)), squeeze=False)
    for row, sample in zip(axes, range(len(files))):
        image = samples[sample]['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        for axis, (name, instances) in zip(row, columns.items()):
            show(axis, image, instances[sample], labels=name != 'selected by GID')
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=10)
    figure.subplots_adjust(wspace=0.03, hspace=0.03)
    return embed(figure, 'png')


def write_report(teacher: Run, students: dict[str, list[Run]], path: Path) -> Path:
    """Write the report; its path."""
    page = render(
        Path(__file__).with_name('report.html'),
        rows=rows(teacher, students),
        seeds=len(students['student alone']),
        iterations={'teacher': teacher.iterations, 'student': students['student alone'][0].iterations},
        curves=curves(teacher, students),
        pictures=pictures(teacher, students),
    )
    path.write_text(page)
    return path

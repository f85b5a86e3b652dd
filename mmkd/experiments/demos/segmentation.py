"""The pictures of the segmentation demo: label maps of every model, and where the students are wrong; IoU by class."""

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS

from mmkd.data.streets import CLASSES, IGNORED
from mmkd.experiments.demos import Demo
from mmkd.experiments.label_maps import as_rgb, class_areas, class_ious
from mmkd.experiments.pages import embed
from mmkd.experiments.pictures import colored, mistakes
from mmkd.experiments.report import Report
from mmkd.experiments.runs import Run, trained_model
from mmkd.experiments.suites import SUITES

PALETTE = np.array(CityscapesDataset.METAINFO['palette'], np.uint8)
PICTURES = 6


class Validation:
    """The validation images with their labels, and the label maps that each model predicts for them."""

    def __init__(self, teacher: Run, students: dict[str, list[Run]]):
        init_default_scope('mmseg')
        dataset = DATASETS.build(teacher.read().val_dataloader.dataset)
        samples = [dataset[index] for index in range(len(dataset))]
        self.images = [as_rgb(sample['inputs']) for sample in samples]
        self.labels = [sample['data_samples'].gt_sem_seg.data[0] for sample in samples]
        models = {'teacher': teacher, **{name: runs[0] for name, runs in students.items()}}
        self.predicted = {name: predict(each, samples) for name, each in models.items()}

    def class_table(self) -> list[dict[str, str]]:
        """IoU in percent: a row per class, a column per model."""
        columns = {name: self._ious(maps) for name, maps in self.predicted.items()}
        rows = [
            {'class': kind} | {name: f'{ious[index]:.1f}' for name, ious in columns.items()}
            for index, kind in enumerate(CLASSES)
        ]
        return [*rows, {'class': 'mean'} | {name: f'{np.nanmean(ious):.1f}' for name, ious in columns.items()}]

    def _ious(self, maps: list[torch.Tensor]) -> np.ndarray:
        areas = [class_areas(found, labels, len(CLASSES), IGNORED) for found, labels in zip(maps, self.labels)]
        return 100 * class_ious(np.sum(areas, 0))

    def pictures(self) -> str:
        """Image, ground truth, and for each model its label map; for students also where it is wrong."""
        # those with the most classes, so that there is something to see
        order = sorted(range(len(self.labels)), key=lambda index: -len(self.labels[index].unique()))
        chosen = sorted(order[:PICTURES])
        columns = 2 + sum(1 if name == 'teacher' else 2 for name in self.predicted)
        figure = Figure(figsize=(2.2 * columns, 1.16 * PICTURES))
        axes = figure.subplots(PICTURES, columns, squeeze=False)
        for row, index in zip(axes, chosen):
            image, labels = self.images[index], self.labels[index].numpy()
            shown = {'image': image, 'ground truth': colored(labels, PALETTE, IGNORED)}
            for name, maps in self.predicted.items():
                found = maps[index].numpy()
                shown[name] = colored(np.where(labels == IGNORED, IGNORED, found), PALETTE, IGNORED)
                if name != 'teacher':
                    shown[f'{name}: wrong'] = mistakes(image, labels, found, IGNORED)
            for axis, (title, picture) in zip(row, shown.items()):
                axis.imshow(picture)
                axis.set(xticks=[], yticks=[])
                if index == chosen[0]:
                    axis.set_title(title, fontsize=10)
        figure.subplots_adjust(wspace=0.03, hspace=0.03)
        return embed(figure, 'png')


@torch.no_grad()
def predict(of: Run, samples: list[dict]) -> list[torch.Tensor]:
    """The label map of each sample, (H, W)."""
    model = trained_model(of)
    return [model.test_step(pseudo_collate([sample]))[0].pred_sem_seg.data[0] for sample in samples]


def show(teacher: Run, students: dict[str, list[Run]]) -> tuple[str, dict[str, list[dict[str, str]]]]:
    validation = Validation(teacher, students)
    return validation.pictures(), {'IoU of each class, in percent': validation.class_table()}


DEMO = Demo(
    suite=SUITES['streets'],
    teacher='pspnet_teacher',
    students={'student alone': 'pspnet_student', 'CWD': 'cwd_pspnet', 'SKD': 'skd_pspnet'},
    report=Report(
        title='A small PSPNet learns from a larger one',
        data='Generated data set "streets" in Cityscapes\' layout: 600 training and 100 validation images of 256 x 128 '
        'pixels.',
        training='all from random weights, with the same data order for each seed',
        score=SUITES['streets'].score,
        metrics={'mIoU': 'mIoU', 'mean accuracy': 'mAcc', 'pixel accuracy': 'aAcc'},
        task_loss=lambda entry: entry['decode.loss_ce'],
        metric_note='In percent.',
        picture_note='For each student also where it is wrong (red); ignored pixels are black. Where there are several '
        'seeds: the first.',
    ),
    show=show,
)

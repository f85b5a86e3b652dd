"""What detectors make of a validation set: AP by class and by image, and pictures of their boxes."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmcv.ops import nms
from mmdet.evaluation.functional import average_precision
from mmdet.registry import DATASETS
from mmdet.structures.bbox import get_box_tensor
from mmengine.dataset import pseudo_collate
from mmengine.fileio import get
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from mmkd.experiments.pictures import draw_boxes, jpeg, palette
from mmkd.experiments.runs import Run, fastest, trained_model

DRAWN = 0.3  # boxes with a lower score are not


def readable(instances: InstanceData) -> InstanceData:
    """Boxes with a score above 0.3, of those that overlap by more than 0.6 the best alone, whatever their classes."""
    instances = instances[instances.scores > DRAWN]
    _, kept = nms(instances.bboxes, instances.scores, 0.6)
    return instances[kept]


class Boxes:
    """The boxes that several models find in the validation images, each model with the pipeline of its own config.

    Args:
        runs: What each is called, and its run; the first one's data set has the ground truth and the classes.
        evaluators: mmengine's, by model: they are given its predictions, too.
    """

    measure, share = 'AP', 1.0
    amount = 'objects'
    by_image_is = 'AP at IoU 0.5 of the image alone, all classes taken together'
    note = f'Boxes with a score above {DRAWN}; of boxes that overlap by more than 0.6 the best alone is drawn.'

    def __init__(self, runs: Mapping[str, Run], evaluators: Mapping = {}):
        self.runs = runs
        datasets = {name: DATASETS.build(run.read().val_dataloader.dataset) for name, run in runs.items()}
        self.dataset = next(iter(datasets.values()))
        self.meta = dict(self.dataset.metainfo)
        self.classes = list(self.meta['classes'])
        self.colors = palette(len(self.classes), self.meta.get('palette'))
        for each in evaluators.values():
            each.dataset_meta = self.meta
        self.truth = [self.dataset.get_data_info(index) for index in range(len(self.dataset))]
        self.found: dict[str, list[InstanceData]] = {}
        for name, run in runs.items():
            model = trained_model(run, fastest())
            self.found[name] = []
            for index in tqdm(range(len(self.dataset)), desc=f'boxes of {name}', unit='image', mininterval=1):
                sample = datasets[name][index]
                with torch.no_grad():
                    result = model.test_step(pseudo_collate([sample]))[0]
                found = result.pred_instances.cpu()  # without masks, which would be many
                kept = dict(bboxes=get_box_tensor(found.bboxes), scores=found.scores, labels=found.labels)
                self.found[name].append(InstanceData(**kept))
                if name in evaluators:
                    evaluators[name].process([result], sample)
        self._evaluated = {name: self._evaluate(each) for name, each in self.found.items()}

    def _evaluate(self, found: list[InstanceData]) -> COCOeval:
        """COCO's evaluation of boxes; images and classes are numbered as in the data set, which may be of any format."""
        truth = COCO()
        images, objects, boxes = [], [], []
        for image, info in enumerate(self.truth):
            images.append(dict(id=image, height=info.get('height', 0), width=info.get('width', 0)))
            for each in info['instances']:
                left, top, right, bottom = each['bbox']
                box = [left, top, right - left, bottom - top]
                objects.append(
                    dict(
                        id=len(objects) + 1,
                        image_id=image,
                        category_id=each['bbox_label'],
                        bbox=box,
                        area=box[2] * box[3],
                        iscrowd=int(bool(each.get('ignore_flag'))),
                    )
                )
            ends = found[image].bboxes.clone()
            ends[:, 2:] -= ends[:, :2]
            for box, score, label in zip(ends.tolist(), found[image].scores.tolist(), found[image].labels.tolist()):
                boxes.append(dict(image_id=image, category_id=label, bbox=box, score=score))
        kinds = [dict(id=index, name=name) for index, name in enumerate(self.classes)]
        truth.dataset = dict(images=images, annotations=objects, categories=kinds)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            truth.createIndex()
            predicted = truth.loadRes(boxes) if boxes else COCO()
            if not boxes:
                predicted.dataset = dict(truth.dataset, annotations=[])
                predicted.createIndex()
            evaluated = COCOeval(truth, predicted, 'bbox')
            evaluated.evaluate()
            evaluated.accumulate()
        return evaluated

    def amounts(self) -> list[str]:
        """How many objects of each class there are."""
        labels = [each['bbox_label'] for info in self.truth for each in info['instances']]
        return [str(labels.count(index)) for index in range(len(self.classes))]

    def by_class(self) -> dict[str, np.ndarray]:
        """COCO's AP of each class, the mean over IoU 0.5 to 0.95; NaN where there is no object of it."""
        scores = {}
        for name, each in self._evaluated.items():
            precision = each.eval['precision'][:, :, :, 0, -1]  # of all areas, with 100 detections
            scores[name] = np.where(precision[0, 0] < 0, np.nan, precision.mean((0, 1)))
        return scores

    def by_image(self) -> dict[str, np.ndarray]:
        """Of each image :attr:`by_image_is`; NaN where there is no object."""
        return {name: self._image_scores(each) for name, each in self._evaluated.items()}

    def _image_scores(self, evaluated: COCOeval) -> np.ndarray:
        count, kinds = len(self.truth), len(self.classes)
        of_all_areas = np.array(evaluated.evalImgs, object).reshape(kinds, -1, count)[:, 0]
        scores = np.full(count, np.nan)
        for image in range(count):
            matched = [each for each in of_all_areas[:, image] if each]
            objects = sum(int((1 - each['gtIgnore']).sum()) for each in matched)
            if not objects:
                continue
            counted = [~each['dtIgnore'][0].astype(bool) for each in matched]  # IoU 0.5 is the first
            order = np.argsort(
                -np.concatenate([np.array(e['dtScores'])[kept] for e, kept in zip(matched, counted)]), kind='stable'
            )
            hits = np.concatenate([e['dtMatches'][0][kept] > 0 for e, kept in zip(matched, counted)])[order].cumsum()
            ranks = np.arange(1, len(hits) + 1)
            scores[image] = average_precision(hits / objects, hits / ranks) if len(hits) else 0.0
        return scores

    def title(self, index: int) -> str:
        """The name of an image's file."""
        return Path(self.truth[index]['img_path']).name

    def panels(self, index: int) -> dict[str, str]:
        """Pictures of an image, as data URLs by title."""
        info = self.truth[index]
        image = np.array(Image.open(io.BytesIO(get(info['img_path']))).convert('RGB'))
        kept = [each for each in info['instances'] if not each.get('ignore_flag')]
        boxes = torch.tensor([each['bbox'] for each in kept]).reshape(-1, 4)
        labels = [each['bbox_label'] for each in kept]
        pictures = {'ground truth': self._drawn(image, boxes, labels, [self.classes[each] for each in labels])}
        for name, found in self.found.items():
            shown = readable(found[index])
            labels = shown.labels.tolist()
            texts = [f'{self.classes[label]} {score:.2f}' for label, score in zip(labels, shown.scores.tolist())]
            pictures[name] = self._drawn(image, shown.bboxes, labels, texts)
        return pictures

    def _drawn(self, image: np.ndarray, boxes: torch.Tensor, labels: list[int], texts: list[str]) -> str:
        height, width = image.shape[:2]
        figure = Figure(figsize=(4.8, 4.8 * height / width), dpi=100)
        axis = figure.add_axes((0, 0, 1, 1))
        draw_boxes(axis, image, boxes, texts, [self.colors[label] for label in labels], size=8)
        axis.set(xlim=(0, width), ylim=(height, 0))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return jpeg(np.asarray(canvas.buffer_rgba())[..., :3])

    def classes_in(self, index: int) -> list[int]:
        """No legend: each box has its class's name."""
        return []

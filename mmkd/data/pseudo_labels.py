"""What a trained model predicts for images without labels, written as labels: data distillation.

Radosavovic et al., "Data Distillation: Towards Omni-Supervised Learning", CVPR 2018, arXiv 1712.04440.
"""

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

from mmkd.checks.data import part_datasets
from mmkd.data.images import Images
from mmkd.errors import ConfigError
from mmkd.hosts.configs import build_model, plain_model
from mmkd.hosts.datasets import class_names, dataset_class, type_name
from mmkd.hosts.segmentation.heads import decode_head, surest
from mmkd.weights import dataset_meta, fetch, load_weights, read_file

SCALES = (0.75, 1.0, 1.25)
IGNORED = 255


class PseudoLabels:
    """A model, the images that it labels, and what was labelled before.

    A detector's boxes are written as a COCO file, with the score of each; a segmentor's label maps as PNG files, in which
    pixels below the threshold are ignored, 255. What was begun with the same options goes on.

    Args:
        config: A config whose model it is, plain or distilled.
        checkpoint: Its weights.
        images: The folder of images.
        out: The file, ``*.json``, or folder that is written.
        score: The least probability of a box, or of a pixel's class. Default 0.5.
        augment: Whether predictions for several scales, and mirrored images, are merged: by the config's own ``tta_model`` and
            ``tta_pipeline``, or else for 0.75, 1 and 1.25 of its size.

    Raises:
        ConfigError: if there is something already, no image, or no classes are known.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: str,
        images: str | Path,
        out: str | Path,
        score: float = 0.5,
        augment: bool = False,
    ):
        if not 0 <= score < 1:
            raise ConfigError(f'--score {score}: expected a probability of at least 0 and below 1')
        init_default_scope(config.get('default_scope', 'mmengine'))
        self.out, self.score = Path(out), score
        self.model = build_model(plain_model(config), config.get('default_scope'))
        load_weights(self.model, checkpoint, 'checkpoint')
        self.detects = not hasattr(self.model, 'decode_head')
        if self.detects != (self.out.suffix == '.json'):
            what = (
                'a detector writes a COCO file, such as labels.json' if self.detects else 'a segmentor writes a folder'
            )
            raise ConfigError(f'OUT {out}: {what}')
        self.classes = dataset_meta(read_file(fetch(checkpoint, 'checkpoint'), 'checkpoint')).get(
            'classes'
        ) or _classes(config)
        if not self.detects and not hasattr(decode_head(self.model), 'conv_seg'):
            kind = type(decode_head(self.model)).__name__
            raise ConfigError(
                f'{kind}: how sure it is of a pixel is not known; a head that classifies by conv_seg is needed'
            )
        # such data sets read 0 as ignored, and 1 as the first class
        self.threshold = 0.5 if self.detects else getattr(decode_head(self.model), 'threshold', None) or 0.5
        self.first = int(not self.detects and _reduces_zero_label(config))
        if self.detects and self.classes is None:
            raise ConfigError(
                'the names of the classes are not known: the config has no test data, and the checkpoint none'
            )
        pipeline, tta = _pipeline(config, self.detects, augment)
        self.images = Images(dict(img_path=str(images)), pipeline=pipeline)
        self.root = Path(images)
        self._names = [self._name(self.images.get_data_info(index)['img_path']) for index in range(len(self.images))]
        if len(set(self._names)) < len(self._names):
            twice = next(name for name in self._names if self._names.count(name) > 1)
            raise ConfigError(f'{images}: two images would have the label map {twice}.png; give them other names')
        self.model = self.model.to(get_device()).eval()
        if tta is not None:
            self.model = _augmented(self.model, tta)
        self.record = dict(
            checkpoint=str(checkpoint),
            images=str(Path(images).absolute()),
            augment=augment,
            score=None if self.detects else score,
        )

    @property
    def kept(self) -> Path:
        """Where a detector's predictions are until all are there, a line for each image."""
        return self.out.with_suffix('.partial')

    def begin(self) -> set[str]:
        """Begin, or go on: the images that were labelled before.

        Raises:
            ConfigError: if there is something else already.
        """
        note = self.kept if self.detects else self.out / 'pseudo_labels.json'
        if not note.is_file():
            if self.out.exists() and (self.detects or any(self.out.iterdir())):
                raise ConfigError(f'OUT {self.out}: is there already; name another, or remove it')
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(self.record) + '\n')
            return set()
        lines = note.read_text().splitlines()
        if json.loads(lines[0]) != self.record:
            raise ConfigError(
                f'{note}: begun with other options, {lines[0]}; name another OUT, or remove what is there'
            )
        if self.detects:
            complete = [line for line in lines[1:] if line.endswith('}')]  # the last may be torn
            note.write_text('\n'.join([lines[0], *complete]) + '\n')
            return {json.loads(line)['file_name'] for line in complete}
        return {str(path.relative_to(self.out).with_suffix('')) for path in self.out.rglob('*.png')}

    def __call__(self, batch: int = 1, workers: int = 2) -> None:
        """Label what is not labelled yet."""
        done = self.begin()
        left = [index for index, name in enumerate(self._names) if name not in done]
        loader = Runner.build_dataloader(
            dict(
                batch_size=batch,
                num_workers=min(workers, len(left)),
                dataset=Subset(self.images, left),
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='pseudo_collate'),
            )
        )
        with tqdm(total=len(self.images), initial=len(done), unit='image') as bar, torch.no_grad():
            for data in loader if left else ():
                for sample in self.model.test_step(data):
                    self._keep(sample)
                    bar.update()

    def _name(self, path: str) -> str:
        name = Path(path).relative_to(self.root)
        return str(name) if self.detects else str(name.with_suffix(''))

    def _keep(self, sample: Any) -> None:
        name = self._name(sample.img_path)
        if self.detects:
            found = sample.pred_instances.cpu()
            height, width = sample.ori_shape[:2]
            line = dict(
                file_name=name,
                height=height,
                width=width,
                boxes=[[round(value, 2) for value in box] for box in found.bboxes.tolist()],
                scores=[round(value, 6) for value in found.scores.tolist()],
                labels=found.labels.tolist(),
            )
            with self.kept.open('a') as file:
                file.write(json.dumps(line) + '\n')
            return
        probability, labels = surest(sample.seg_logits.data.float(), self.threshold)
        labels = (labels + self.first).masked_fill(probability < self.score, IGNORED).cpu().numpy().astype(np.uint8)
        path = self.out / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.with_suffix('.torn')
        Image.fromarray(labels).save(torn, format='png')
        os.replace(torn, path)

    def lines(self) -> Iterator[dict]:
        """A detector's predictions, image by image."""
        for line in self.kept.read_text().splitlines()[1:]:
            yield json.loads(line)

    def write(self, per_image: float | None = None) -> dict[str, float]:
        """Write the COCO file of a detector, once all images are labelled.

        Args:
            per_image: How many boxes to keep for each image, on average, in place of ``score``.

        Returns:
            The threshold, and how many images and boxes there are.
        """
        lines = list(self.lines())
        score = self.score if per_image is None else threshold_like([line['scores'] for line in lines], per_image)
        images, annotations = [], []
        for number, line in enumerate(lines, 1):
            images.append({'id': number, **{key: line[key] for key in ('file_name', 'height', 'width')}})
            for (left, top, right, bottom), confidence, label in zip(line['boxes'], line['scores'], line['labels']):
                width, height = right - left, bottom - top
                if confidence >= score and width > 0 and height > 0:
                    box = [left, top, round(width, 2), round(height, 2)]
                    annotations.append(
                        dict(
                            id=len(annotations) + 1,
                            image_id=number,
                            category_id=label + 1,
                            bbox=box,
                            area=round(width * height, 2),
                            iscrowd=0,
                            score=confidence,
                        )
                    )
        categories = [dict(id=index, name=name) for index, name in enumerate(self.classes or (), 1)]
        torn = self.out.with_suffix('.torn')
        torn.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
        os.replace(torn, self.out)
        self.kept.unlink()
        return dict(score=score, images=len(images), boxes=len(annotations))


def boxes_per_image(labelled: str | Path) -> float:
    """How many boxes an image of a labelled COCO file has, on average.

    Raises:
        ConfigError: if it is none, or has no images.
    """
    try:
        found = json.loads(Path(labelled).read_text())
        return len(found['annotations']) / len(found['images'])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f'--like {labelled}: is no COCO file with images ({type(error).__name__}: {error})'
        ) from error


def threshold_like(scores: Sequence[Sequence[float]], per_image: float) -> float:
    """The score that leaves so many boxes for each image, on average.

    Args:
        scores: Of each image's boxes.
        per_image: How many.
    """
    ranked = sorted((each for image in scores for each in image), reverse=True)
    wanted = round(per_image * len(scores))
    if not ranked or wanted <= 0:
        return 1.0
    return ranked[min(wanted, len(ranked)) - 1]


def _reduces_zero_label(config: Config) -> bool:
    """Whether the data that the model was made for count their classes from 1 in label maps, as ADE20K does."""
    for part in ('test', 'val', 'train'):
        for _, dataset in part_datasets(config, part):
            kind = dataset_class(dataset, config.get('default_scope'))
            default = inspect.signature(kind).parameters.get('reduce_zero_label') if kind else None
            given = dataset.get('reduce_zero_label', default.default if default else False)
            return given is True
    return False


def _classes(config: Config) -> tuple[str, ...] | None:
    for part in ('test', 'val', 'train'):
        option, dataset = next(part_datasets(config, part), ('', {}))
        names = class_names(dataset, option, config.get('default_scope')) if dataset else None
        if names:
            return names
    return None


def _pipeline(config: Config, detects: bool, augment: bool) -> tuple[list, Mapping | None]:
    """The pipeline of the images, and with augmentation the model that merges its predictions."""
    loader = config.get('test_dataloader') or config.get('val_dataloader')
    if not loader:
        raise ConfigError('the config has no test_dataloader, whose pipeline would prepare the images')
    dataset = loader.dataset
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    steps = [copy.deepcopy(step) for step in dataset.pipeline if 'Annotations' not in type_name(step)]
    steps[-1].meta_keys = tuple(dict.fromkeys((*META, *(steps[-1].get('meta_keys') or ()))))
    if not augment:
        return steps, None
    merged = config.get('tta_model') or (
        ConfigDict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
        if detects
        else ConfigDict(type='SegTTAModel')
    )
    if config.get('tta_pipeline'):
        return _without_labels(config.tta_pipeline), merged
    at = next((i for i, step in enumerate(steps) if type_name(step) == 'Resize'), None)
    if at is None:  # behind what loads the image
        sizes = [dict(type='Resize', scale_factor=scale, keep_ratio=True) for scale in SCALES]
        before, after = steps[:1], steps[1:]
    else:
        sizes = [_resized(steps[at], scale) for scale in SCALES]
        before, after = steps[:at], steps[at + 1 :]
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    return [*before, dict(type='TestTimeAug', transforms=[sizes, flips, *[[step] for step in after]])], merged


def _without_labels(pipeline: Sequence[Mapping]) -> list:
    """A pipeline with augmentation, without what loads labels, and with the meta data that are needed here."""
    steps = copy.deepcopy(list(pipeline))
    for step in steps:
        branches = step.get('transforms', ())
        if type_name(step) == 'TestTimeAug':
            kept = [[each for each in branch if 'Annotations' not in type_name(each)] for branch in branches]
            step['transforms'] = [branch for branch in kept if branch]
            for each in step['transforms'][-1]:
                each['meta_keys'] = tuple(dict.fromkeys((*META, *(each.get('meta_keys') or ()))))
    return [step for step in steps if 'Annotations' not in type_name(step)]


def _resized(step: Mapping, scale: float) -> dict:
    """A pipeline's ``Resize`` to another scale than it has."""
    key = 'scale' if step.get('scale') else 'scale_factor'
    value = step[key]
    if isinstance(value, (tuple, list)):
        return {**step, key: tuple(round(side * scale) if key == 'scale' else side * scale for side in value)}
    return {**step, key: value * scale}


META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'pad_shape', 'scale_factor', 'flip', 'flip_direction')


def _augmented(model: nn.Module, spec: Mapping) -> nn.Module:
    merging = MODELS.build(ConfigDict(spec, module=model))
    if hasattr(model, 'decode_head'):  # mmseg's own keeps the merged classes alone, and not how sure they are
        merging.merge_preds = _merge_logits
    return merging.to(get_device()).eval()


def _merge_logits(augmented: Sequence[Sequence[Any]]) -> list[Any]:
    """For each image one sample, whose logits have the mean of the augmented images' probabilities."""
    merged = []
    for samples in augmented:
        logits = [sample.seg_logits.data.float() for sample in samples]
        if logits[0].shape[0] == 1:
            mean = torch.stack([each.sigmoid() for each in logits]).mean(0).logit()
        else:
            mean = torch.stack([each.softmax(0) for each in logits]).mean(0).log()
        samples[0].seg_logits.data = mean
        merged.append(samples[0])
    return merged

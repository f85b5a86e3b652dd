"""The pictures of the detection demo: boxes of every model, and the instances that GID selects."""

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mmcv.transforms import Compose
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS
from mmdet.structures.bbox import get_box_tensor
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from mmkd.data.shapes import CLASSES
from mmkd.experiments.boxes import readable
from mmkd.experiments.demos import Demo
from mmkd.experiments.pages import embed
from mmkd.experiments.pictures import draw_boxes
from mmkd.experiments.report import Report
from mmkd.experiments.runs import Run, trained_model
from mmkd.experiments.suites import SUITES
from mmkd.hosts.running import run
from mmkd.taps import Taps

OF_CLASS = [
    [255 * part for part in to_rgb(each)] for each in ('#e6194b', '#3cb44b', '#ffe119', '#4363d8', '#f58231', '#f032e6')
]
PICTURES = 6


@torch.no_grad()
def selected_instances(of: Run, samples: list[dict]) -> list[InstanceData]:
    """What GID selects in each image, with the student as it is after training."""
    model = MODELS.build(of.read().model).eval()
    weights = torch.load(of.checkpoint, map_location='cpu', weights_only=True)['state_dict']
    model.load_state_dict(weights)
    model.sources['teacher'].load()
    gid = model.distillers['gid']
    selected = []
    for sample in samples:
        batch = model.data_preprocessor({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]})
        teacher = model.sources['teacher'](batch['inputs'], batch['data_samples'])
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
        results = inference_detector(trained_model(each), files, test_pipeline=pipeline)
        columns[name] = [readable(result.pred_instances) for result in results]
    columns['selected by GID'] = selected_instances(students['GID'][0], samples)

    figure = Figure(figsize=(2.3 * len(columns), 2.3 * len(files)))
    axes = figure.subplots(len(files), len(columns), squeeze=False)
    for row, sample in zip(axes, range(len(files))):
        image = samples[sample]['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        for axis, (name, instances) in zip(row, columns.items()):
            found = instances[sample]
            labels = [] if name == 'selected by GID' else found.labels.tolist()
            texts = [CLASSES[label] for label in labels] or [''] * len(found)
            if 'scores' in found:
                texts = [f'{text} {score:.2f}'.strip() for text, score in zip(texts, found.scores.tolist())]
            colors = [OF_CLASS[label] for label in labels] or [(255, 255, 255)] * len(found)
            draw_boxes(axis, image, get_box_tensor(found.bboxes), texts, colors)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=10)
    figure.subplots_adjust(wspace=0.03, hspace=0.03)
    return embed(figure, 'png')


DEMO = Demo(
    suite=SUITES['shapes'],
    teacher='retinanet_teacher',
    students={'student alone': 'retinanet_student', 'CWD': 'cwd_retinanet', 'GID': 'gid_retinanet'},
    report=Report(
        title='A small RetinaNet learns from a larger one',
        data='Generated data set "shapes": 1000 training and 200 validation images of 160 x 160 pixels.',
        training='all from random weights, with the same data order for each seed',
        score=SUITES['shapes'].score,
        metrics={
            'AP': 'coco/bbox_mAP',
            'AP50': 'coco/bbox_mAP_50',
            'AP75': 'coco/bbox_mAP_75',
            'AP small': 'coco/bbox_mAP_s',
            'AP medium': 'coco/bbox_mAP_m',
            'AP large': 'coco/bbox_mAP_l',
        },
        task_loss=lambda entry: entry['loss_cls'] + entry['loss_bbox'],
        metric_note='COCO metrics; "none": no object of that size.',
        picture_note='Boxes with a score above 0.3; of boxes that overlap by more than 0.6 the best alone is drawn. Last '
        'column: the general instances that GID selects with the trained student, each with its score, the largest '
        "difference of the two networks' class probabilities there.",
    ),
    show=lambda teacher, students: (pictures(teacher, students), {}),
)

"""Samples of a training that cannot be read: their file is named, or they are left out."""

import logging
import multiprocessing
from typing import Any

from mmengine.dataset import Compose
from mmengine.logging import print_log

from mmkd.errors import Stopped

_may_leave_out = multiprocessing.Value('i', 0)  # data workers are forked, and share it


def leave_out_samples(most: int) -> None:
    """Have a training leave out up to so many samples that cannot be used, all data workers together, with a line each."""
    _may_leave_out.value = most


class NamedSamples(Compose):
    """A pipeline whose errors name the file of the sample that they arose with; see also :func:`leave_out_samples`."""

    def __init__(self, pipeline: Compose):
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> dict | None:
        path = data.get('img_path') or data.get('sample_idx')
        labels = data.get('seg_map_path')
        try:
            return super().__call__(data)
        except Exception as error:
            where = f'{path} (labels {labels})' if labels else path
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            line = f'sample {where} cannot be used: {type(error).__name__}: {reason}'
            with _may_leave_out.get_lock():
                left_out = _may_leave_out.value > 0
                _may_leave_out.value -= left_out
            if not left_out:
                raise Stopped(f'{line}; mend or remove it, or have --leave-out N leave out up to N of them') from error
            print_log(f'{line}; it is left out', logger='current', level=logging.WARNING)
            return None  # the data set then takes another


def name_samples(dataset: Any) -> None:
    """Have a data set, and those inside of wrappers, name the file of a sample that cannot be read."""
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        dataset.pipeline = NamedSamples(dataset.pipeline)
    for inner in [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]:
        if inner is not None:
            name_samples(inner)

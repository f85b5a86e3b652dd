"""Places that are neither objects nor background, in the losses of mmdet's heads.

mmdet's own ``ignore_iof_thr`` is off in most configs, and does nothing for an image without any object.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from mmkd.hosts.detection.boxes import pairwise_iof

INSIDE = 0.5
"""An anchor or a proposal of which more lies in an ignored box is no background."""
ASSIGNERS = ('ATSSAssigner', 'MaxIoUAssigner', 'TaskAlignedAssigner')
"""Those of mmdet that assign boxes."""
UNWEIGHTED = ('PAAHead', 'VFNetHead')
"""Heads that have such an assigner, and take all that is assigned to nothing for background."""


@contextlib.contextmanager
def leaving_out_ignored(model: nn.Module) -> Iterator[None]:
    """While it lasts, a detector's losses leave out each anchor and proposal without an object of which more than half lies in
    a box of its image's ``ignored_instances``.
    """
    with contextlib.ExitStack() as stack:
        for assigner in assigners(model):
            assigner.assign = _leaving_out(assigner.assign)
            stack.callback(delattr, assigner, 'assign')  # back to the method of its class
        yield


def _leaving_out(assign: Any) -> Any:
    signature = inspect.signature(assign)

    def leave_out(*args: Any, **kwargs: Any) -> Any:
        result = assign(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        ignored, priors = given.get('gt_instances_ignore'), given['pred_instances'].priors
        if ignored is not None and len(ignored) and len(priors):
            inside = pairwise_iof(priors[:, :4], ignored.bboxes).amax(1) > INSIDE
            result.gt_inds = result.gt_inds.masked_fill(inside & (result.gt_inds == 0), -1)
        return result

    return leave_out


def assigners(model: nn.Module) -> list:
    """The assigners of a detector's heads; none at all where any of them cannot leave places out."""
    found: list = []
    for head in filter(None, (getattr(model, name, None) for name in ('rpn_head', 'bbox_head', 'roi_head'))):
        own = [each for key, each in vars(head).items() if key.endswith('assigner') and each is not None]
        own = [each for one in own for each in (one if isinstance(one, list) else [one])]  # a cascade's stages
        own = list({id(each): each for each in own}.values())
        if not own or type(head).__name__ in UNWEIGHTED or any(type(each).__name__ not in ASSIGNERS for each in own):
            return []
        found += own
    return found

"""The distillation methods. A new one: its own file, and one line here."""

from importlib.util import find_spec

from mmkd.distillers.base import Distiller, Distillers, FeatureDistiller
from mmkd.distillers.generic.cwd import CWD

__all__ = ['CWD', 'Distiller', 'Distillers', 'FeatureDistiller']

if find_spec('mmdet') is not None:  # segmentation needs no mmdet
    from mmkd.distillers.detection.gid import GID
    from mmkd.distillers.detection.mimic import Mimic

    __all__ += ['GID', 'Mimic']

"""The distillation methods. A new one: its own file, and one line here."""

from mmkd.distillers.base import Distiller, Distillers, FeatureDistiller
from mmkd.distillers.detection.gid import GID
from mmkd.distillers.generic.cwd import CWD

__all__ = ['CWD', 'GID', 'Distiller', 'Distillers', 'FeatureDistiller']

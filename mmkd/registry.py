"""Registries of mmkd.

``type='mmkd.Distill'`` in a config makes mmengine import this module, which is why no ``custom_imports`` is needed.
Distillers and adapters have roots of their own: mmengine allows one child per scope under a root, and none of its own
registries is for losses of two models.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmkd', locations=['mmkd.distill'])
DISTILLERS = Registry('distiller', scope='mmkd', locations=['mmkd.distillers'])
ADAPTERS = Registry('adapter', scope='mmkd', locations=['mmkd.adapters'])

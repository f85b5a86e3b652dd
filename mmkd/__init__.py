"""mmkd: knowledge distillation for mmdet and mmsegmentation."""

from mmkd.hosts.mmengine import accept_mmkd_configs, accept_mmseg_by_its_module, accept_training_checkpoints

accept_mmkd_configs()
accept_mmseg_by_its_module()
accept_training_checkpoints()

from mmkd.distill import distill  # noqa: E402  (configs and checkpoints are read with what is done above)
from mmkd.weights import read_safely  # noqa: E402

read_safely()

__all__ = ['distill']
__version__ = '0.1.0'

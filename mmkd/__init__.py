"""mmkd: knowledge distillation for mmdet and mmsegmentation."""

from mmkd.hosts.mmengine import accept_mmkd_configs, accept_training_checkpoints

__version__ = '0.1.0'

accept_mmkd_configs()
accept_training_checkpoints()

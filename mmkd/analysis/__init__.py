"""What can be seen of a distillation before and while it trains: layers, costs, schedules, gradients, scores, pictures."""

from mmkd.analysis.gradients import GradientShareHook
from mmkd.analysis.pictures import DistillVisualizationHook

__all__ = ['DistillVisualizationHook', 'GradientShareHook']

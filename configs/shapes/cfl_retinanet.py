# two specialists, whose features and classes one student learns
_base_ = 'specialists_retinanet.py'
model = dict(distillers=dict(cfl=dict(type='CFL', layer='neck', teacher=['a', 'b'])))

_base_ = 'fgd_retinanet.py'
model = dict(distillers=dict(fgd=dict(uncertainty=dict(passes=5, p=0.1))))

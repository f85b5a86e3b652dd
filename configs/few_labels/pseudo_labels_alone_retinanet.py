# learns nothing else of the teacher than these boxes
_base_ = 'pseudo_labels_retinanet.py'
model = dict(distillers=dict(_delete_=True))

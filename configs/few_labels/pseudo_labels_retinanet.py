# and learns the boxes that the teacher is sure of on the other images
_base_ = 'unlabelled_retinanet.py'
model = dict(pseudo_labels=dict(score=0.5, uncertain=0.2))

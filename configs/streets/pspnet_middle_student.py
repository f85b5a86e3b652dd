# between the student and the teacher
_base_ = '_base_/pspnet.py'
model = dict(backbone=dict(base_channels=20, stem_channels=20), decode_head=dict(in_channels=160, channels=40))

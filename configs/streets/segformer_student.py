_base_ = '_base_/segformer.py'
model = dict(
    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1]), decode_head=dict(in_channels=[16, 32, 80, 128], channels=32))

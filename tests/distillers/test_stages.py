"""Stages that learn one after the other are entries with schedules: docs/schemes.md, "Stage by stage"."""

import torch

import mmkd
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def test_each_entry_is_on_in_its_stage_alone_and_trains_what_it_reaches(tmp_path):
    teacher = segmentors.pspnet(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')

    def stage(layer, **steps):
        return dict(type='FitNet', layer=layer, teacher='large', loss_weight=dict(type='constant', value=10.0, **steps))

    distillers = dict(
        first=stage('backbone.layer1', end=2),
        second=stage('backbone.layer2', begin=2, end=4),
        third=stage('decode_head.bottleneck', begin=4, end=6),  # with an adapter, which is trained
        kept=dict(
            type='FitNet',
            layer='backbone.layer1',
            teacher='before',
            loss_weight=dict(type='constant', value=10.0, begin=2, end=4),
        ),
    )
    sources = dict(large=dict(config=teacher, checkpoint=checkpoint), before=dict(type='Snapshot', cycle=2))
    task = dict(type='constant', value=1.0, begin=6)
    model = mmkd.distill(models.build(segmentors.pspnet(), seed=0), sources, distillers, task_weight=task)
    model.init_weights()
    model.train()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    parts = dict(
        first=model.backbone.layer1,
        second=model.backbone.layer2,
        third=model.decode_head.bottleneck,
        adapter=model.distillers['third'],
        task=model.decode_head.conv_seg,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    on, moved = [], []
    for _ in range(7):
        losses = model(**data, mode='loss')
        losses = {
            key: sum(value) if isinstance(value, list) else value for key, value in losses.items() if 'loss' in key
        }
        on.append({key.partition('.')[0] for key, value in losses.items() if value.item()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gradients = {name: [each.grad for each in part.parameters()] for name, part in parts.items()}
        assert all(each is not None for found in gradients.values() for each in found)  # as DDP asks for
        moved.append({name for name, found in gradients.items() if any(each.any() for each in found)})
        optimizer.step()
    assert on[:2] == [{'first'}] * 2
    assert on[2:4] == [{'second', 'kept'}] * 2
    assert on[4:6] == [{'third'}] * 2
    assert on[6] == {'decode', 'aux'}
    assert moved[:2] == [{'first'}] * 2
    assert moved[2:4] == [{'first', 'second'}] * 2
    assert moved[4:6] == [{'first', 'second', 'third', 'adapter'}] * 2
    assert moved[6] == {'first', 'second', 'third', 'task'}

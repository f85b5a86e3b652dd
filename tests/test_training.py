"""Through mmengine's real Runner and the command-line tools."""

import re
import subprocess
import sys

import pytest
import torch
from mmengine.runner import Runner, load_checkpoint
from tool import ROOT, tool

from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, shapes_config

pytestmark = pytest.mark.slow

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))


@pytest.fixture
def config(tmp_path):
    return shapes_config(tmp_path, distilled(tmp_path, METHODS))


def write(config, tmp_path):
    path = tmp_path / 'config.py'
    config.dump(path)
    return path


def predictions(model, seed=3):
    model.eval()
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), seed=seed), False)
    with torch.no_grad():
        return [each.pred_instances for each in model(**batch, mode='predict')]


def test_training_changes_student_and_adapters(config):
    runner = Runner.from_cfg(config)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    after = runner.model.state_dict()
    for name in (
        'neck.fpn_convs.0.conv.weight',
        'distillers.gid.adapters.0.conv.weight',
        'distillers.cwd.levels.adapters.2.conv.weight',
    ):
        assert not torch.equal(before[name], after[name]), name
    history = runner.message_hub.get_scalar('train/gid.loss_relation')
    assert history.data[0].shape == (4,)


def test_the_checkpoint_is_a_plain_models_and_predicts_bit_for_bit(tmp_path):
    plain = detectors.retinanet(classes=6)
    model = distilled(tmp_path, dict(gid=dict(type='GID')), plain, teacher=detectors.retinanet(classes=6))
    runner = Runner.from_cfg(shapes_config(tmp_path, model))
    runner.train()
    stock = models.build(plain)
    load_checkpoint(stock, str(tmp_path / 'work' / 'iter_4.pth'), strict=True)
    assert list(stock.state_dict()) == list(runner.model.state_dict())
    for found, expected in zip(predictions(stock), predictions(runner.model)):
        assert len(expected) > 0
        for field in ('bboxes', 'scores', 'labels'):
            assert torch.equal(found[field], expected[field])


def test_export_writes_what_stock_mmdet_takes_strictly(config, tmp_path):
    path = write(config, tmp_path)
    Runner.from_cfg(config).train()
    checkpoint = tmp_path / 'work' / 'iter_4.pth'
    assert any(name.startswith('distillers.') for name in torch.load(checkpoint, weights_only=True)['state_dict'])
    tool('export', path, checkpoint, tmp_path / 'plain')
    probe = f"""
import sys, torch
from mmdet.apis import init_detector
from mmengine.runner import load_checkpoint

model = init_detector({str(tmp_path / 'plain.py')!r}, device='cpu')
load_checkpoint(model, {str(tmp_path / 'plain.pth')!r}, strict=True)
assert type(model).__name__ == 'RetinaNet' and 'mmkd' not in sys.modules
torch.save(model.state_dict(), {str(tmp_path / 'loaded.pth')!r})
"""
    done = subprocess.run([sys.executable, '-c', probe], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = torch.load(checkpoint, weights_only=True)['state_dict']
    assert all(torch.equal(value, trained[name]) for name, value in torch.load(tmp_path / 'loaded.pth').items())
    assert 'exists; remove it' in tool('export', path, checkpoint, tmp_path / 'plain', expect=1)


def test_resume_continues_as_if_never_stopped(tmp_path):
    """20 iterations in one go, and 12 + resume + 8, end with identical weights, adapters included."""
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=20)
    config.default_hooks.checkpoint.interval = 4
    path = write(config, tmp_path)
    tool('train', path, '--work-dir', tmp_path / 'whole')
    tool('train', path, '--work-dir', tmp_path / 'parts', '--cfg-options', 'train_cfg.max_iters=12')
    assert not (tmp_path / 'parts' / 'iter_20.pth').exists()
    assert 'resumed epoch: 0, iter: 12' in tool('train', path, '--work-dir', tmp_path / 'parts', '--resume')
    whole, parts = (torch.load(tmp_path / each / 'iter_20.pth', weights_only=True) for each in ('whole', 'parts'))
    assert any(name.startswith('distillers.') for name in whole['state_dict'])
    assert whole['state_dict'].keys() == parts['state_dict'].keys()
    for name, value in whole['state_dict'].items():
        assert torch.equal(value, parts['state_dict'][name]), name


def test_schedules_follow_the_runners_iteration(tmp_path):
    weight = dict(type='constant', value=5.0, begin=2)
    config = shapes_config(tmp_path, distilled(tmp_path, dict(cwd=dict(type='CWD', layer='neck', loss_weight=weight))))
    runner = Runner.from_cfg(config)
    runner.train()
    values = runner.message_hub.get_scalar('train/cwd.loss').data[0]
    assert (values[:2] == 0).all()
    assert (values[2:] > 0).all()


def test_the_tools_train_and_test(config, tmp_path):
    path = write(config, tmp_path)
    printed = tool('train', path, '--cfg-options', 'model.distillers.gid.topk=3', 'train_dataloader.batch_size=2')
    assert re.search(r'Iter\(train\) \[4/4\].*eta: .*gid.loss_feature: .*gid.instances: 3.0', printed)
    assert 'was chosen for a batch of 4 images and this run has 2: add --auto-scale-lr to scale it by 0.5' in printed
    printed = tool('train', path, '--auto-scale-lr', '--work-dir', tmp_path / 'scaled')
    assert 'was chosen for' not in printed
    (tmp_path / 'teacher.pth').unlink()  # testing needs none
    checkpoint = tmp_path / 'work' / 'iter_4.pth'
    shown = ('--out', tmp_path / 'out.pkl', '--show-dir', tmp_path / 'pictures')
    printed = tool('test', path, checkpoint, *shown)
    assert 'coco/bbox_mAP' in printed
    assert f'8 pictures are in {tmp_path}/pictures' in printed
    assert (tmp_path / 'out.pkl').stat().st_size > 0
    assert len(list((tmp_path / 'pictures').glob('*.jpg'))) == 8
    line = tool('test', path, tmp_path / 'nowhere.pth', expect=1).splitlines()[-1]
    assert line.startswith(f'error: checkpoint {tmp_path}/nowhere.pth: no such file')
    models.save_weights(detectors.retinanet(classes=6, channels=8), tmp_path / 'other.pth')
    line = tool('test', path, tmp_path / 'other.pth', expect=1).splitlines()[-1]
    assert re.match(
        r'error: checkpoint .*other.pth does not fit DistilledRetinaNet: \d+ of another shape \(neck.', line
    )
    assert line.endswith('give a checkpoint of a training with this config')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'train_dataloader.dataset.data_root': '/nowhere'},
            r'train_dataloader.dataset.data_root: /nowhere does not exist; .*make demo',
        ),
        ({'train_dataloader.dataset.data_prefix.img': 'trian/'}, r'data_prefix.img: .*/trian/? does not exist'),
        (
            {'val_dataloader.dataset.ann_file': 'annotations/none.json'},
            r'val_dataloader.dataset.ann_file: .*none.json does not',
        ),
        (
            {'train_dataloader.dataset.ann_file': '../wrong.json'},
            r'is not a COCO annotation file \(it lacks annotations, categories\)',
        ),
        (
            {'train_dataloader.dataset.metainfo.classes': ('disc',)},
            r"has no category 'disc', which .*metainfo.classes names",
        ),
        ({'val_evaluator.ann_file': '/nowhere.json'}, r'val_evaluator.ann_file: /nowhere.json does not exist'),
        (
            {'model.teacher.checkpoint': '/nowhere/teacher.pth'},
            r'teacher checkpoint /nowhere/teacher.pth: no such file',
        ),
        ({'model.distillers.cwd.layer': 'neckk'}, r"layer 'neckk': RetinaNet has no such module.*'neck'"),
        ({'model.distillers.gid.top': 5}, r"distillers.gid: GID has no option 'top'; the nearest are 'topk'"),
        ({'model.teacher.config': 'mmdet::retinanet/x.py'}, 'mmdet has no such config'),
        (
            {'model.student.bbox_head.num_classes': 2},
            r'model.student.bbox_head.num_classes=2: train_dataloader.dataset has 6',
        ),
        ({'load_from': '/nowhere.pth'}, r'^error: load_from /nowhere.pth: no such file \(looked in [^;]*$'),
    ],
)
def test_bad_input_is_one_clear_line_before_the_first_iteration(config, tmp_path, change, message):
    (tmp_path / 'wrong.json').write_text('{"images": []}')
    config.merge_from_dict(change)
    printed = tool('train', write(config, tmp_path), expect=1)
    errors = [line for line in printed.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert 'Traceback' not in printed
    assert 'Iter(train)' not in printed


def test_a_config_that_is_not_there_names_the_nearest():
    printed = tool('train', ROOT / 'configs' / 'gid_retina.py', expect=1)
    assert re.search(r'error: config .*gid_retina.py: no such file', printed)
    assert "nearest are 'gid_retinanet.py'" in tool('train', 'mmkd::gid_retina.py', expect=1)

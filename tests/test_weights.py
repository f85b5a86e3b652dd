import builtins
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_distributed import launch

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import weights_address
from mmkd.testing import detectors, models
from mmkd.testing.runs import shapes_config
from mmkd.weights import dataset_meta, fetch, fetchable, load_weights, mirrored, read_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of torch's downloads, from which nothing can be downloaded."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def refuse(url, *_, **__):
        raise OSError(f'no way to {url}')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    return tmp_path / 'hub' / 'checkpoints'


@pytest.mark.parametrize(
    ('name', 'file'),
    [
        ('torchvision://resnet50', 'resnet50-0676ba61.pth'),
        ('open-mmlab://resnet18_v1c', 'resnet18_v1c-b5776b93.pth'),
        ('open-mmlab://detectron2/resnet50_caffe', 'resnet50_msra-5891d200.pth'),
        ('mmcls://mobilenet_v2', 'mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth'),
        ('https://host/x.pth', 'x.pth'),
    ],
)
def test_named_weights_come_from_the_cache_or_the_error_says_where_to_put_them(cache, name, file):
    with pytest.raises(
        ConfigError, match=rf'student {name}: could not .*no way to .*; put the file at {cache / file}, or do'
    ):
        fetch(name, 'student', unreachable='do without')
    (cache / file).write_bytes(b'')
    assert fetch(name, 'student') == cache / file


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which it is served."""
    folder = tmp_path / 'served'
    folder.mkdir()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Sized, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


class Sized(SimpleHTTPRequestHandler):
    """Says of files that end with .half.pth that they are twice as long, as a broken connection does."""

    def send_header(self, keyword, value):
        if keyword == 'Content-Length' and self.path.endswith('.half.pth'):
            value = str(2 * int(value))
        super().send_header(keyword, value)

    def log_message(self, *_):
        pass


def test_a_download_is_whole_and_right_or_not_there(tmp_path, served, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    folder, address = served
    torch.save({'a': torch.ones(3)}, folder / 'whole.pth')
    content = (folder / 'whole.pth').read_bytes()
    (folder / 'cut.half.pth').write_bytes(content[: len(content) // 2])
    (folder / 'other-01234567.pth').write_bytes(content)
    (folder / 'page.pth').write_text('<html>moved</html>')
    digest = hashlib.sha256(content).hexdigest()[:8]
    (folder / f'named-{digest}.pth').write_bytes(content)
    for name in ('whole.pth', f'named-{digest}.pth'):
        assert fetch(f'{address}/{name}').read_bytes() == content
    for name, reason in (
        ('cut.half.pth', 'cannot be read'),
        ('other-01234567.pth', 'invalid hash'),
        ('page.pth', 'is no checkpoint'),
        ('none.pth', '404'),
    ):
        with pytest.raises(
            ConfigError, match=rf'could not be downloaded \(.*{reason}.*put the file at {tmp_path}/torch'
        ):
            fetch(f'{address}/{name}')
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    assert sorted(path.name for path in cache.iterdir()) == sorted(['whole.pth', f'named-{digest}.pth'])


def test_mirrors(tmp_path, served, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    folder, address = served
    (folder / 'a').mkdir()
    torch.save({'a': torch.ones(3)}, folder / 'a' / 'x.pth')
    monkeypatch.setenv('MMKD_MIRRORS', f'https://one.invalid/=https://two.invalid/ https://host.invalid/v1/={address}/')
    assert fetch('https://host.invalid/v1/a/x.pth').is_file()
    assert mirrored('https://elsewhere.invalid/x') == 'https://elsewhere.invalid/x'
    monkeypatch.setenv('MMKD_MIRRORS', 'one.invalid=two.invalid')
    with pytest.raises(ConfigError, match='^MMKD_MIRRORS=one.invalid=two.invalid: expected https://...=https://'):
        mirrored('https://one.invalid/x')


def test_names_that_mmengine_does_not_know():
    with pytest.raises(ConfigError, match=r"^x torchvision://resnet5: mmengine knows no such model; .*'resnet50'"):
        fetch('torchvision://resnet5', 'x')
    assert fetchable('https://x/y.pth')
    assert fetchable('mmcls://x')
    assert fetchable('weights/x.pth')
    assert not fetchable('s3://bucket/x.pth')


def test_torchvision_that_cannot_be_imported_is_one_line(monkeypatch):
    stock = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition('.')[0] == 'torchvision':
            raise ModuleNotFoundError("No module named 'torchvision'")
        return stock(name, *arguments, **options)

    monkeypatch.setattr(builtins, '__import__', refuse)
    with pytest.raises(ConfigError, match=r'torchvision://resnet50: needs torchvision, .*pip install torchvision'):
        weights_address('torchvision://resnet50')


def test_only_a_teacher_is_told_that_it_needs_trained_weights(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_weights(torch.nn.Linear(1, 1), str(tmp_path / 'x.pth'), 'checkpoint')
    assert str(error.value) == f'checkpoint {tmp_path}/x.pth: no such file (looked in {tmp_path.cwd()})'
    with pytest.raises(ConfigError, match='no such file .*; a teacher needs trained weights'):
        load_weights(torch.nn.Linear(1, 1), str(tmp_path / 'x.pth'))


def test_what_a_student_has_beside_the_plain_model_is_neither_loaded_nor_missed(tmp_path):
    model = models.build(detectors.retinanet())
    state = dict(model.state_dict(), **{'distillers.cwd.x': torch.ones(1), 'sources.mean.y': torch.ones(1)})
    torch.save(dict(state_dict=state), tmp_path / 'student.pth')
    assert list(read_checkpoint(tmp_path / 'student.pth')) == list(model.state_dict())
    load_weights(model, str(tmp_path / 'student.pth'))
    model.distillers = torch.nn.ModuleDict({'cwd': torch.nn.Linear(1, 1)})
    load_weights(model, str(tmp_path / 'student.pth'))
    state.pop('bbox_head.retina_cls.bias')
    torch.save(dict(state_dict=state), tmp_path / 'student.pth')
    with pytest.raises(ConfigError, match=r'does not fit RetinaNet: 1 missing \(bbox_head.retina_cls.bias\); x y z'):
        load_weights(model, str(tmp_path / 'student.pth'), advice='x y z')


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (dict(meta=dict(dataset_meta=dict(classes=('a', 'b')))), dict(classes=('a', 'b'))),
        (dict(meta=dict(CLASSES=['a'], PALETTE=[[1, 2, 3]])), dict(classes=['a'], palette=[[1, 2, 3]])),
        (dict(meta=dict(CLASSES=['a'], PALETTE=None)), dict(classes=['a'])),
        (dict(state_dict={}), {}),
        ([], {}),
    ],
)
def test_what_a_checkpoint_says_of_its_data(content, expected):
    assert dataset_meta(content) == expected


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.mark.slow
def test_two_processes_download_a_students_weights_once(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    backbone = models.build(detectors.retinanet(classes=6)).backbone
    torch.save(backbone.state_dict(), tmp_path / 'start.pth')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Counting, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = dict(type='Pretrained', checkpoint=f'http://127.0.0.1:{server.server_port}/start.pth')
    config = shapes_config(
        tmp_path, detectors.retinanet(classes=6, backbone=dict(init_cfg=start)), iterations=1, batch=2
    )
    config.optim_wrapper.optimizer.lr = 0.0
    config.dump(tmp_path / 'config.py')
    launch('dist_train.sh', tmp_path / 'config.py', 2)
    server.shutdown()
    assert Counting.asked == ['/start.pth']
    trained = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=True)['state_dict']
    assert torch.equal(trained['backbone.layer4.1.conv2.weight'], backbone.state_dict()['layer4.1.conv2.weight'])

"""What is read of a COCO file."""

import json

import pytest

from mmkd.errors import ConfigError
from mmkd.hosts.coco import read_coco

POLYGONS = [[[1, 2.5, 3e0, 4, 5, -6]], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]]
RUNS = dict(counts=[3, 4, 5], size=[9, 9])
CODED = dict(counts='a]}"', size=[9, 9])


def written(path, outlines, indent=None, **changes):
    images = [dict(id=7, file_name='a.jpg', width=40, height=30)]
    annotations = [
        dict(id=index, image_id=7, bbox=[1, 2, 10, 12], segmentation=each, area=120, category_id=3, note='"[1], "')
        for index, each in enumerate(outlines)
    ]
    content = dict(images=images, annotations=annotations, categories=[dict(id=3, name='cell')])
    path.write_text(json.dumps({**content, **changes}, indent=indent))
    return str(path)


@pytest.mark.parametrize('indent', [None, 2])
def test_outlines_are_not_parsed_but_known(tmp_path, indent):
    found = read_coco(written(tmp_path / 'all.json', [*POLYGONS, RUNS, CODED], indent))
    assert found.categories == ('cell',)
    assert found.images == {7: ('a.jpg', 40, 30)}
    assert (found.boxes, found.without_mask, found.annotated, found.warnings) == (4, None, {7}, ())
    found = read_coco(written(tmp_path / 'some.json', [POLYGONS[0], [], RUNS], indent))
    assert (found.boxes, found.without_mask) == (3, 1)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = written(tmp_path / 'a.json', POLYGONS)
    assert read_coco(path) is read_coco(path)
    assert read_coco(path).boxes == 2
    written(tmp_path / 'a.json', [*POLYGONS, RUNS])
    assert read_coco(path).boxes == 3


def test_what_mmdet_leaves_out_is_counted_as_mmdet_does(tmp_path):
    from mmdet.datasets import CocoDataset

    path = tmp_path / 'a.json'
    written(path, POLYGONS * 20)
    content = json.loads(path.read_text())
    boxes = [[1, 2, 0.5, 9], [39, 29, 40, 40], [50, 2, 9, 9], [-20, 2, 9, 9], [1, 2, -3, 9], [0, 0, 40, 30]]
    for annotation, box in zip(content['annotations'], boxes):
        annotation['bbox'] = box
    content['annotations'][10]['area'] = 0
    content['annotations'][11]['ignore'] = True
    path.write_text(json.dumps(content))
    found = read_coco(str(path))
    options = dict(metainfo=dict(classes=('cell',)), data_prefix=dict(img=''), pipeline=[], serialize_data=False)
    (stock,) = CocoDataset(ann_file=str(path), **options).data_list
    assert found.boxes == len(stock['instances']) == 34
    assert '3 of 39 boxes reach beyond their image' in found.warnings[0]
    assert 'mmdet leaves out 5 of 39 boxes' in found.warnings[1]


def test_boxes_beyond_their_image_are_refused_from_a_tenth_on(tmp_path):
    for wrong, refused in ((1, False), (3, True)):
        path = tmp_path / f'{wrong}.json'
        written(path, POLYGONS * 10)
        content = json.loads(path.read_text())
        for annotation in content['annotations'][:wrong]:
            annotation['bbox'] = [30, 20, 20, 20]
        path.write_text(json.dumps(content))
        if refused:
            with pytest.raises(
                ConfigError, match='3 of 20 boxes reach beyond their image, such as .*in 40x30; expected'
            ):
                read_coco(str(path))
        else:
            assert '1 of 20 boxes reach beyond' in read_coco(str(path)).warnings[0]

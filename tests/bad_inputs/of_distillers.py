"""Distillers, and the layers they read."""

from table import Accepted, Case


def distillers(name: str, entries: str, expected, **more) -> Case:
    """All distillers, in place of those of the base config."""
    return Case(name, expected, f'model = dict(distillers=dict(_delete_=True, {entries}))', **more)


def whole(name: str, value: str, expected) -> Case:
    return Case(name, expected, f'model = dict(distillers={value})')


def cwd(name: str, options: str, expected, **more) -> Case:
    return Case(name, expected, f'model = dict(distillers=dict(cwd=dict({options})))', **more)


def gid(name: str, options: str, expected, **more) -> Case:
    return distillers(name, f"gid=dict(type='GID', {options})", expected, **more)


def kd(name: str, options: str, expected) -> Case:
    return Case(name, expected, f'model = dict(distillers=dict(kd=dict({options})))', base='masks.py')


CASES = [
    whole('none', 'None', r'model.distillers: missing, or empty'),
    whole('an empty dict', 'dict(_delete_=True)', r'model.distillers: missing, or empty'),
    whole('a list', "[dict(type='GID')]", r'distillers=\[.*\]: expected a dict such as'),
    whole('a string', "'GID'", r"distillers='GID': expected a dict such as dict\(gid="),
    whole(
        'one without a name',
        "dict(_delete_=True, type='GID', topk=3)",
        r'distillers=.*: expected a dict such as dict.gid=',
    ),
    distillers(
        'a single token', "it=dict(type='MasKD', tokens=1)", r'distillers.it: .*tokens=1: expected a whole number'
    ),
    distillers(
        'tokens on another layer',
        "it=dict(type='FreeKD', layer='backbone')",
        r"distillers.it: 'backbone': FreeKD runs the heads of a RetinaNet over its maps",
    ),
    distillers('one that is a string', "gid='GID'", r"distillers.gid='GID': expected a dict with type"),
    distillers('one that is None', 'gid=None', r'distillers.gid=None: expected a dict with type'),
    distillers('one without a type', 'gid=dict(topk=3)', r'model.distillers.gid: it names no class; give it a type'),
    distillers('a type with a typo', "gid=dict(type='GDI')", r"there is no distiller 'GDI'; the nearest are .*'GID'"),
    distillers(
        'a type in small letters', "gid=dict(type='gid')", r"there is no distiller 'gid'; the nearest are 'GID'"
    ),
    distillers('a type that is a number', 'gid=dict(type=3)', r'distillers.gid: type=3: expected a name'),
    distillers(
        'a module that is not there',
        "x=dict(type='my.method.X')",
        r"cannot import my.method for type='my.method.X'.*PYTHONPATH",
    ),
    distillers('a class that is not in its module', "x=dict(type='mmkd.taps.X')", r"module mmkd.taps has no 'X'"),
    distillers(
        'a class that is no distiller', "x=dict(type='torch.nn.ReLU')", r"ReLU has no attribute 'student_layers'"
    ),
    distillers(
        'a name with loss', "loss_kd=dict(type='CWD', layer='neck')", r'distillers.loss_kd: a name starts the log keys'
    ),
    distillers(
        'a name with a dot', "**{'a.b': dict(type='CWD', layer='neck')}", r'distillers.a.b: a name starts the log keys'
    ),
    distillers(
        'the name of a method of dicts', "keys=dict(type='CWD', layer='neck')", r'distillers.keys: a name starts'
    ),
    cwd(
        'a layer with a typo',
        "layer='nekc'",
        r"student layer 'nekc': RetinaNet has no such module; the nearest are 'neck'",
    ),
    cwd(
        'a layer of another model',
        "layer='bbox_head.gfl_cls'",
        r"layer 'bbox_head.gfl_cls': RetinaNet has no such module",
    ),
    cwd(
        'a layer deep inside with a typo',
        "layer='backbone.layer4.9'",
        r"layer 'backbone.layer4.9': RetinaNet has no such",
    ),
    cwd('a layer that is empty', "layer=''", r"layer='': expected a layer's name"),
    cwd('a layer that is None', 'layer=None', r"layer=None: expected a layer's name"),
    cwd('a layer that is a number', 'layer=3', r"layer=3: expected a layer's name"),
    cwd('no layers', 'layer=[]', r"layer=\[\]: expected a layer's name"),
    cwd('a list with a number', "layer=['neck', 3]", r"layer=\['neck', 3\]: expected a layer's name"),
    cwd(
        'a layer that is a dict', "layer=dict(name='neck')", r"layer=.*_delete_=True|layer=.*: expected a layer's name"
    ),
    distillers('no layer', "cwd=dict(type='CWD')", r'distillers.cwd: CWD needs layer'),
    cwd(
        'a head of several outputs',
        "layer='bbox_head'",
        r"layer 'bbox_head' puts out a tuple of several outputs, not a map",
    ),
    cwd(
        'a layer that is never called',
        "layer='bbox_head.loss_cls'",
        r"layer 'bbox_head.loss_cls' of RetinaNet was never called",
    ),
    cwd(
        'the data preprocessor', "layer='data_preprocessor'", r"layer 'data_preprocessor' of RetinaNet was never called"
    ),
    distillers(
        'OFD of a layer that is not there',
        "ofd=dict(type='OFD', layer='backbone.layer9')",
        r"distillers.ofd: student layer 'backbone.layer9': \w+ has no such module; the nearest are 'backbone.layer",
    ),
    distillers(
        'more steps to track than there are',
        "matching=dict(type='MatchingGuided', layer='neck', interval=100)",
        r'distillers.matching: track=1000: expected at most interval=100',
    ),
    distillers(
        'TOFD of a detector',
        "tofd=dict(type='TOFD')",
        r'distillers.tofd: RetinaNet has no decode_head; name the layers to',
    ),
    cwd(
        'a layer that is changed in place', "layer='backbone.bn1'", r'its output is changed in place by a later module'
    ),
    cwd(
        'two layers and one of the teacher',
        "layer=['neck', 'backbone'], teacher_layer='neck'",
        r'2 student and 1 teacher layers',
    ),
    cwd('a teacher layer with a typo', "teacher_layer='nekc'", r"teacher layer 'nekc': RetinaNet has no such module"),
    cwd(
        'layers of other strides',
        "layer='backbone.layer1', teacher_layer='backbone.layer4', adapter=None",
        r'level 0 has',
    ),
    Case(
        'a frozen layer',
        r"student layer 'backbone.conv1': its output has no gradient",
        "model = dict(student=dict(backbone=dict(frozen_stages=1)), distillers=dict(cwd=dict(layer='backbone.conv1')))",
    ),
    cwd(
        'an option with a typo',
        'weight_loss=1',
        r"distillers.cwd: CWD has no option 'weight_loss'; the nearest are 'loss_weight'",
    ),
    cwd('an old name', 'weight=1', r"distillers.cwd: CWD calls 'weight' 'loss_weight' now"),
    cwd('a match with a typo', "match='strides'", r"match='strides': expected 'stride' or 'index'"),
    cwd('a word for a switch', "standardize='yes'", r"distillers.cwd: standardize='yes': expected True or False"),
    cwd('a temperature of 0', 'tau=0', r'distillers.cwd: tau=0: expected a positive temperature'),
    cwd('a negative temperature', 'tau=-1.0', r'tau=-1.0: expected a positive temperature'),
    cwd('a temperature of NaN', "tau=float('nan')", r'distillers.cwd: tau=nan: expected'),
    cwd('an infinite temperature', "tau=float('inf')", r'distillers.cwd: tau=inf: expected'),
    cwd('a temperature that is a string', "tau='4'", r"distillers.cwd: tau='4': expected a number"),
    cwd('a temperature of True', 'tau=True', r'distillers.cwd: tau=True: expected a number'),
    gid('topk of 0', 'topk=0', r'topk=0, nms_pre=3000: expected whole numbers'),
    gid('negative topk', 'topk=-3', r'topk=-3'),
    gid('topk of a half', 'topk=2.5', r'distillers.gid: topk=2.5: expected a whole number'),
    gid('topk that is a string', "topk='five'", r"distillers.gid: topk='five': expected a whole number"),
    gid('topk beyond all candidates', 'topk=100000000', r'topk=100000000, nms_pre=3000'),
    gid('topk of None', 'topk=None', r'distillers.gid: topk=None: expected a whole number'),
    gid('an overlap of 30', 'nms_iou=30', r'nms_iou=30: expected a number from 0 to 1'),
    gid('a relation with a typo', "relation='images'", r"relation='images': expected 'image' or 'batch'"),
    gid('a pooled size of 0', 'pooled_size=0', r'pooled_size=0: expected a whole number of at least 1'),
    gid('a layer that is a list', "layer=['neck']", r"layer=\['neck'\]: expected a string"),
    gid('a head that is not there', "head='roi_head'", r"layer 'roi_head': RetinaNet has no such module"),
    distillers('a two-stage method on RetinaNet', "mimic=dict(type='Mimic')", r'distillers.mimic: .*roi_head'),
    distillers('a method for distributions on RetinaNet', "ld=dict(type='LD')", r'distillers.ld: '),
    distillers('a segmentation method on a detector', "skd=dict(type='SKD')", r'distillers.skd: '),
    distillers(
        'a mask ratio of 1',
        "mgd=dict(type='MGD', layer='neck', mask_ratio=1.0)",
        r'mask_ratio=1.0: expected a probability',
    ),
    distillers(
        'a form with a typo', "at=dict(type='AT', layer='neck', form='average')", r"form='average': expected one of"
    ),
    distillers('a power that is NaN', "at=dict(type='AT', layer='neck', power=float('nan'))", r'power=nan: expected'),
    distillers(
        'relations between what is not offered',
        "sp=dict(type='SP', layer='neck', between='regions')",
        r"between='regions': expected one of images, cells, pixels",
    ),
    distillers('no samples', "rkd=dict(type='RKD', layer='neck', samples=0)", r'samples=0: expected a whole number'),
    distillers(
        'one layer where two are compared',
        "fsp=dict(type='FSP', layer='backbone.layer4')",
        r"layer='backbone.layer4': a single level, .*name two layers",
    ),
    distillers('a target among sigmoid scores', "dkd=dict(type='DKD')", r"'bbox_head' .* sigmoid scores: .*; use KD"),
    kd('a reduction with a typo', "reduction='mean'", r"reduction='mean': expected one of"),
    kd('a flag that is a string', "use_labels='False'", r"distillers.kd: use_labels='False': expected True or False"),
    kd('a flag that is a number', 'label_size=0', r'distillers.kd: label_size=0: expected True or False'),
    kd('a head as the layer', "layer='decode_head'", r"was never called .*tap 'decode_head.conv_seg'"),
    kd(
        'a method for boxes on a segmentor',
        "_delete_=True, type='GID'",
        r"distillers.kd: .*layer 'bbox_head': EncoderDecoder has no such module",
    ),
    kd('kernel and scale at once', "_delete_=True, type='SKD', kernel=2, scale=0.5", r'both say how large a node is'),
    kd(
        'all weights 0',
        "_delete_=True, type='SKD', pixel_weight=0, pair_weight=0, holistic_weight=0",
        r'nothing would be learnt',
    ),
    # what is right
    cwd('a weight of 0', 'loss_weight=0', Accepted('switches a method off')),
    cwd('what a layer takes in', "layer='bbox_head.retina_cls:input'", Accepted('the feature before the classifier')),
    cwd('a whole number as temperature', 'tau=4', Accepted('a whole number is a number')),
    distillers(
        'two methods',
        "a=dict(type='CWD', layer='neck'), b=dict(type='AT', layer='neck')",
        Accepted('as many as wanted'),
    ),
]

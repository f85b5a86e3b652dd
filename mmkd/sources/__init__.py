"""What a student learns from: a frozen teacher, its own average or earlier weights, a peer, itself, or labels."""

from importlib.util import find_spec

from mmkd.sources.average import Average
from mmkd.sources.own import Own
from mmkd.sources.peer import Peer
from mmkd.sources.snapshot import Snapshot
from mmkd.sources.source import Source, Sources, build_sources
from mmkd.sources.teacher import Teacher

__all__ = ['Average', 'Own', 'Peer', 'Snapshot', 'Source', 'Sources', 'Teacher', 'build_sources']

if find_spec('mmdet') is not None:  # segmentation needs no mmdet
    from mmkd.sources.label_encoder import LabelEncoder

    __all__ += ['LabelEncoder']

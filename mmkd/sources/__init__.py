"""What a student learns from: a frozen teacher, its own average or earlier weights, a peer that is trained along, or itself."""

from mmkd.sources.average import Average
from mmkd.sources.own import Own
from mmkd.sources.peer import Peer
from mmkd.sources.snapshot import Snapshot
from mmkd.sources.source import Source, Sources, build_sources
from mmkd.sources.teacher import Teacher

__all__ = ['Average', 'Own', 'Peer', 'Snapshot', 'Source', 'Sources', 'Teacher', 'build_sources']

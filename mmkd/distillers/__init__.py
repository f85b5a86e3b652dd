"""The distillation methods. A new one: its own file, and one line here."""

from importlib.util import find_spec

from mmkd.distillers.base import Distiller, FeatureDistiller
from mmkd.distillers.collection import Distillers
from mmkd.distillers.generic.afd import AFD
from mmkd.distillers.generic.affinity import Affinity
from mmkd.distillers.generic.at import AT
from mmkd.distillers.generic.cankd import CanKD
from mmkd.distillers.generic.cfl import CFL
from mmkd.distillers.generic.crcd import CRCD
from mmkd.distillers.generic.crd import CRD
from mmkd.distillers.generic.cwd import CWD
from mmkd.distillers.generic.dkd import DKD
from mmkd.distillers.generic.fitnet import FitNet
from mmkd.distillers.generic.fkd import FKD
from mmkd.distillers.generic.fsp import FSP
from mmkd.distillers.generic.irg import IRG
from mmkd.distillers.generic.kd import KD
from mmkd.distillers.generic.maskd import MasKD
from mmkd.distillers.generic.matching_guided import MatchingGuided
from mmkd.distillers.generic.mgd import MGD
from mmkd.distillers.generic.nst import NST
from mmkd.distillers.generic.ofd import OFD
from mmkd.distillers.generic.pkd import PKD
from mmkd.distillers.generic.reviewkd import ReviewKD
from mmkd.distillers.generic.rkd import RKD
from mmkd.distillers.generic.sp import SP
from mmkd.distillers.generic.ssim import SSIM
from mmkd.distillers.levels import LevelPair, LevelPairs
from mmkd.distillers.segmentation.afdcd import AfDCD
from mmkd.distillers.segmentation.aicsd import AICSD
from mmkd.distillers.segmentation.attnfd import AttnFD
from mmkd.distillers.segmentation.bpkd import BPKD
from mmkd.distillers.segmentation.cirkd import CIRKD
from mmkd.distillers.segmentation.dakd import DAKD
from mmkd.distillers.segmentation.dist import DIST
from mmkd.distillers.segmentation.dsd import DSD
from mmkd.distillers.segmentation.ifvd import IFVD
from mmkd.distillers.segmentation.okddip import OKDDip
from mmkd.distillers.segmentation.one import ONE
from mmkd.distillers.segmentation.rmrkd import RMRKD
from mmkd.distillers.segmentation.skd import SKD
from mmkd.distillers.segmentation.tofd import TOFD
from mmkd.distillers.segmentation.transkd import TransKD
from mmkd.distillers.segmentation.trust import Trust
from mmkd.distillers.segmentation.wsld import WSLD

__all__ = [
    'AFD',
    'AICSD',
    'AT',
    'BPKD',
    'CFL',
    'CIRKD',
    'CRCD',
    'CRD',
    'CWD',
    'DAKD',
    'DIST',
    'DKD',
    'DSD',
    'FKD',
    'FSP',
    'IFVD',
    'IRG',
    'KD',
    'MGD',
    'NST',
    'OFD',
    'ONE',
    'PKD',
    'RKD',
    'RMRKD',
    'SKD',
    'SP',
    'SSIM',
    'TOFD',
    'WSLD',
    'AfDCD',
    'Affinity',
    'AttnFD',
    'CanKD',
    'Distiller',
    'Distillers',
    'FeatureDistiller',
    'FitNet',
    'LevelPair',
    'LevelPairs',
    'MasKD',
    'MatchingGuided',
    'OKDDip',
    'ReviewKD',
    'TransKD',
    'Trust',
]

if find_spec('mmdet') is not None:  # segmentation needs no mmdet
    from mmkd.distillers.detection.bckd import BCKD
    from mmkd.distillers.detection.chen import Chen
    from mmkd.distillers.detection.crosskd import CrossKD
    from mmkd.distillers.detection.defeat import DeFeat
    from mmkd.distillers.detection.erd import ERD
    from mmkd.distillers.detection.fgd import FGD
    from mmkd.distillers.detection.fgfi import FGFI
    from mmkd.distillers.detection.freekd import FreeKD
    from mmkd.distillers.detection.frs import FRS
    from mmkd.distillers.detection.gdetkd import GDetKD
    from mmkd.distillers.detection.gid import GID
    from mmkd.distillers.detection.head import HEAD
    from mmkd.distillers.detection.icd import ICD
    from mmkd.distillers.detection.labelenc import LabelEnc
    from mmkd.distillers.detection.ld import LD
    from mmkd.distillers.detection.lgd import LGD
    from mmkd.distillers.detection.mimic import Mimic
    from mmkd.distillers.detection.pgd import PGD
    from mmkd.distillers.detection.quantization_mimic import QuantizationMimic

    __all__ += [
        'BCKD',
        'ERD',
        'FGD',
        'FGFI',
        'FRS',
        'GID',
        'HEAD',
        'ICD',
        'LD',
        'LGD',
        'PGD',
        'Chen',
        'CrossKD',
        'DeFeat',
        'FreeKD',
        'GDetKD',
        'LabelEnc',
        'Mimic',
        'QuantizationMimic',
    ]

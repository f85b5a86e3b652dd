"""Adapters: trainable maps from the student's feature to the teacher's shape."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.errors import ConfigError
from mmkd.registry import ADAPTERS, build
from mmkd.values import is_number, is_whole


@ADAPTERS.register_module()
class ConvAdapter(nn.Module):
    """One convolution from the student's channels to the teacher's, with batch norm and ReLU if wanted; keeps height and width.

    Args:
        in_channels: The student's channels; filled in from the probed shapes.
        out_channels: The teacher's channels; filled in from the probed shapes.
        kernel_size: An odd number. Default 1.
        bias: Default True.
        norm: Whether a batch norm follows, over the batch of each process, as no running statistics are needed. Default
            False.
        relu: Whether a ReLU follows. Default False.
        init_std: Initial weights from a normal distribution of this standard deviation, cut at twice it, and a bias of
            0. None (default): as torch has them.

    Raises:
        ConfigError: for a kernel that is not odd, or a deviation that is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        bias: bool = True,
        norm: bool = False,
        relu: bool = False,
        init_std: float | None = None,
    ):
        super().__init__()
        if not (is_whole(kernel_size) and kernel_size > 0 and kernel_size % 2):
            raise ConfigError(f'kernel_size={kernel_size!r}: expected an odd number, which keeps height and width')
        if init_std is not None and not (is_number(init_std) and init_std > 0):
            raise ConfigError(f'init_std={init_std!r}: expected a positive number, or None')
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels, track_running_stats=False) if norm else nn.Identity()
        self.relu = relu
        if init_std is not None:
            nn.init.trunc_normal_(self.conv.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        feature = self.norm(self.conv(feature))
        return feature.relu() if self.relu else feature


class Adapters(nn.ModuleList):
    """One adapter per level, made from probed shapes.

    Args:
        spec: ``'auto'`` makes a 1x1 convolution exactly where channels differ and resizes (bilinear) where strides
            differ; None takes the student's features as they are; a dict with ``type`` builds that adapter from
            ``mmkd.registry.ADAPTERS`` or a dotted path, given ``in_channels`` and ``out_channels``.
        student: The student's levels for one image, each (B, C, H, W).
        teacher: The teacher's levels for the same image.
        names: What to call the two in an error.
        same_channels: Whether the student's channels have to become the teacher's. Default True; where False, ``'auto'``
            only resizes.

    Raises:
        ConfigError: where the shapes cannot be made to agree.
    """

    def __init__(
        self,
        spec: str | Mapping | None,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        names: tuple[str, str] = ('student', 'teacher'),
        same_channels: bool = True,
    ):
        super().__init__()
        if spec != 'auto' and spec is not None and not (isinstance(spec, Mapping) and 'type' in spec):
            raise ConfigError(f"adapter={spec!r}: expected 'auto', None or a dict with type")
        both = f'student {names[0]!r} and teacher {names[1]!r}'
        if len(student) != len(teacher):
            raise ConfigError(f'{both} have {len(student)} and {len(teacher)} levels; tap layers with as many levels')
        self.resize = []
        for level, (s, t) in enumerate(zip(student, teacher)):
            if s.dim() != 4 or t.dim() != 4:
                raise ConfigError(
                    f'{both}: level {level} has shapes {tuple(s.shape)} and {tuple(t.shape)}; expected (B, C, H, W) maps'
                )
            if spec is None:
                adapter: nn.Module = nn.Identity()
            elif isinstance(spec, Mapping):
                adapter = build(ADAPTERS, 'adapter', spec, in_channels=s.shape[1], out_channels=t.shape[1])
            elif same_channels and s.shape[1] != t.shape[1]:
                adapter = ConvAdapter(s.shape[1], t.shape[1])
            else:
                adapter = nn.Identity()
            adapter.to(s.device)
            with torch.no_grad():
                s = adapter(s)
            if not isinstance(s, torch.Tensor) or s.dim() != 4:
                raise ConfigError(f'adapter={spec!r}: puts out no (B, C, H, W) map')
            if same_channels and s.shape[1] != t.shape[1] and isinstance(spec, Mapping):
                raise ConfigError(f'adapter={spec!r}: puts out {s.shape[1]} channels, the teacher has {t.shape[1]}')
            if same_channels and s.shape[1] != t.shape[1]:
                raise ConfigError(
                    f'{both}: level {level} has {s.shape[1]} and {t.shape[1]} channels with adapter={spec!r}; use '
                    f"adapter='auto', which adds a 1x1 convolution, or same_channels=False in a method that needs no equal ones"
                )
            if s.shape[2:] != t.shape[2:] and spec is None:
                raise ConfigError(
                    f'{both}: level {level} has size {tuple(s.shape[2:])} and {tuple(t.shape[2:])} for the same image '
                    f"(different strides) with adapter=None; use adapter='auto', which resizes, or tap other layers"
                )
            self.append(adapter)
            self.resize.append(s.shape[2:] != t.shape[2:])

    @classmethod
    def of_regions(
        cls, spec: str | Mapping | None, in_channels: int, out_channels: int, names: tuple[str, str]
    ) -> 'Adapters':
        """One adapter for features that are pooled to one size, from whatever level: ``adapters([student], [teacher])``."""
        student, teacher = torch.zeros(1, in_channels, 7, 7), torch.zeros(1, out_channels, 7, 7)
        return cls(spec, [student], [teacher], names)

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The student's levels in the teacher's shapes."""
        adapted = [adapter(level) for adapter, level in zip(self, student, strict=True)]
        return [
            F.interpolate(s, t.shape[2:], mode='bilinear', align_corners=False) if resize else s
            for s, t, resize in zip(adapted, teacher, self.resize, strict=True)
        ]

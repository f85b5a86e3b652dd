"""The heads of a segmentor, and which layers of them put out what methods compare by default."""

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.taps import INPUT

OTHERS = {'ANNHead': 'context', 'DAHead': 'conv_seg' + INPUT}
"""Where heads that use their dropout more than once have the map that they classify; of DANet's, behind it."""


def decode_head(model: nn.Module) -> nn.Module:
    """A segmentor's decode head, the last one of a cascade."""
    head = model.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


def surest(logits: torch.Tensor, threshold: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of each pixel, and its probability.

    Args:
        logits: (K, H, W); with K = 1 the one logit of two classes.
        threshold: Of the probability of the second of two classes.

    Returns:
        Probabilities and classes, (H, W) each.
    """
    if logits.shape[0] == 1:
        probability = logits[0].sigmoid()
        return torch.maximum(probability, 1 - probability), (probability > threshold).long()
    probability, labels = logits.softmax(0).max(0)
    return probability, labels


def logits_layer(model: nn.Module) -> str:
    """The layer that puts out the decode head's class logits: its classifier, ``conv_seg``, of a cascade the last one's.

    Raises:
        ConfigError: for a head without one.
    """
    return _classifier(model)[0]


def inputs_layer(model: nn.Module) -> str:
    """The layer whose maps the decode head takes in."""
    return 'backbone' if getattr(model, 'neck', None) is None else 'neck'


def feature_layer(model: nn.Module) -> str:
    """The layer whose map the decode head classifies, before its dropout.

    That is what ``decode_head.bottleneck`` puts out in PSPNet and DeepLabV3, ``sep_bottleneck`` in DeepLabV3+,
    ``fpn_bottleneck`` in UPerNet, ``fusion_conv`` in SegFormer, ``conv_cat`` or ``convs`` in FCN. mmseg's heads pass it to
    their dropout, or to their classifier where they have none, and that is where it is read:
    ``decode_head.dropout:input``.

    Raises:
        ConfigError: for a head without a classifier, ``conv_seg``.
    """
    name, head = _classifier(model)
    return name.removesuffix('conv_seg') + _classified(head)


def auxiliary_feature_layers(model: nn.Module) -> list[str]:
    """As :func:`feature_layer`, of each of the auxiliary heads; none where there are none.

    Raises:
        ConfigError: for a head without a classifier, ``conv_seg``.
    """
    heads = getattr(model, 'auxiliary_head', None)
    several = isinstance(heads, nn.ModuleList)
    found = []
    for index, head in enumerate(heads if several else [heads] if heads is not None else ()):
        name = f'auxiliary_head.{index}' if several else 'auxiliary_head'
        if not hasattr(head, 'conv_seg'):
            raise ConfigError(
                f'{type(model).__name__}: {name} is a {type(head).__name__}, which has no conv_seg from which its layer is '
                f'known; name the layers to compare'
            )
        found.append(f'{name}.{_classified(head)}')
    return found


def _classified(head: nn.Module) -> str:
    """The layer of a head that holds the map that it classifies."""
    kinds = [each.__name__ for each in type(head).__mro__ if each.__name__ in OTHERS]
    last = 'conv_seg' + INPUT if getattr(head, 'dropout', None) is None else 'dropout' + INPUT
    return OTHERS[kinds[0]] if kinds else last


def auxiliary_layer(model: nn.Module) -> str:
    """The layer that puts out the auxiliary head's class logits, its ``conv_seg``.

    Raises:
        ConfigError: for a model without an auxiliary head, or with several.
    """
    head = getattr(model, 'auxiliary_head', None)
    if hasattr(head, 'conv_seg'):
        return 'auxiliary_head.conv_seg'
    found = classifiers(model, 'auxiliary_head')
    number = len(head) if isinstance(head, nn.ModuleList) else 'no' if head is None else 'another kind of'
    raise ConfigError(
        f"{type(model).__name__} has {number} auxiliary heads, the default is 'auxiliary_head.conv_seg' of a single one; "
        f"set auxiliary_layer (the teacher's: teacher_auxiliary_layer) to {_one_of(found)}"
    )


def classifiers(model: nn.Module, part: str = '') -> list[str]:
    """The names of all classifiers of a model, or of a part of it, such as ``auxiliary_head``."""
    return [name for name, _ in model.named_modules() if name.startswith(part) and name.endswith('.conv_seg')]


def _classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """The decode head's classifier, and the head."""
    if not hasattr(model, 'decode_head'):
        raise ConfigError(f'{type(model).__name__} has no decode_head; name the layers to compare, such as layer=...')
    head = decode_head(model)
    name = f'decode_head.{len(model.decode_head) - 1}' if head is not model.decode_head else 'decode_head'
    if not hasattr(head, 'conv_seg'):
        raise ConfigError(
            f'{type(model).__name__} has a {type(head).__name__}, which has no conv_seg from which the default layer is known; '
            f"set layer (the teacher's: teacher_layer; features: feature_layer) to {_one_of(classifiers(model, 'decode_head'))}"
        )
    return f'{name}.conv_seg', head


def _one_of(layers: list[str]) -> str:
    return f'one such as {" or ".join(map(repr, layers))}' if layers else 'a module that puts out a (B, C, H, W) map'

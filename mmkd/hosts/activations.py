"""Where layers are read before the activation that ends them."""

from torch import nn

from mmkd.taps import INPUT, LAST_INPUT


def before_activation(model: nn.Module, layer: str) -> str:
    """The name by which a layer is read before its last activation; the layer's own where no activation ends it.

    Known are mmcv's ``ConvModule``, the blocks of ResNets and their kin, activations themselves, and sequences that end with
    one of these, such as a stage of a ResNet.

    Args:
        model: The network.
        layer: A dotted name. One that says already what is read (``'name:input'``), or that the model does not have, stays.

    Example:
        >>> before_activation(resnet_of_18_layers, 'layer4')
        'layer4.1.relu:last_input'
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:  # the name of no module, or with what is read of it
        return layer
    name = layer
    while True:
        if isinstance(module, nn.Sequential) and len(module):
            last = next(reversed(module._modules))
        elif hasattr(module, 'depthwise_conv') and hasattr(module, 'pointwise_conv'):
            last = 'pointwise_conv'
        else:
            break
        name, module = f'{name}.{last}', module.get_submodule(last)
    if isinstance(module, ACTIVATIONS):
        return name + INPUT
    if getattr(module, 'with_activation', False) and getattr(module, 'order', ('act',))[-1] == 'act':
        return f'{name}.activate{INPUT}'
    if hasattr(module, 'norm2') and isinstance(getattr(module, 'relu', None), ACTIVATIONS):
        return f'{name}.relu{LAST_INPUT}'  # of all that a block's activation is called for, the sum with the shortcut
    return layer


ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.GELU, nn.SiLU),
    *(nn.Hardswish, nn.Mish, nn.Sigmoid, nn.Tanh),
)

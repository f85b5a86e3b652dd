"""Adapters, and weights that change with the steps."""

from table import Accepted, Case


def adapter(name: str, value: str, expected) -> Case:
    return Case(name, expected, f'model = dict(distillers=dict(cwd=dict(adapter={value})))')


def weight(name: str, value: str, expected) -> Case:
    return Case(name, expected, f'model = dict(distillers=dict(cwd=dict(loss_weight={value})))')


CASES = [
    adapter('the string none', "'none'", r"adapter='none': expected 'auto', None or a dict with type"),
    adapter(
        'none, with other channels', 'None', r"level 0 has 16 and 24 channels with adapter=None; use adapter='auto'"
    ),
    adapter('True', 'True', r"adapter=True: expected 'auto', None or a dict"),
    adapter('a number', '24', r"adapter=24: expected 'auto', None or a dict"),
    adapter('a dict without a type', 'dict(kernel_size=3)', r"adapter=.*: expected 'auto', None or a dict with type"),
    adapter(
        'a type with a typo',
        "dict(type='ConvAdaptr')",
        r"adapter: there is no adapter 'ConvAdaptr'; the nearest are 'ConvAdapter'",
    ),
    adapter(
        'an option with a typo',
        "dict(type='ConvAdapter', kernel=3)",
        r"ConvAdapter has no option 'kernel'; .*'kernel_size'",
    ),
    adapter('an even kernel', "dict(type='ConvAdapter', kernel_size=2)", r'kernel_size=2: expected an odd number'),
    adapter('a kernel of 0', "dict(type='ConvAdapter', kernel_size=0)", r'kernel_size=0: expected an odd number'),
    adapter(
        'a kernel that is a string',
        "dict(type='ConvAdapter', kernel_size='3')",
        r"kernel_size='3': expected a whole number",
    ),
    adapter(
        'a kernel of two sides',
        "dict(type='ConvAdapter', kernel_size=(3, 3))",
        r'kernel_size=\(3, 3\): expected a whole number',
    ),
    adapter(
        'a negative deviation', "dict(type='ConvAdapter', init_std=-0.1)", r'init_std=-0.1: expected a positive number'
    ),
    adapter('a flag that is a string', "dict(type='ConvAdapter', norm='BN')", r"norm='BN': expected True or False"),
    adapter('channels that are filled in', "dict(type='ConvAdapter', out_channels=8)", r'out_channels is filled in'),
    adapter(
        'a module that puts out other channels',
        "dict(type='torch.nn.Identity')",
        r'puts out 16 channels, the teacher has 24',
    ),
    adapter('a module that cannot be imported', "dict(type='my.Adapter')", r"cannot import my for type='my.Adapter'"),
    weight('a string', "'10'", r"loss_weight='10': expected a finite number"),
    weight('NaN', "float('nan')", r'loss_weight=nan: expected a finite number'),
    weight('infinite', "float('inf')", r'loss_weight=inf: expected a finite number'),
    weight('negative', '-1.0', r'loss_weight=-1.0: value is negative; expected at least 0'),
    weight('None', 'None', r'loss_weight=None: expected a finite number'),
    weight('True', 'True', r'loss_weight=True: expected a finite number'),
    weight('a list', '[1, 2]', r'loss_weight=\[1, 2\]: expected a finite number'),
    weight('without a type', 'dict(value=1)', r'type None is unknown'),
    weight('a type with a typo', "dict(type='linaer', value=1, end=5)", r"type 'linaer' is unknown; expected one of"),
    weight(
        'an option with a typo',
        "dict(type='linear', value=1, end=5, strat=2)",
        r"linear has no option 'strat'; nearest 'start'",
    ),
    weight('no end', "dict(type='linear', value=1)", r"linear needs \['end'\]"),
    weight('no value', "dict(type='constant')", r"constant needs \['value'\]"),
    weight('an end before the begin', "dict(type='linear', value=1, begin=9, end=5)", r'end has to come after begin'),
    weight(
        'a constant that ends before it begins',
        "dict(type='constant', value=1, begin=9, end=5)",
        r'end has to come after begin',
    ),
    weight('an end that is a string', "dict(type='linear', value=1, end='5')", r'end has to be a number'),
    weight('an end of NaN', "dict(type='cosine', value=1, end=float('nan'))", r'end has to be a number'),
    weight('a begin that is negative', "dict(type='linear', value=1, begin=-5, end=5)", r'begin is negative'),
    weight('a start that is negative', "dict(type='linear', value=1, start=-1, end=5)", r'start is negative'),
    weight('a value that is negative', "dict(type='step', value=-1, milestones=[5])", r'value is negative'),
    weight(
        'milestones that are strings',
        "dict(type='step', value=1, milestones=['5'])",
        r'milestones has to be a list of iterations',
    ),
    weight(
        'milestones that are a number',
        "dict(type='step', value=1, milestones=5)",
        r'milestones has to be a list of iterations',
    ),
    weight(
        'a gamma that is a string',
        "dict(type='step', value=1, milestones=[5], gamma='0.1')",
        r'gamma has to be a number',
    ),
    # what is right
    adapter('a convolution', "dict(type='ConvAdapter', kernel_size=3, relu=True)", Accepted('as documented')),
    weight('a schedule', "dict(type='cosine', value=5, end=1e3)", Accepted('as documented')),
    weight(
        'a schedule longer than the training',
        "dict(type='linear', value=5, end=100000)",
        Accepted('as for a shorter trial'),
    ),
]

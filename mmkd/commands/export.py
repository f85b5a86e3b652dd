"""Write the plain student: a checkpoint and a config that stock mmdet, mmseg and mmdeploy take.

    mmkd export configs/gid_retinanet.py work_dirs/gid_retinanet/epoch_24.pth student

writes ``student.pth``, exactly the plain model's weights and what the checkpoint says of the data (class names, palette),
and ``student.py``, the config without teacher, distillers and what only they need. (mmseg's ``MMSegInferencer`` draws
Cityscapes' names whatever the checkpoint says, unless it is given ``classes`` and ``palette``.)
"""

import argparse
from pathlib import Path

import torch
from mmengine.registry import init_default_scope

from mmkd import checks, cli
from mmkd.errors import ConfigError
from mmkd.hosts.configs import build_model, plain_model
from mmkd.hosts.plain import data_meta, plain_config
from mmkd.weights import dataset_meta, fetch, load_weights, plain_weights, read_file


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the plain student: checkpoint and config.')
    parser.add_argument('config', help='the distilled config')
    parser.add_argument('checkpoint', help='a checkpoint of its training')
    parser.add_argument('output', type=Path, help='what to write, without suffix')
    cli.add_common_options(parser)
    args = parser.parse_args()
    with cli.clear_errors(args.debug):
        config = cli.read_config(args)
        if 'student' not in config.model:
            raise ConfigError(f'{args.config}: not a distilled model (model has no student); it can be used as it is')
        weights, settings = (args.output.with_name(args.output.name + suffix) for suffix in ('.pth', '.py'))
        checks.check_folder(str(weights.parent), 'output')
        for path in (weights, settings):
            if path.exists():
                raise ConfigError(f'{path} exists; remove it, or choose another name')
        checks.check_names(config, ())
        init_default_scope(config.get('default_scope', 'mmengine'))
        model = build_model(plain_model(config))
        load_weights(model, args.checkpoint, 'checkpoint')
        checkpoint = fetch(args.checkpoint, 'checkpoint')
        content = read_file(checkpoint, 'checkpoint')
        plain, left = plain_config(config, [name for name, _ in model.named_parameters()])
        state = plain_weights(content, checkpoint, 'checkpoint')
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save({'state_dict': state, 'meta': {'dataset_meta': dataset_meta(content) or data_meta(plain)}}, weights)
        plain.dump(settings)
    print(f'{weights} and {settings} are a plain {plain.model.type}')
    if left:
        print(f'{", ".join(left)} of {settings} still need mmkd')

"""Write the plain student: a checkpoint and a config that stock mmdet, mmseg and mmdeploy take.

    python tools/export.py configs/gid_retinanet.py work_dirs/gid_retinanet/epoch_24.pth student

writes ``student.pth``, weights alone and exactly the plain model's keys, and ``student.py``, the config
without teacher and distillers.
"""

import argparse
import copy
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope

from mmkd import cli
from mmkd.errors import ConfigError
from mmkd.hosts.configs import plain_model
from mmkd.weights import fetch, load_weights, read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the plain student: checkpoint and config.')
    parser.add_argument('config', help='the distilled config')
    parser.add_argument('checkpoint', help='a checkpoint of its training')
    parser.add_argument('output', type=Path, help='what to write, without suffix')
    cli.add_common_options(parser)
    args = parser.parse_args()
    with cli.clear_errors():
        config = cli.read_config(args)
        if 'student' not in config.model:
            raise ConfigError(f'{args.config}: not a distilled model (model has no student); it can be used as it is')
        config.model = plain_model(config)
        weights, plain_config = (args.output.with_name(args.output.name + suffix) for suffix in ('.pth', '.py'))
        for path in (weights, plain_config):
            if path.exists():
                raise ConfigError(f'{path} exists; remove it, or choose another name')
        init_default_scope(config.default_scope)
        # a copy, as mmseg changes what it builds from
        load_weights(MODELS.build(copy.deepcopy(config.model)), args.checkpoint, 'checkpoint')
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save({'state_dict': read_checkpoint(fetch(args.checkpoint, 'checkpoint'), 'checkpoint')}, weights)
        for key in ('launcher', 'work_dir'):
            config.pop(key)
        config.dump(plain_config)
    print(f'{weights} and {plain_config} are a plain {config.model.type}')


if __name__ == '__main__':
    main()

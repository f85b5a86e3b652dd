"""Write the plain student: a checkpoint and a config that stock mmdet, mmseg and mmdeploy take.

    mmkd export configs/gid_retinanet.py work_dirs/gid_retinanet/epoch_24.pth student

writes ``student.pth``, exactly the plain model's weights and what the checkpoint says of the data (class names, palette),
and ``student.py``, the config without teacher, distillers and what only they need. (mmseg's ``MMSegInferencer`` draws
Cityscapes' names whatever the checkpoint says, unless it is given ``classes`` and ``palette``.)

    mmkd export configs/streets/dml_pspnet.py work_dirs/dml_pspnet/iter_600.pth peer --source peer

writes the peer that was trained along in the student's place, and alike an average or a snapshot of the student.

--onnx and --torch-export write student.onnx and student.pt2 besides, of segmentors and one-stage detectors, for images of
one size. They take images as the model's data_preprocessor gives them, float32 of (N, 3, H, W), and put out
  of a segmentor   logits, (N, classes, H, W)
  of a detector    the head's own maps, one for each level: cls_score_0, ..., bbox_pred_0, ... and, if there is one,
                   centerness_0, ...; where the head decodes as most do (RetinaNet, FCOS, ATSS, GFL, ...) also boxes,
                   (N, priors, 4), in pixels, and scores, (N, priors, classes), both before any threshold and NMS
Each file is read again and compared with torch; one that differs is not kept. All files are written, or none.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmkd import checks, cli
from mmkd.errors import ConfigError
from mmkd.hosts import deploy
from mmkd.hosts.configs import build_model, plain_model, source_model
from mmkd.hosts.plain import data_meta, plain_config
from mmkd.weights import dataset_meta, fetch, load_weights, plain_weights, read_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='the distilled config; with --onnx or --torch-export also a plain one')
    parser.add_argument('checkpoint', help='a checkpoint of its training')
    parser.add_argument('output', type=Path, help='what to write, without suffix')
    parser.add_argument(
        '--source',
        metavar='NAME',
        help='write what the student learnt from, a Peer, an Average or a Snapshot of this name',
    )
    parser.add_argument('--onnx', action='store_true', help="write OUTPUT.onnx; needs pip install 'mmkd[onnx]'")
    parser.add_argument('--torch-export', action='store_true', help='write OUTPUT.pt2, for torch.export.load')
    parser.add_argument(
        '--check', action='store_true', help='read the written config and checkpoint again, and compare them, too'
    )
    parser.add_argument(
        '--input-shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images for --onnx, --torch-export, --check; default: as the test pipeline resizes them, or as the '
        'first validation image is',
    )
    parser.add_argument('--opset', type=int, metavar='N', help="of ONNX's operators; default: what torch takes")
    cli.add_common_options(parser)
    args = parser.parse_args()
    forms = [form for form in deploy.SUFFIXES if getattr(args, form)]
    if args.input_shape and min(args.input_shape) < 1:
        parser.error(f'--input-shape: expected two sizes of at least 1, but got {args.input_shape}')
    with cli.clear_errors(args.debug):
        config = cli.read_config(args)
        if 'student' not in config.model and (args.source or not forms):
            raise ConfigError(f'{args.config}: not a distilled model (model has no student); it can be used as it is')
        for form in forms:
            deploy.needs(form)
        checks.check_folder(str(args.output.parent), 'output')
        suffixes = ['.pth', '.py', *(deploy.SUFFIXES[form] for form in forms)]
        written = {suffix: args.output.with_name(args.output.name + suffix) for suffix in suffixes}
        for path in written.values():
            if path.exists():
                raise ConfigError(f'{path} exists; remove it, or choose another name')
        checks.check_names(config, ())
        init_default_scope(config.get('default_scope', 'mmengine'))
        described = source_model(config, args.source) if args.source else plain_model(config)
        model = build_model(described).eval()
        load_weights(model, args.checkpoint, 'checkpoint', source=args.source)
        checkpoint = fetch(args.checkpoint, 'checkpoint')
        content = read_file(checkpoint, 'checkpoint')
        plain, left = plain_config(config, [name for name, _ in model.named_parameters()], described)
        state = plain_weights(content, checkpoint, 'checkpoint', args.source)
        meta = dataset_meta(content) or data_meta(plain)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.parent, prefix='.export') as folder:
            made = {suffix: Path(folder) / path.name for suffix, path in written.items()}
            torch.save({'state_dict': state, 'meta': {'dataset_meta': meta}}, made['.pth'])
            plain.dump(made['.py'])
            said = []
            if forms or args.check:
                validation = deploy.validation_image(plain, model)
                size = tuple(args.input_shape or deploy.input_size(plain, validation))
                images = deploy.check_images(size, validation)
            for form in forms:
                graph, path = deploy.Deployed(model, size, f'--{form.replace("_", "-")}'), made[deploy.SUFFIXES[form]]
                compared = deploy.write(form, graph, path, images, args.opset)
                if form == 'onnx':
                    deploy.describe_onnx(path, deploy.about(plain.model, meta))
                said.append(f'{written[deploy.SUFFIXES[form]]}, for {size[0]} x {size[1]} pixels: {compared}')
                said.append(f'  outputs: {", ".join(graph.outputs)}')
            if args.check:
                again = build_model(Config.fromfile(made['.py']).model).eval()
                load_weights(again, str(made['.pth']), 'what was written,')
                compared = deploy.compare_models(model, again, images)
                said.append(f'{written[".pth"]} and {written[".py"]}, read again: {compared}')
            for suffix, path in written.items():
                made[suffix].rename(path)
    print(f'{written[".pth"]} and {written[".py"]} are a plain {plain.model.type}')
    if left:
        print(f'{", ".join(left)} of {written[".py"]} still need mmkd')
    print('\n'.join(said), end='\n' if said else '')

"""Arguments of tools/train.py."""

from table import Accepted, Case

C = '--cfg-options'


def changes(name: str, change: str, expected) -> Case:
    """A case of ``--cfg-options`` alone."""
    return Case(name, expected, options=(C, *change.split()))


CASES = [
    Case('nothing at all', r'required: config', arguments=()),
    Case('config given twice', r'unrecognized arguments: config.py', options=('config.py',)),
    Case('unknown option', r'unrecognized arguments: --workdir x', options=('--workdir', 'x')),
    Case('an option of another tool', r'unrecognized arguments: --seed 1', options=('--seed', '1')),
    Case('unknown launcher', r'invalid choice: .torchrun.', options=('--launcher', 'torchrun')),
    Case('a local rank that is no number', r'invalid int value', options=('--local-rank', 'a')),
    Case(
        'pytorch without torchrun',
        r'--launcher pytorch: RANK, .*not set in the environment; start with torchrun',
        options=('--launcher', 'pytorch'),
    ),
    Case(
        'slurm without srun',
        r'--launcher slurm: SLURM_PROCID, .*not set in the environment',
        options=('--launcher', 'slurm'),
    ),
    Case(
        'mpi without mpirun', r'--launcher mpi: OMPI_\w+, .*not set in the environment', options=('--launcher', 'mpi')
    ),
    Case('mixed precision on a CPU', r'--amp: mmengine trains in mixed', options=('--amp',)),
    Case('scaling without a base', r'--auto-scale-lr: the config has no', 'auto_scale_lr = None', ('--auto-scale-lr',)),
    Case('config that is not there', r'config conf.py: no such file .* the nearest are', arguments=('conf.py',)),
    Case('config of mmkd with a typo', r"the nearest are .*'gid_retinanet.py'", arguments=('mmkd::gid_retinanett.py',)),
    Case(
        'config of mmkd without a suffix', r"the nearest are .*'gid_retinanet.py'", arguments=('mmkd::gid_retinanet',)
    ),
    Case('config is a folder', r'config data: no such file', arguments=('data',)),
    Case('config is a checkpoint', r'config teacher.pth: not a config', arguments=('teacher.pth',)),
    Case('config is an image', r'config masks/images/000.png: not a config', arguments=('masks/images/000.png',)),
    Case('no equals sign', r"expected KEY=VALUE, found 'train_cfg.max_iters'", options=(C, 'train_cfg.max_iters')),
    Case('a value without a key', r"expected KEY=VALUE, found '=5'", options=(C, '=5')),
    Case('the config after the changes', r'expected KEY=VALUE, found .config.py', arguments=(C, 'a=1', 'config.py')),
    Case('a list that spaces cut up', r'Imbalanced brackets', options=(C, 'model.distillers.cwd.layer=[neck,', 'a]')),
    changes('typo at the top', 'modle.student=1', r"--cfg-options modle.student: .*the nearest are 'model.student'"),
    changes('typo in optim_wrapper', 'optim_wraper.optimizer.lr=1', r"the nearest are 'optim_wrapper.optimizer.lr'"),
    changes('a learning rate by its name alone', 'lr=1', r"--cfg-options lr: .*'optim_wrapper.optimizer.lr'"),
    changes('a batch size by its name alone', 'batch_size=1', r"batch_size: .*'train_dataloader.batch_size'"),
    changes('a seed by its name alone', 'seed=1', r"--cfg-options seed: there is no such key.*'randomness.seed'"),
    changes('iterations by their name alone', 'max_iters=9', r"'train_cfg.max_iters'"),
    changes('typo of a whole part', 'train_dataloder.batch_size=1', r"'train_dataloader.batch_size'"),
    changes('a key with a dot too many', 'train_cfg..max_iters=1', r'expected names between dots'),
    changes(
        'typo in the optimizer',
        'optim_wrapper.optimiser.lr=1',
        r"OptimWrapper has no option 'optimiser'; .*'optimizer'",
    ),
    changes(
        'typo of an option of the optimizer', 'optim_wrapper.optimizer.momentun=1', r"SGD has no option 'momentun'"
    ),
    changes('typo in the loop', 'train_cfg.max_iter=1', r"IterBasedTrainLoop has no option 'max_iter'; .*'max_iters'"),
    changes('an epoch for a loop of iterations', 'train_cfg.max_epochs=1', r"has no option 'max_epochs'"),
    changes(
        'typo in the loader',
        'train_dataloader.bach_size=1',
        r"train_dataloader has no entry 'bach_size'; .*'batch_size'",
    ),
    changes('typo of the workers', 'val_dataloader.num_worker=1', r"has no entry 'num_worker'; .*'num_workers'"),
    changes(
        'typo in the data set',
        'train_dataloader.dataset.dataroot=x',
        r"CocoDataset has no option 'dataroot'; .*'data_root'",
    ),
    changes('typo in the randomness', 'randomness.sed=1', r"randomness has no entry 'sed'; .*'seed'"),
    changes('typo in the environment', 'env_cfg.cudnn_benchmrk=1', r"env_cfg has no entry .*'cudnn_benchmark'"),
    changes(
        'typo in clip_grad', 'optim_wrapper.clip_grad.maxnorm=1', r"clip_grad has no entry 'maxnorm'; .*'max_norm'"
    ),
    changes(
        'typo in paramwise_cfg', 'optim_wrapper.paramwise_cfg.x=1', r"paramwise_cfg has no entry 'x'; the nearest are"
    ),
    changes(
        'typo of a hook',
        'default_hooks.chekpoint.interval=1',
        r"default_hooks has no entry 'chekpoint'; .*'checkpoint'",
    ),
    changes("typo of a hook's option", 'default_hooks.checkpoint.intervall=1', r"no entry 'intervall', but 'interval'"),
    changes('typo in auto_scale_lr', 'auto_scale_lr.enabled=1', r"auto_scale_lr has no entry 'enabled'; .*'enable'"),
    changes("typo in a distiller's name", 'model.distillers.cdw.tau=1', r"has no entry 'cdw'; the nearest are 'cwd'"),
    changes("typo in a distiller's option", 'model.distillers.cwd.taau=1', r"CWD has no option 'taau'; .*'tau'"),
    changes('distillers without s', 'model.distiller.cwd.tau=1', r"distill has no option 'distiller'; .*'distillers'"),
    changes('typo in the student', 'model.student.bbox_hed.num_classes=1', r"RetinaNet has no option 'bbox_hed'"),
    changes('typo in the head', 'model.student.bbox_head.num_class=1', r"RetinaHead has no option 'num_class'"),
    changes('typo in test_cfg', 'model.student.test_cfg.score_th=0.1', r"no entry 'score_th', but 'score_thr'"),
    changes('typo in the teacher', 'model.teacher.checkpont=x', r"Teacher has no option 'checkpont'; .*'checkpoint'"),
    changes('a place in a list that is not there', 'param_scheduler.7.end=2', r'param_scheduler is a list of 1;'),
    changes(
        'a name in a list', 'param_scheduler.end=2', r'param_scheduler is a list of 1; its entries are counted from 0'
    ),
    changes('a place in a tuple', 'train_dataloader.dataset.metainfo.classes.0=x', r'is a tuple, whose entries'),
    changes(
        'a whole entry of a list',
        'train_dataloader.dataset.pipeline.0=x',
        r'an entry of a list cannot be changed as a whole',
    ),
    changes(
        'a number in a list',
        'model.student.data_preprocessor.std.2=5',
        r'give all of model.student.data_preprocessor.std',
    ),
    changes('a type of None', 'model.student.neck.type=None', r'model.student.neck: it names no class; give it a type'),
    changes('an optimizer that is a number', 'optim_wrapper=0.5', r'optim_wrapper=0.5: expected a dict'),
    changes(
        'an interval that is a string',
        'default_hooks.checkpoint.interval=x',
        r"checkpoint.interval='x': expected a whole number",
    ),
    changes(
        'a flag that is a string',
        'train_dataloader.sampler.shuffle=x',
        r"train_dataloader.sampler.shuffle='x': expected True or False",
    ),
    changes('a hook that is a number', 'default_hooks.logger=5', r'default_hooks.logger=5: expected a dict'),
    changes('a model that is a number', 'model=5', r'model=5: expected a dict'),
    changes(
        'a root that is a number', 'train_dataloader.dataset.data_root=5', r'dataset.data_root=5: expected a string'
    ),
    changes(
        'classes that are a number',
        'val_dataloader.dataset.metainfo=5',
        r'val_dataloader.dataset.metainfo=5: expected a dict',
    ),
    changes(
        'class names that are numbers',
        'train_dataloader.dataset.metainfo.classes=[1,2]',
        r'metainfo.classes.0=1: expected a string',
    ),
    changes(
        'a folder that is a list',
        'train_dataloader.dataset.data_prefix.img=[a,b]',
        r'data_prefix.img=.*: expected a string',
    ),
    changes(
        'a pipeline that is a string', 'train_dataloader.dataset.pipeline=x', r"dataset.pipeline='x': expected a list"
    ),
    changes(
        'an evaluator that is a string', 'val_evaluator=CocoMetric', r"val_evaluator='CocoMetric': expected a dict"
    ),
    changes(
        "a teacher's config that is a number", 'model.teacher.config=0.5', r'teacher config=0.5: expected|config=0.5'
    ),
    changes('a scope that is a list', 'default_scope=[a]', r'default_scope=.*: expected a string'),
    changes('an entry of a number', 'train_cfg.max_iters.x=1', r'train_cfg.max_iters is 4, which has no entry'),
    changes(
        'an entry of None', 'model.student.bbox_head.x.y=1', r"student: RetinaNet cannot be built; TypeError: .*'x'"
    ),
    Case(
        'a variable that other entries were written with',
        r'data_root: the config uses it only to write other entries.*train_dataloader.dataset.data_root',
        "data_root = 'data'",
        (C, 'data_root=/elsewhere'),
    ),
    Case(
        'classes in a variable',
        r'metainfo.classes: the config uses it only to write other .*change those: .*train_dataloader.dataset.metainfo.classes',
        "metainfo = dict(classes=('circle', 'square', 'triangle', 'star', 'ring', 'cross'))",
        (C, "metainfo.classes=('a','b')"),
    ),
    changes('an option of a plain model', 'model.teacher.config=x', Accepted('a teacher may be named there'))._replace(
        expected=r'model.teacher.config: .* trains a plain model, which has no teacher', base='plain.py'
    ),
    changes('a teacher of None', 'model.teacher.checkpoint=None', r'model.teacher: no checkpoint for RetinaNet'),
    # what is right
    changes('a seed', 'randomness.seed=3 randomness.deterministic=True', Accepted('read by the Runner')),
    changes('workers', 'train_dataloader.num_workers=0', Accepted('read by the loader')),
    changes("a hook's interval", 'default_hooks.checkpoint.interval=2', Accepted('the hook is there')),
    changes(
        'an environment',
        'env_cfg.cudnn_benchmark=True env_cfg.mp_cfg.opencv_num_threads=1',
        Accepted('read by the Runner'),
    ),
    changes('scaling', 'auto_scale_lr.enable=False', Accepted('read by the Runner')),
    changes(
        'an option of a class that the config does not give', 'model.distillers.cwd.match=index', Accepted('a default')
    ),
    changes(
        'another optimizer',
        'optim_wrapper.optimizer.type=RMSprop optim_wrapper.optimizer.alpha=0.9',
        Accepted('by the new type'),
    ),
    changes('a new distiller', 'model.distillers.at.type=AT model.distillers.at.layer=neck', Accepted('it has a type')),
    changes("hooks of one's own", 'custom_hooks=[]', Accepted('read by the Runner')),
    changes(
        'an entry of test_cfg unlike all others',
        'model.student.test_cfg.with_nms=True',
        Accepted('nobody knows who reads it'),
    ),
    Case("a setting for one's own code", Accepted('a hook may read it'), 'my_setting = 1', (C, 'my_setting=2')),
    changes('a work directory', 'work_dir=elsewhere', Accepted('read by the Runner')),
    changes('synchronized norms', 'sync_bn=torch', Accepted('read by the Runner beside its arguments')),
]

"""One table of mistakes: each gets exit code 2 and one line with what is wrong and the way out, and changes no file."""

import shlex
import sys
from pathlib import Path

import pytest
import torch
from command_line import FIT, TINY_VIT, refused, tiny_clip

from kshot.cli import main
from kshot.config import read_command_line
from kshot.layering import options_below
from kshot.settings import MEANT, OPTIONS, laid, settings

QUICK = "--trainer.max_epochs 1 --data.shots 1 --trainer.enable_progress_bar false --run.test false"
BASE = ["--config", "clip_16shot.yaml", *QUICK.split()]

# What is typed after a whole experiment: what the line must name, and the way out that it must offer.
NAMES = {
    "--lr 3": ("--lr", "--model.optimizer.lr?"),
    "--learning-rate 3": ("--learning-rate", "--model.optimizer.lr?"),
    "--learning_rate 3": ("--learning_rate", "--model.optimizer.lr?"),
    "--epochs 3": ("--epochs", "--trainer.max_epochs?"),
    "--epoch 3": ("--epoch", "--trainer.max_epochs?"),
    "--num_epochs 3": ("--num_epochs", "--trainer.max_epochs?"),
    "--ephocs 3": ("--ephocs", "--trainer.max_epochs?"),
    "--max_epochs 3": ("--max_epochs", "--trainer.max_epochs?"),
    "--steps 3": ("--steps", "--trainer.max_steps?"),
    "--shots 3": ("--shots", "--data.shots?"),
    "--shott 3": ("--shott", "--data.shots?"),
    "--k 3": ("--k", "--data.shots?"),
    "--rank 3": ("--rank", "--model.adapter.rank?"),
    "--lora_r 3": ("--lora_r", "--model.adapter.rank?"),
    "--lora-alpha 3": ("--lora-alpha", "--model.adapter.alpha?"),
    "--dropout 0.1": ("--dropout", "--model.adapter.dropout?"),
    "--batch_size 3": ("--batch_size", "--data.batch_size?"),
    "--batch-size 3": ("--batch-size", "--data.batch_size?"),
    "--bs 3": ("--bs", "--data.batch_size?"),
    "--seed 3": ("--seed", "--seed_everything?"),
    "--random_seed 3": ("--random_seed", "--seed_everything?"),
    "--dataset dtd": ("--dataset", "--data.dataset?"),
    "--data_dir x": ("--data_dir", "--data.root?"),
    "--device cuda": ("--device", "--trainer.accelerator?"),
    "--gpus 1": ("--gpus", "--trainer.devices"),
    "--precision 16": ("--precision", "--trainer.precision?"),
    "--fp16 true": ("--fp16", "--trainer.precision?"),
    "--amp true": ("--amp", "--trainer.precision?"),
    "--output x": ("--output", "--run.root?"),
    "--out_dir x": ("--out_dir", "--run.root?"),
    "--output-dir x": ("--output-dir", "--run.root?"),
    "--exp_name x": ("--exp_name", "--run.name?"),
    "--resume x": ("--resume x", "there is no x/config.yaml"),
    "--checkpoint x": ("--checkpoint", "--ckpt_path?"),
    "--backbone ViT-B-16": ("--backbone", "--model.backbone.model?"),
    "--arch ViT-B-16": ("--arch", "--model.backbone.model?"),
    "--resolution 224": ("--resolution", "--model.backbone.image_size?"),
    "--optimizer SGD": ("--optimizer", "--model.optimizer?"),
    "--optim SGD": ("--optim", "--model.optimizer?"),
    "--scheduler x": ("--scheduler", "--model.schedule?"),
    "--warmup 3": ("--warmup", "--model.schedule.warmup_steps?"),
    "--wd 0.1": ("--wd", "--model.optimizer.weight_decay?"),
    "--weight-decay 0.1": ("--weight-decay", "--model.optimizer.weight_decay?"),
    "--adapter LoRA": ("--adapter", "--model.adapter?"),
    "--classifier CoOp": ("--classifier", "--model.classifier?"),
    "--method lora": ("--method", "--config?"),
    "--workers 2": ("--workers", "--data.num_workers?"),
    "--templates x": ("--templates", "--data.template?"),
    "--augmentation x": ("--augmentation", "--data.augment?"),
    "--grad_clip 1": ("--grad_clip", "--trainer.gradient_clip_val?"),
    "--n_ctx 4": ("--n_ctx", "--model.classifier.context_length?"),
    "--xyzzy 1": ("--xyzzy", "There are: budget, candidates, ckpt_path, data, model"),
    "--optimizer.lr 1": ("--optimizer", "--model.optimizer?"),
    "--modle.adapter.rank 1": ("--modle", "--model?"),
    "--top_k 3": ("--top_k", "it is one of predict"),
    "--images x": ("--images", "it is one of predict"),
    "--file x": ("--file", "it is one of import"),
    "--trainer.max_epoch 3": ("'max_epoch'", "--trainer.max_epochs."),
    "--trainer.epochs 3": ("'epochs'", "--trainer.max_epochs."),
    "--trainer.lr 3": ("'lr'", "--model.optimizer.lr?"),
    "--trainer.precison 16": ("'precison'", "--trainer.precision."),
    "--trainer.xyzzy 3": ("'xyzzy'", "There are: accelerator"),
    "--data.split-seed 3": ("'split-seed'", "--data.split_seed."),
    "--data.Shots 3": ("'Shots'", "--data.shots."),
    "--data.shot 3": ("'shot'", "--data.shots."),
    "--data.batchsize 3": ("'batchsize'", "--data.batch_size."),
    "--data.data_root x": ("'data_root'", "--data.root."),
    "--model.lr 3": ("'lr'", "--model.optimizer.lr?"),
    "--model.rank 3": ("'rank'", "--model.adapter.rank?"),
    "--model.adaptor LoRA": ("'adaptor'", "--model.adapter."),
    "--model.adapter.rnak 3": ("'rnak'", "--model.adapter.rank."),
    "--model.adapter.r 3": ("'r'", "--model.adapter.rank."),
    "--model.adapter.lora-alpha 3": ("'lora-alpha'", "--model.adapter.alpha."),
    "--model.adapter.target_rank 3": ("'target_rank'", "It is one of AdaLoRA: choose by --model.adapter"),
    "--model.classifier.C 3": ("'C'", "It is one of LogisticProbe"),
    "--model.optimizer.momentum 0.9": ("'momentum'", "SGD: choose by --model.optimizer"),
    "--model.optimizer.learning_rate 3": ("'learning_rate'", "--model.optimizer.lr."),
    "--model.optimizer.weight-decay 3": ("'weight-decay'", "--model.optimizer.weight_decay."),
    "--model.schedule.T_max 3": ("'T_max'", "It is one of CosineAnnealingLR"),
    "--model.schedule.warmup 3": ("'warmup'", "--model.schedule.warmup_steps."),
    "--model.backbone.imagesize 32": ("'imagesize'", "--model.backbone.image_size."),
    "--model.backbone.pool avg": ("'pool'", "It is one of Timm"),
    "--model.backbone.xyzzy avg": ("'xyzzy'", "There are: features, image_size, model, pretrained"),
    "--run.dir x": ("'dir'", "--run.root."),
    "--run.rot x": ("'rot'", "--run.root."),
    "--help=x": ("--help", "takes no value"),
    "--print_config=true": ("--print_config", "takes no value"),
    "-lr 3": ("'-lr'", "options start with --"),
    "--data.shots 4 extra": ("'extra'", "options start with --"),
    "data.shots=4": ("'data.shots=4'", "options start with --"),
    "--data.shots": ("--data.shots", "needs a value"),
}  # fmt: skip

NUMBERS = {
    "--model.optimizer.lr nan": ("model.optimizer.lr is nan", "a positive number"),
    "--model.optimizer.lr .nan": ("model.optimizer.lr is .nan", "a positive number"),
    "--model.optimizer.lr inf": ("model.optimizer.lr is inf", "a positive number"),
    "--model.optimizer.lr .inf": ("model.optimizer.lr is .inf", "a positive number"),
    "--model.optimizer.lr -1e-3": ("model.optimizer.lr is -1e-3", "a positive number"),
    "--model.optimizer.lr 0": ("model.optimizer.lr is 0", "a positive number"),
    "--model.optimizer.lr fast": ("model.optimizer.lr", "Expected float"),
    "--model.optimizer.lr []": ("model.optimizer.lr", "Expected float"),
    "--model.head_lr -1": ("model.head_lr is -1", "a positive number"),
    "--model.head_lr .nan": ("model.head_lr is .nan", "a positive number"),
    "--model.optimizer.weight_decay -0.1": ("model.optimizer.weight_decay is -0.1", "0 or more"),
    "--model.optimizer.weight_decay .inf": ("model.optimizer.weight_decay is .inf", "0 or more"),
    "--seed_everything -1": ("seed_everything is -1", "4294967295"),
    "--seed_everything 4294967296": ("seed_everything is 4294967296", "4294967295"),
    "--seed_everything 18446744073709551616": ("seed_everything is 18446744073709551616", "4294967295"),
    "--seed_everything 1.5": ("seed_everything", "Expected bool or int"),
    "--seed_everything one": ("seed_everything", "Expected bool or int"),
    "--trainer.max_epochs 0": ("trainer.max_epochs is 0", "1 or more"),
    "--trainer.max_epochs -2": ("trainer.max_epochs is -2", "1 or more"),
    "--trainer.max_epochs .inf": ("trainer.max_epochs is .inf", "1 or more"),
    "--trainer.max_epochs 1.5": ("trainer.max_epochs", "Expected int or null"),
    "--trainer.max_epochs -1": ("no end", "--trainer.max_epochs or --trainer.max_steps"),
    "--trainer.max_epochs -1 --trainer.max_time 00:00:01:00": ("no end", "--trainer.max_epochs or --trainer.max_steps"),
    "--trainer.max_steps 0": ("trainer.max_steps is 0", "1 or more"),
    "--trainer.min_epochs -1": ("trainer.min_epochs is -1", "1 or more"),
    "--trainer.accumulate_grad_batches 0": ("trainer.accumulate_grad_batches is 0", "1 or more"),
    "--trainer.accumulate_grad_batches -2": ("trainer.accumulate_grad_batches is -2", "1 or more"),
    "--trainer.limit_train_batches 0.0": ("trainer.limit_train_batches is 0.0", "a share above 0"),
    "--trainer.limit_train_batches 0": ("trainer.limit_train_batches is 0", "a share above 0"),
    "--trainer.limit_train_batches -1": ("trainer.limit_train_batches is -1", "a share above 0"),
    "--trainer.limit_train_batches 1.5": ("trainer.limit_train_batches is 1.5", "a share above 0"),
    "--trainer.limit_val_batches -1": ("trainer.limit_val_batches is -1", "a share from 0"),
    "--trainer.limit_test_batches 0": ("trainer.limit_test_batches is 0", "a share above 0"),
    "--trainer.limit_test_batches -0.5": ("trainer.limit_test_batches is -0.5", "a share above 0"),
    "--trainer.overfit_batches -1": ("trainer.overfit_batches is -1", "a share from 0"),
    "--trainer.val_check_interval 0": ("trainer.val_check_interval is 0", "a share above 0"),
    "--trainer.val_check_interval -1": ("trainer.val_check_interval is -1", "a share above 0"),
    "--trainer.val_check_interval .nan": ("trainer.val_check_interval is .nan", "a share above 0"),
    "--trainer.check_val_every_n_epoch -1": ("trainer.check_val_every_n_epoch is -1", "0 or more"),
    "--trainer.gradient_clip_val -1": ("trainer.gradient_clip_val is -1", "0 or more"),
    "--trainer.gradient_clip_val .nan": ("trainer.gradient_clip_val is .nan", "0 or more"),
    "--trainer.gradient_clip_algorithm foo": ("foo", "'value', 'norm'"),
    "--trainer.log_every_n_steps -1": ("trainer.log_every_n_steps is -1", "0 or more"),
    "--trainer.num_sanity_val_steps -5": ("trainer.num_sanity_val_steps is -5", "-1 for all"),
    "--trainer.num_nodes 0": ("trainer.num_nodes is 0", "1 or more"),
    "--trainer.fast_dev_run -1": ("trainer.fast_dev_run is -1", "0 or more"),
    "--trainer.devices 0": ("trainer.devices is 0", "or auto"),
    "--trainer.devices -2": ("trainer.devices is -2", "or auto"),
    "--trainer.devices 1000": ("trainer.devices is 1000", "or auto"),
    "--trainer.devices two": ("trainer.devices is 'two'", "or auto"),
    "--trainer.max_time tomorrow": ("trainer.max_time is 'tomorrow'", "00:02:30:00"),
    "--trainer.max_time 12": ("trainer.max_time is '12'", "00:02:30:00"),
    "--trainer.max_time -1:00:00:00": ("trainer.max_time is '-1:00:00:00'", "00:02:30:00"),
    "--trainer.max_time 99999999999:00:00:00": ("trainer.max_time is '99999999999:00:00:00'", "00:02:30:00"),
    "--trainer.max_time '{days: .inf}'": ("trainer.max_time.days is inf", "lie in 0 to 10000"),
    "--trainer.max_time '{days: 99999999999}'": ("trainer.max_time.days", "lie in 0 to 10000"),
    "--trainer.max_time []": ("is given []", "weeks, days, hours"),
    "--trainer.max_steps 100000000000000000000000": ("trainer.max_steps is 1000", "1 or more"),
    "--trainer.accumulate_grad_batches 1000000000000": ("trainer.accumulate_grad_batches", "below two billions"),
    "--data.batch_size 1000000000000": ("data.batch_size is 1000", "below two billions"),
    "--data.views 1000000000000": ("data.views is 1000", "below two billions"),
    "--model.backbone.text_memory_gb .nan": ("model.backbone.text_memory_gb is .nan", "finite"),
    "--model.backbone.text_memory_gb 0": ("text_memory_gb", "not a positive number"),
    "--trainer.max_time '{fortnights: 3}'": ("fortnights", "weeks, days, hours"),
    "--run.save_every -1": ("run.save_every is -1", "0 or more"),
    "--run.save_every .nan": ("run.save_every is .nan", "0 or more"),
    "--run.save_every .inf": ("run.save_every is .inf", "0 or more"),
    "--data.shots 0": ("shots", "at least 1"),
    "--data.shots -1": ("shots", "at least 1"),
    "--data.shots many": ("data.shots", "Expected int or null"),
    "--data.shots 1e3": ("data.shots", "Expected int or null"),
    "--data.batch_size 0": ("batch_size", "at least 1"),
    "--data.num_workers -1": ("num_workers", "at least 0"),
    "--data.num_workers 100000": ("data.num_workers is 100000", "at most"),
    "--data.views 0": ("views", "at least 1"),
    "--data.split_seed 18446744073709551616": ("data.split_seed", "lie in 0 to"),
    "--model.backbone.image_size -32": ("image_size -32", "use 8"),
    "--model.adapter.rank 1.5": ("model.adapter.rank", "Expected int"),
    "--model.adapter.dropout 1": ("dropout is 1", "lie in [0, 1)"),
    "--model.optimizer.betas '[2, 3]'": ("model.optimizer: AdamW", "Invalid beta parameter"),
    "--model.optimizer.eps -1": ("model.optimizer: AdamW", "Invalid epsilon value"),
    "--model.optimizer SGD --model.optimizer.nesterov true": ("model.optimizer: SGD", "requires a momentum"),
    "--model.schedule.warmup_steps -1": ("warmup_steps is -1", "0 or more"),
}

THERE = {
    "--trainer.accelerator gpu": ("trainer.accelerator is gpu", "auto or cpu"),
    "--trainer.accelerator cuda": ("trainer.accelerator is cuda", "auto or cpu"),
    "--trainer.accelerator mps": ("trainer.accelerator is mps", "auto or cpu"),
    "--trainer.accelerator tpu": ("trainer.accelerator is tpu", "auto or cpu"),
    "--trainer.accelerator xyz": ("trainer.accelerator is xyz", "auto or cpu"),
    "--trainer.devices [0,0]": ("trainer.devices is [0, 0]", "how many, or auto"),
    "--trainer.strategy ddpp": ("'ddpp'", "Did you mean 'ddp'?"),
    "--trainer.strategy nope": ("'nope'", "There are: auto, ddp"),
    "--trainer.strategy dp": ("'dp'", "Did you mean 'ddp'?"),
    "--trainer.strategy fsdp": ("trainer.strategy is fsdp", "ddp. Less memory take --trainer.precision bf16-true"),
    "--trainer.strategy fsdp_cpu_offload": ("trainer.strategy is fsdp_cpu_offload", "--trainer.strategy ddp"),
    "--trainer.strategy deepspeed": ("trainer.strategy is deepspeed", "the whole backbone"),
    "--trainer.strategy deepspeed_stage_3": ("trainer.strategy is deepspeed_stage_3", "the whole backbone"),
    "--trainer.strategy xla": ("trainer.strategy is xla", "the whole backbone"),
    "--trainer.strategy FSDPStrategy": ("trainer.strategy is FSDPStrategy", "--trainer.strategy ddp"),
    "--trainer.strategy FSDPStrateg": ("trainer.strategy: there is no 'FSDPStrateg'", "ddp"),
    "--trainer.strategy '{class_path: FSDPStrategy}'": ("trainer.strategy is FSDPStrategy", "--trainer.strategy ddp"),
    "--trainer.strategy '{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 2}}'": (
        "trainer.strategy is ModelParallelStrategy",
        "the whole backbone",
    ),
    "--trainer.strategy '{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {start_method: fork}}'": (
        "trainer.strategy is DDPStrategy",
        "end with what they learnt",
    ),
    "--trainer.strategy ddp_spawn --trainer.devices 2": ("trainer.strategy is ddp_spawn", "--trainer.strategy ddp"),
    "--trainer.strategy ddp_fork": ("trainer.strategy is ddp_fork", "end with what they learnt"),
    "--trainer.strategy ddp_notebook": ("trainer.strategy is ddp_notebook", "end with what they learnt"),
    "--trainer.precision 12": ("trainer.precision", "16-mixed or bf16-true or bf16-mixed"),
    "--trainer.profiler foo": ("profiler", "simple"),
    "--trainer.logger WandbLogger": ("WandbLogger cannot be made", "pip install -U 'wandb"),
    "--trainer.logger MLFlowLogger": ("MLFlowLogger cannot be made", "pip install -U 'mlflow"),
    "--trainer.logger CometLogger": ("CometLogger cannot be made", "pip install -U 'comet-ml"),
    "--trainer.logger '[{class_path: WandbLogger}]'": ("WandbLogger cannot be made", "pip install -U 'wandb"),
    "--trainer.callbacks '{class_path: Timer, init_args: {duration: soon}}'": ("Timer cannot be made", "DD:HH:MM:SS"),
    "--trainer.callbacks '{class_path: EarlyStopping, init_args: {monitor: val/acc, mode: up}}'": ("up", "min, max"),
    "--trainer.callbacks '{class_path: ModelCheckpoint, init_args: {save_top_k: -5}}'": ("save_top_k=-5", ">= -1"),
    "--trainer.callbacks '{class_path: StochasticWeightAveraging, init_args: {swa_lrs: -1}}'": ("swa_lrs", "positive"),
    "--trainer.logger NopeLogger": ("'NopeLogger'", "CSVLogger"),
    "--trainer.callbacks EarlyStoping": ("'EarlyStoping'", "Did you mean 'EarlyStopping'?"),
    "--trainer.callbacks EarlyStopping": ("trainer.callbacks.monitor is missing", "give --trainer.callbacks.monitor"),
    "--trainer.callbacks '{class_path: EarlyStopping, init_args: {monitor: nope}}'": ("watches 'nope'", "val/acc"),
    "--trainer.callbacks '[{class_path: ModelCheckpoint, init_args: {monitor: val_loss}}]'": ("'val_loss'", "val/acc"),
    "--model.optimizer SGDD": ("'SGDD'", "Did you mean 'SGD'?"),
    "--model.optimizer null": ("model.optimizer", "Expected"),
    "--model.schedule Cosine": ("'Cosine'", "CosineAnnealingLR"),
    "--model.schedule StepLR": ("model.schedule.step_size is missing", "give --model.schedule.step_size"),
    "--model.schedule StepLR --model.schedule.step_size 0": ("model.schedule.step_size is 0", "1 or more"),
    "--model.schedule OneCycleLR": ("model.schedule.max_lr is missing", "give --model.schedule.max_lr"),
    "--model.schedule OneCycleLR --model.schedule.max_lr 1 --model.schedule.pct_start 2": ("OneCycleLR", "pct_start"),
    "--model.schedule CosineAnnealingLR --model.schedule.T_max -3": ("model.schedule.T_max is -3", "0 for all"),
    "--model.schedule ReduceLROnPlateau --model.schedule.factor 2": ("ReduceLROnPlateau", "Factor should be < 1"),
    "--model.adapter LoRAA": ("'LoRAA'", "Did you mean 'LoRA'?"),
    "--model.adapter 3": ("model.adapter", "Expected Adapter or null"),
    "--model.targets []": ("model.targets is empty", "*.[qkv]"),
    "--model null": ("model", "Expected FewShotModule"),
    "--trainer null": ("trainer is 'null'", "a mapping of settings"),
    "--model.adapter ./lora.py": ("'./lora.py'", "Did you mean 'LoRA'?"),
    "--model.adapter no.such.Class": ("takes an Adapter", "there is no module 'no'"),
    "--data.augment Foo": ("'Foo'", "CropFlip"),
    "--data.protocol foo": ("data.protocol", "base-to-new"),
    "--data.sampler foo": ("'foo'", "coop-v1"),
    "--data.dataset digts": ("digts", "Did you mean 'digits'?"),
    "--data.dataset nope.csv": ("nope.csv", "neither here nor"),
    "--data.dataset ''": ("data.dataset is ''", "a folder or a file"),
    "--data.manifest nope.json": ("nope.json", "no such file"),
    "--data.manifest ''": ("data.manifest is ''", "the name of a file"),
    "--data.root ''": ("data.root is ''", "the name of a folder"),
    "--data.template '{0.__class__} {}'": ("{0.__class__} {}", "have {} once"),
    "--data.template '{} {}'": ("{} {}", "have {} once"),
    "--data.template ''": ("''", "have {} once"),
    "--data.template hello": ("hello", "have {} once"),
    "--data.class_names [a]": ("1 class_names", "10 of digits"),
    "--run.name ../esc": ("run.name is '../esc'", "below run.root"),
    "--run.name ../../esc": ("run.name is '../../esc'", "below run.root"),
    "--run.name a/../../b": ("run.name is 'a/../../b'", "below run.root"),
    "--run.name /tmp/esc": ("run.name is '/tmp/esc'", "below run.root"),
    r"--run.name 'a\..\..\b'": ("run.name is", "below run.root"),
    "--run.name .": ("run.name is '.'", "below run.root"),
    "--run.name ''": ("run.name is ''", "below run.root"),
    "--run.name 'a\nb'": ("run.name is 'a\\nb'", "below run.root"),
    "--run.name 'a\x1b[2Jb'": ("run.name is 'a\\x1b[2Jb'", "below run.root"),
    f"--run.name {300 * 'x'}": ("run.name is 'xxx", "below run.root"),
    "--run.root ''": ("run.root is ''", "the name of a folder"),
    "--run.root 'a\nb'": ("run.root is 'a\\nb'", "the name of a folder"),
    "--run.test maybe": ("run.test", "Expected bool"),
    "--ckpt_path ''": ("ckpt_path is ''", "the name of a file"),
    "--ckpt_path best": ("best", "There is no checkpoint"),
    "--ckpt_path last": ("last", "There is no checkpoint"),
    "--config no_such": ("'no_such'", "clip_16shot.yaml"),
    "--config ''": ("no config ''", "clip_16shot.yaml"),
    f"--config {5000 * 'x'}": ("There is no config", "clip_16shot.yaml"),
    "--model.backbone.model kshot:glyph": ("kshot:glyph", "Did you mean 'kshot:glyph_clip'?"),
    " ".join(TINY_VIT): ("TextPrompt needs a text tower", "test_vit has none"),
}  # fmt: skip

CONFIGS = {  # contents of a config that is laid over a whole experiment
    "utf-16": ("run: {name: x}\n".encode("utf-16"), "is in UTF-16", "save it as UTF-8"),
    "utf-16 without a mark": ("run: {name: é}\n".encode("utf-16-be"), "is in UTF-16", "save it as UTF-8"),
    "latin-1": ("run: {name: é}\n".encode("latin-1"), "cannot be read as UTF-8", "save it as UTF-8"),
    "empty": (b"", "holds no settings", "model: or data:"),
    "comments": (b"# nothing\n\n", "holds no settings", "model: or data:"),
    "null": (b"null\n", "holds no settings", "model: or data:"),
    "a list": (b"- model\n", "is no mapping", "model: or data:"),
    "twice": (b"run: {name: a, name: b}\n", "'name' stands twice", "line 1"),
    "twice at the top": (b"run: {name: a}\nrun: {name: b}\n", "'run' stands twice", "line 2"),
    "tabs": (b"run:\n\tname: a\n", "no valid YAML", "line 2"),
    "open": (b"run: [\n", "no valid YAML", "line"),
    "lr": (b"lr: 1e-3\n", "'--lr'", "--model.optimizer.lr?"),
    "nested": (b"model: {init_args: {adapter: {init_args: {rnak: 3}}}}\n", "'rnak'", "--model.adapter.rank."),
    "epochs": (b"trainer: {epochs: 3}\n", "'epochs'", "--trainer.max_epochs."),
    "rate": (b"model: {init_args: {optimizer: {init_args: {lr: .inf}}}}\n", "model.optimizer.lr is inf", "positive"),
    "zero byte": (b'run: {root: "a\\0b"}\n', "run.root", "no zero byte"),
    "zero byte in data": (b'data: {init_args: {dataset: "a\\0b"}}\n', "data.dataset", "no zero byte"),
    "name": (b"run: {name: ../x}\n", "run.name is '../x'", "below run.root"),
    "not a word": (b"data: {init_args: {shots: [4]}}\n", "data.shots", "Expected int or null"),
}
COMMANDS = {  # whole command lines
    "fit": ("model.backbone is missing", "start from an experiment"),
    "fit --config methods/lora.yaml": ("methods/lora.yaml", "--config clip_16shot.yaml --config methods/lora.yaml"),
    "fit -c methods/coop": ("methods/coop", "--config clip_16shot.yaml --config methods/coop"),
    "fit --data.shots 4": ("model.backbone is missing", "--config clip_16shot.yaml"),
    "fit --model.backbone OpenClip": ("model.backbone.model is missing", "give --model.backbone.model a value"),
    "fit --model.backbone OpenClip --model.backbone.model kshot:glyph_clip": ("data.dataset is missing", "--config"),
    "test --config clip_16shot.yaml": ("has learnt nothing yet", "--ckpt_path"),
    "predict --run runs --top_k 0 --images x": ("top_k is 0", "1 or more"),
    "predict --run runs --top_k -1 --images x": ("top_k is -1", "1 or more"),
    "predict --run runs --images x --topk 3": ("--topk", "'--top-k'?"),
    "predict --run runs --images x --batch-size 0": ("batch_size is 0", "1 or more"),
    "predict --run runs --images x --config y": ("'--config'", "There are: "),
    "predict --run runs --images 'x*.png'": ("'x*.png'", "no image or folder matches"),
    "predict --run runs": ("predict: ", "--images"),
    "import --config clip_16shot.yaml": ("import needs --file", "model.pth.tar-200"),
    "import --config clip_16shot.yaml --file ''": ("file is ''", "the name of a file"),
    "fitt --config clip_16shot.yaml": ("'fitt'", "Did you mean 'fit'?"),
    "docter": ("'docter'", "Did you mean 'doctor'?"),
    "train --config clip_16shot.yaml": ("'train'", "fit"),
    "--config clip_16shot.yaml": ("'--config'", "fit"),
}
TYPED = {**NAMES, **NUMBERS, **THERE}
ROWS = {
    **{text: (["fit", *BASE, *shlex.split(text)], named, way) for text, (named, way) in TYPED.items()},
    **{text: (shlex.split(text), named, way) for text, (named, way) in COMMANDS.items()},
    **{f"a config: {name}": (["fit", *BASE, "--config", "own.yaml"], *rest[1:]) for name, rest in CONFIGS.items()},
}
NO_GPU = "accelerator", "devices"


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which a run lies already."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "runs" / "clip_16shot" / "001").mkdir(parents=True)
    (folder / "runs" / "clip_16shot" / "001" / "result.json").write_text("{}")
    return folder


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}: {row[:60]!r}" for i, row in enumerate(ROWS)])
def test_a_mistake_gets_one_line_and_changes_nothing(row, place, capsys, monkeypatch):
    if torch.cuda.is_available() and any(word in row for word in NO_GPU):
        pytest.skip("this machine has what the row asks for")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if row.startswith("a config: "):
        Path("own.yaml").write_bytes(CONFIGS[row.removeprefix("a config: ")][0])
    arguments, named, way = ROWS[row]
    before = files(place)
    line = refused(capsys, arguments)
    assert named in line
    assert way in line
    assert len(line) < 600
    assert line.isprintable(), "no escape codes"
    assert files(place) == before


def test_the_table_is_long():
    assert len(ROWS) >= 150


def test_every_word_for_an_option_stands_once_and_leads_to_an_option_that_exists():
    words = [word for words in MEANT.values() for word in words.split()]
    assert sorted(words) == sorted(set(words))
    lines = [["--config", "clip_16shot.yaml"], ["--config", "clip_16shot.yaml", "--config", "methods/coop.yaml"]]
    known = {"config"}
    for line in lines:
        known |= {name for name, _, _ in options_below(*laid(read_command_line(["fit", *line], list(OPTIONS))))}
    meant = {part.strip("-") for option in MEANT for part in option.split(" or ")}
    assert meant - known == {"model.schedule.warmup_epochs"} - known


def test_printing_a_config_asks_nothing_of_the_machine(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", *BASE, "--trainer.accelerator", "tpu", "--print_config"])
    assert end.value.code == 0
    assert "accelerator: tpu" in capsys.readouterr().out


def notes(*words: str) -> list[str]:
    line = read_command_line(["fit", "--config", "clip_16shot.yaml", *words], list(OPTIONS))
    settings(line)
    return line.notes


@pytest.mark.parametrize("name", ["SGD", "torch.optim.AdamW"])
def test_a_rate_left_open_is_not_carried_into_another_optimizer(name):
    line = read_command_line(["fit", "--config", "clip_16shot.yaml", "--model.optimizer", name], list(OPTIONS))
    _, tree = settings(line)
    assert tree["model"]["init_args"]["optimizer"]["init_args"] == {"weight_decay": 0.01}


def test_an_adapter_at_the_rate_of_a_method_without_one_is_told():
    maple = ["--config", "methods/maple.yaml"]
    (note,) = notes(*maple, "--model.adapter", "LoRA")
    assert note.startswith("LoRA trains with the optimizer of methods/maple.yaml")
    assert "SGD, lr 0.05" in note
    assert "--model.optimizer.lr" in note
    assert len(notes(*maple, "--config", "methods/lora.yaml")) == 1
    for words in (
        [],
        maple,
        ["--config", "methods/dora.yaml"],
        ["--config", "methods/linear_probe.yaml", "--model.adapter", "LoRA"],  # at LoRA's own
        [*maple, "--model.adapter", "LoRA", "--model.optimizer.lr", "1e-3"],
        ["--config", "methods/zero_shot.yaml", "--model.adapter", "LoRA"],
    ):
        assert notes(*words) == []


@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "LinearLR", "OneCycleLR", "StepLR", "ExponentialLR"])
def test_torchs_schedules_run_from_the_command_line(schedule, tmp_path):
    needed = {"StepLR": ["step_size", "5"], "OneCycleLR": ["max_lr", "1e-2"], "ExponentialLR": ["gamma", "0.9"]}
    options = [part if i % 2 else f"--model.schedule.{part}" for i, part in enumerate(needed.get(schedule, []))]
    main(["fit", *BASE, *tiny_clip(), "--model.schedule", schedule, *options, "--run.root", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*/tuned.safetensors"))) == 1


def test_a_template_with_signs_that_mean_something_elsewhere_is_a_template(tmp_path):
    main(["fit", *BASE, *tiny_clip(), "--data.template", "100%s {}", "--run.root", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*/tuned.safetensors"))) == 1


def test_nodes_are_not_waited_for_unless_something_started_them(capsys, monkeypatch):
    command = [*FIT, "--trainer.num_nodes", "2"]
    assert "nothing says where the others are, for which this one would wait" in refused(capsys, command)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert settings(read_command_line(command, list(OPTIONS)))


def test_a_callback_whose_default_is_no_plain_word_can_be_kept_in_a_config():
    _, tree = settings(read_command_line([*FIT, "--trainer.callbacks", "Timer"], list(OPTIONS)))
    assert tree["trainer"]["callbacks"]["init_args"] == {"interval": "step"}

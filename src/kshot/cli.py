"""The command line: its start without torch, and how it ends: with a result, one line for a mistake, or interrupted."""

from __future__ import annotations

import sys
import time

STARTED = time.time()
USAGE = """\
usage: python main.py {fit,validate,test,predict,import} --config NAME [--config METHOD ...] [options]
       python main.py doctor [--json]

  fit       adapt a backbone from a few images a class, then test it
  validate  accuracy on the few validation images
  test      accuracy on the test split, of a checkpoint with --ckpt_path
  predict   label any images: --images FOLDER_OR_FILES, writes a CSV
  import    turn a file that CoOp or CLIP-LoRA released into a checkpoint: --file FILE
  doctor    say what is installed, what this machine has and whether a small run works

examples:
  python main.py fit --config clip_16shot.yaml
  python main.py fit --config clip_16shot.yaml --data.shots 4 --model.adapter.rank 4
  python main.py fit --config clip_16shot.yaml --config methods/coop.yaml
  python main.py test --config clip_16shot.yaml --ckpt_path runs/clip_16shot/001/tuned.safetensors
  python main.py predict --config clip_16shot.yaml --ckpt_path ... --images photos/
  python main.py import --config recipes/clip_lora.yaml --file lora_weights.pt

'python main.py fit --help' lists the options of kshot, and 'fit --help-all' all of them. A name given to --config is a
path, or a file in configs/."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends with one line and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if given in ([], ["-h"], ["--help"]):  # answered without torch
        print(USAGE)
        return
    from kshot.errors import UserError
    from kshot.lean import load_lightning

    try:
        load_lightning()
        from kshot.commands import run

        run(given, STARTED)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise  # not the one with which Lightning ends a fit that was interrupted
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # raised again unless a UserError is behind it
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # jsonargparse wraps what a constructor raises
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(2) from None

"""The command line: its start without torch, and how it ends: with a result, one line for a mistake, or by a signal."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STARTED = time.time()
USAGE = """\
usage: python main.py {fit,validate,test,import} --config NAME [--config METHOD ...] [options]
       python main.py predict --run RUN --images IMAGES ... [--out FILE]
       python main.py data {list,info,check,split,import,download,store} ... [--json]
       python main.py runs [FOLDER] | compare RUN RUN [RUN ...] | show RUN | push RUN ORG/NAME ...
       python main.py export RUN --format {merged,peft,torch,onnx,openvino} [options]
       python main.py sweep --config STUDY [options] | worker STUDY
       python main.py doctor [--json]

  fit       adapt a backbone from a few images a class, then test it
  validate  accuracy on the few validation images
  test      accuracy on the test split, of a checkpoint with --ckpt_path
  predict   label any images by a run, as CSV, JSON lines or Parquet; its data set may be gone
  import    turn files of CoOp, CLIP-LoRA, MaPLe, PromptSRC, Tip-Adapter or PEFT into a checkpoint: --file FILE
  data      list, check, divide or download data sets: 'data check photos/' finds broken files, duplicates and leaks
  runs      list runs and choose among them: --method, --data, --shots, --min-acc, --since
  compare   differences of runs on the same images, with McNemar's test, class by class
  show      a page about a run: confusions, errors, calibration, what it looks at, how features lie
  export    write a run for other libraries, and try what was written: a whole model, an adapter of PEFT, a program
  push      put a run on Hugging Face's hub, with a model card
  sweep     run a study: methods x data sets x shots x seeds, by several processes; again, it goes on
  worker    work on a study that sweep has planned: one process more, here or on a machine that shares the folder
  doctor    say what is installed, what this machine has and whether a small run works

examples:
  python main.py fit --config clip_16shot.yaml
  python main.py fit --config clip_16shot.yaml --data.shots 4 --model.adapter.rank 4
  python main.py fit --config clip_16shot.yaml --config methods/coop.yaml
  python main.py fit --resume runs/clip_16shot/001
  python main.py test --config clip_16shot.yaml --ckpt_path runs/clip_16shot/001/tuned.safetensors
  python main.py predict --run runs/clip_16shot/001 --images photos/ --out labels.csv
  python main.py import --config recipes/clip_lora.yaml --file lora_weights.pt

'python main.py fit --help' lists the options of kshot, and 'fit --help-all' all of them. A name given to --config is a
path, or a file in configs/."""

FAULT = "This is a fault of kshot, not of yours: please report it with all of these lines, as README.md says."


class Ended(BaseException):
    """A signal ended the process: no Exception, so that nobody on the way takes it for a fault of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end what runs inside as an exception, so that files are closed; once: a second one kills.

    Elsewhere than in the main thread, which alone hears of signals, it does nothing.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in ends]

    def end(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    here = threading.current_thread() is threading.main_thread()
    try:
        if here:
            for number in ends:
                signal.signal(number, end)
        yield
    finally:
        if here:
            for number, handler in zip(ends, before, strict=True):
                signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Ends with 0, or one line and 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM. Any other exception is a
    fault of kshot: it leaves with its traceback, which makes 1.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given in ([], ["-h"], ["--help"]):  # answered without torch
        print(USAGE)
        return
    from kshot.config import PROGRAMS
    from kshot.errors import user_error_behind
    from kshot.lean import load_lightning

    try:
        with ending_on_signals():
            load_lightning()
            if given[0] in PROGRAMS:
                module, _, program = PROGRAMS[given[0]].partition(":")
                raise SystemExit(getattr(importlib.import_module(module), program)(given[1:]))
            from kshot.commands import run

            run(given, STARTED)
    except (Ended, KeyboardInterrupt) as end:
        number = end.number if isinstance(end, Ended) else signal.SIGINT
        what = "interrupted." if number == signal.SIGINT else "ended by SIGTERM."
        print(" ".join([what, *getattr(end, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(128 + number) from None
    except Exception as error:  # raised again unless a UserError is behind it
        cause = user_error_behind(error)
        if cause is None:
            error.add_note(FAULT)
            raise
        print(" ".join([f"error: {cause}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(2) from None

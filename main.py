"""``python main.py fit --config clip_16shot.yaml``, equal to the console script ``kshot``."""

if __name__ == "__main__":
    import sys

    if not sys.flags.safe_path:
        del sys.path[0]  # this folder: a file in it, such as tensorboard.py, is not what a library means by that name
    from kshot.cli import main

    main()

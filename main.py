"""``python main.py fit --config clip_16shot.yaml``, equal to the console script ``kshot``."""

from kshot.cli import main

if __name__ == "__main__":
    main()

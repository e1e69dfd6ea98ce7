"""``python -m kshot.studies STUDY``: a worker, as engines start it."""

import sys

from kshot.cli import main

if __name__ == "__main__":
    main(["worker", *sys.argv[1:]])

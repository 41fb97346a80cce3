"""Runs the experiment: python scripts/experiments/prediction --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the repository, so that scripts.* is found

from scripts.experiments.prediction.measure import main

if __name__ == '__main__':
    main()

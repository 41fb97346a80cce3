"""What the repository runs and is not installed with the package: demo, examples, data sets, releases, experiments."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def evidence(docs: Path) -> tuple[Path, Path]:
    """Folder of the results (json, csv, png) and folder of the pages that show them; both exist afterwards."""
    folders = docs / 'results', docs / 'pages' / 'evidence'
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders

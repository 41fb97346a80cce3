"""Pushes every staged release whose content differs from what is on the Hub.

python scripts/releases/publish.py --namespace USER --dry-run     # which files, and what changes in the tables
HF_TOKEN=... python scripts/releases/publish.py --namespace USER
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

from scripts import ROOT
from timm_cascade import ReleaseError, hub
from timm_cascade.hub.download import Repository
from timm_cascade.hub.release import MAX_TABLE


def table_diff(folder: Path, repo: str) -> str:
    """Lines of thresholds.json that a push would change, as a unified diff."""
    staged = folder / hub.TABLE
    new = staged.read_text(encoding='utf-8').splitlines() if staged.is_file() else []
    try:
        repository = Repository(repo)
        repository.refresh(hub.CONFIG, MAX_TABLE)  # the newest commit, not the one in the cache
        there = repository.path(hub.TABLE, MAX_TABLE)
    except ReleaseError:  # not on the Hub yet
        there = None
    old = there.read_text(encoding='utf-8').splitlines() if there else []
    return '\n'.join(difflib.unified_diff(old, new, f'{repo}/{hub.TABLE}', str(staged), lineterm='', n=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a release could not be pushed; the others are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='releases; all that are staged by default')
    parser.add_argument('--namespace', required=True, help='user or organisation on the Hub')
    parser.add_argument('--releases', type=Path, default=ROOT / 'hub' / 'releases', help='where releases are staged')
    parser.add_argument('--private', action='store_true', help='for repositories that are made')
    parser.add_argument('--create-pr', action='store_true', help='open pull requests')
    parser.add_argument('--dry-run', action='store_true', help='print the differences, push nothing')
    args = parser.parse_args(argv)
    staged = sorted(p.parent for p in args.releases.glob(f'*/{hub.CONFIG}'))
    missing = set(args.names) - {p.name for p in staged}
    if missing:
        parser.error(f'{", ".join(sorted(missing))} not staged in {args.releases}')
    failed = 0
    for folder in [p for p in staged if not args.names or p.name in args.names]:
        repo = f'{args.namespace}/{folder.name}'
        try:
            if args.dry_run:
                differing = hub.compare(folder, repo)
                print(f'{repo}: {", ".join(differing) if differing else "no difference"}')
                if hub.TABLE in differing:
                    print(table_diff(folder, repo))
            else:
                done = hub.push_to_hub(folder, repo, private=args.private, create_pr=args.create_pr)
                print(f'{repo}: {done.pull_request or done.url if done.files else "no difference"}')
        except ReleaseError as e:
            failed = 1
            print(f'{repo}: {e}', file=sys.stderr)
    return failed


if __name__ == '__main__':
    sys.exit(main())

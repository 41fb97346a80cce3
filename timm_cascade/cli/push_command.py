"""timm-cascade push: uploads a release to the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from .. import hub
from .options import Commands, output_options

__all__ = ['add_command', 'run']


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    push = commands.add_parser('push', parents=[output_options()], help='upload a release to the Hub')
    push.add_argument('folder')
    push.add_argument('repo', metavar='user/repo')
    push.add_argument('--private', action='store_true', help='Make a repository that is new a private one.')
    push.add_argument('--revision', help='Branch.')
    push.add_argument('--create-pr', action='store_true', help='Open a pull request.')
    push.add_argument('--tag', help='Git tag for the commit.')
    push.add_argument('--message', help='Message of the commit.')
    push.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; returns what it prints."""
    done = hub.push_to_hub(
        args.folder,
        args.repo,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        commit_message=args.message,
    )
    return dict(commit=done.url, files=list(done.files), pull_request=done.pull_request)

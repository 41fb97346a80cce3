"""timm-cascade serve: answers images over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import hub
from ..serving.decode import Limits
from ..serving.service import Service
from .options import Commands, dial_options, turn_dial

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ['add_command', 'app_from_environment', 'run']

OPTIONS = 'TIMM_CASCADE_SERVE'  # environment variable: what each of several processes serves
TOKEN = 'TIMM_CASCADE_TOKEN'
HELP = {
    'image_bytes': 'size of an encoded image',
    'pixels': 'width times height of an image',
    'queue': 'requests that wait for an answer; more are refused with 503',
    'held_bytes': 'bytes of all requests that are being received',
    'body_seconds': 'time in which a request must have arrived',
    'answer_seconds': 'time in which an answer must be there',
}


def add_command(commands: Commands) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser('serve', parents=[dial_options()], help='answer images over HTTP')
    parser.add_argument('where', metavar='FOLDER|REPO', help='the release')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 for all interfaces (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, help='0 finds a free one (default: %(default)s)')
    parser.add_argument('--max-batch', type=int, default=32, help='images that go through the network together')
    parser.add_argument(
        '--max-wait', type=float, default=0.0, metavar='SECONDS', help='time that a request waits for others'
    )
    parser.add_argument('--workers', type=int, default=1, help='processes, each with the model')
    parser.add_argument(
        '--device',
        nargs='+',
        help='such as cpu or cuda:1; with several, each process takes one; by default a GPU where there is one',
    )
    parser.add_argument('--threads', type=int, help="threads of one process; by default the machine's, divided")
    parser.add_argument('--compile', action='store_true', help='compile the stages first')
    parser.add_argument('--token-file', help=f'file with the bearer token to ask for; or set {TOKEN}')
    parser.add_argument('--drain-seconds', type=float, default=30.0, help='time for the last answers after SIGTERM')
    limits = parser.add_argument_group('limits')
    for field in fields(Limits):
        kind = float if field.name.endswith('seconds') else int
        name = '--' + field.name.replace('_', '-')
        limits.add_argument(name, type=kind, default=field.default, help=f'{HELP[field.name]} (default: %(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to stop."""
    try:
        from ..serving import server
    except ImportError as e:
        raise OSError(f'serve needs a few packages ({e}): pip install "timm-cascade[serve]"') from e
    if args.workers < 1 or not 0 <= args.port < 65536 or (args.threads is not None and args.threads < 1):
        raise ValueError(f'workers={args.workers}, port={args.port}, threads={args.threads} cannot be.')
    token = _token(args.token_file)
    options = {k: v for k, v in vars(args).items() if k not in ('run', 'token_file', 'command')}
    gpus = [f'cuda:{i}' for i in range(min(args.workers, torch.cuda.device_count()))]
    options['device'] = args.device or gpus or ['cpu']
    options['threads'] = args.threads or max(1, torch.get_num_threads() // args.workers)
    with server.bind(args.host, args.port) as bound:
        one = args.workers == 1
        # what cannot be served is refused before any process starts
        service = _service(options if one else {**options, 'device': ['cpu'], 'compile': False})
        host, port = bound.getsockname()[:2]
        print(
            f'{service.model.pretrained_cfg["architecture"]} on http://{f"[{host}]" if ":" in host else host}:{port}',
            file=sys.stderr,
            flush=True,
        )
        if one:
            server.run(_app(service, options, token), bound, drain_seconds=args.drain_seconds)
            return
        del service
        os.environ[OPTIONS] = json.dumps(options)
        if token is not None:
            os.environ[TOKEN] = token
        server.run(f'{__name__}:app_from_environment', bound, args.workers, args.drain_seconds)


def app_from_environment() -> Starlette:
    """The application in one of several processes."""
    options = json.loads(os.environ[OPTIONS])
    return _app(_service(options), options, os.environ.get(TOKEN))


def _service(options: dict[str, Any]) -> Service:
    from ..serving.server import claim

    torch.set_num_threads(options['threads'])
    limits = Limits(**{field.name: options[field.name] for field in fields(Limits)})
    model = hub.load(options['where']).eval()
    turn_dial(model, options['max_drop'], options['rule'], options['level'])
    model.to(claim(options['device']))
    if options['compile']:
        model.compile(batch_sizes=(options['max_batch'],))
    return Service(model, options['max_drop'], limits)


def _app(service: Service, options: dict[str, Any], token: str | None) -> Starlette:
    from ..serving.app import create_app

    return create_app(service, options['max_batch'], options['max_wait'], token)


def _token(file: str | None) -> str | None:
    token = Path(file).read_text(encoding='utf-8').strip() if file is not None else os.environ.get(TOKEN)
    if token is not None and (not token or not token.isascii()):
        raise ValueError(f'the token of {file or TOKEN} is empty or not ASCII.')
    return token

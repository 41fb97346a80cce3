"""A Python process that has imported timm, and runs each program it is given in a fork of itself.

Importing timm takes seconds of CPU time. A test that needs a process with nothing of ours in it, or with other caches,
needs that only once per session then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SERVE = """
import json, os, signal, sys, traceback
import timm, torch

print('ready', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 0
    try:
        signal.alarm(job['timeout'])
        for number, path in ((1, job['stdout']), (2, job['stderr'])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(job['cwd'])
        os.environ.clear()
        os.environ.update(job['env'])
        sys.argv = ['-c']
        exec(compile(job['code'], '<program>', 'exec'), {'__name__': '__main__'})
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)  # as python does
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


class Interpreter:
    """Runs programs as `python -c` would, in `env`: what modules read when they are imported stays the same for all."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env = folder, dict(env)
        self.process: subprocess.Popen[str] | None = None

    def run(
        self, code: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs `code` with these further variables; where there is no fork, in a process of its own."""
        env = {**self.env, **(env or {})}
        if not hasattr(os, 'fork'):
            return subprocess.run(
                [sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=cwd, timeout=timeout
            )
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, '-c', SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.env,
                cwd=self.folder,
            )
            assert self.process.stdout.readline() == 'ready\n'
        out, err = self.folder / 'stdout', self.folder / 'stderr'
        job = dict(code=code, cwd=str(cwd), env=env, timeout=timeout, stdout=str(out), stderr=str(err))
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()

"""A Python process that has imported timm, and runs each program it is given in a fork of itself.

Importing timm takes seconds of CPU time. A test that needs a process with nothing of ours in it, or with other caches,
needs that only once per session then. Tests that do not look at what is imported get a fork that has imported all of
ours, too.
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

def serve(jobs, answers, ours=None):
    for line in jobs:
        job = json.loads(line)
        if job['ours'] and ours is None:  # only asked of the first process: the other one is never told
            ours = with_ours()
        if job['ours']:
            ours[0].write(json.dumps({**job, 'ours': False}) + '\\n')
            ours[0].flush()
            answer = int(ours[1].readline())
        elif child := os.fork():
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            work(job)
        print(answer, file=answers, flush=True)

def with_ours():
    (jobs, tell), (listen, answers) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(tell), os.close(listen)
        import timm_cascade.cli.main, timm_cascade.hub, timm_cascade.measure, timm_cascade.prediction
        import timm_cascade.exporters, timm_cascade.serving.service, timm_cascade.training
        import accelerate, scipy.optimize, scipy.special
        serve(os.fdopen(jobs), os.fdopen(answers, 'w'))
        os._exit(0)
    os.close(jobs), os.close(answers)
    return os.fdopen(tell, 'w'), os.fdopen(listen)

def work(job):
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

print('ready', flush=True)
serve(sys.stdin, sys.stdout)
os._exit(0)  # taking all modules down takes seconds, too
"""


class Interpreter:
    """Runs programs as `python -c` would, in `env`: what modules read when they are imported stays the same for all."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env = folder, dict(env)
        self.process: subprocess.Popen[str] | None = None

    def run(
        self, code: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 300, ours: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs `code` with these further variables; where there is no fork, in a process of its own.

        With `ours` the process has imported all of timm_cascade already.
        """
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
        job = dict(code=code, cwd=str(cwd), env=env, timeout=timeout, stdout=str(out), stderr=str(err), ours=ours)
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()

"""`timm-cascade serve` under load, beside its plain backbone, and with clients that misbehave; killed predictions.

Called by measure.py. Server and clients share this machine's cores. The plain backbone is the same release with all
exits closed, behind the same server.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import timm_cascade
from scripts import ROOT
from scripts.experiments.benchmark.plain import forced, observe
from timm_cascade.serving.service import Service

RELEASE = ROOT / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
SAMPLES = ROOT / 'hub' / 'samples' / 'fashion_mnist_test.parquet'
CLIENTS = 8
LIMIT = 2_000_000  # bytes of an image


class Server:
    """`timm-cascade serve` in a process of its own, on a free port of the loopback interface."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [
            sys.executable,
            '-m',
            'timm_cascade',
            'serve',
            str(folder),
            '--port',
            '0',
            '--threads',
            '1',
            *options,
        ]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.port = next(int(line.rsplit(':', 1)[1]) for line in self.process.stderr if 'http://127.0.0.1:' in line)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        while True:
            try:
                if self.ask('GET', '/ready')[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=120)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def mebibytes(self) -> float:
        """Resident memory."""
        line = next(
            x for x in Path(f'/proc/{self.process.pid}/status').read_text(encoding='utf-8').splitlines() if 'VmRSS' in x
        )
        return int(line.split()[1]) / 1024

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def small_release(folder: Path) -> tuple[Path, list[bytes]]:
    """The committed release at 0.5 points, and its samples as PNG files."""
    model = timm_cascade.load(RELEASE)
    model.set_max_drop(0.005)
    timm_cascade.save(model, folder)
    data = timm_cascade.load_data(SAMPLES)
    return folder, [encoded(data[i][0], 'PNG') for i in range(len(data))]


def large_release(folder: Path) -> tuple[Path, list[bytes]]:
    """A ResNet-18 for 224 pixels with random weights, of which 40 % of the images leave at each of three exits."""
    torch.manual_seed(0)
    model = timm.create_model('cascade_resnet18', num_classes=10, exits=3).eval()
    random_pictures = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p).resize((256, 256), Image.Resampling.BILINEAR) for p in random_pictures]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    model.thresholds = forced(observe(model, [torch.stack([transform(p) for p in pictures])]), 0.4)
    timm_cascade.save(model, folder)
    return folder, [encoded(p, 'JPEG', quality=90) for p in pictures]


def closed(folder: Path, out: Path) -> Path:
    """The same release with every exit closed: its plain backbone."""
    model = timm_cascade.load(folder)
    model.thresholds = [None] * len(model.exits)
    timm_cascade.save(model, out)
    return out


def load(server: Server, pictures: list[bytes], seconds: float) -> tuple[float, list[float]]:
    """Requests per second of eight clients that each wait for their answer, and the seconds each request took."""
    until, taken = time.perf_counter() + seconds, [[] for _ in range(CLIENTS)]  # type: list[list[float]]

    def client(number: int) -> None:
        connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=120)
        place = number
        while (began := time.perf_counter()) < until:
            connection.request('POST', '/predict', pictures[place % len(pictures)], {'Content-Type': 'image/png'})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read()
            taken[number].append(time.perf_counter() - began)
            place += CLIENTS
        connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return sum(map(len, taken)) / (time.perf_counter() - began), [t for each in taken for t in each]


def serve(args: argparse.Namespace) -> dict:
    """Throughput and latency of a cascade and its plain backbone, in turns, for two networks."""
    found = {}
    for name, make in (('release', small_release), ('resnet18 at 224 pixels', large_release)):
        with tempfile.TemporaryDirectory() as temporary:
            folder, pictures = make(Path(temporary) / 'cascade')
            servers = dict(cascade=Server(folder), plain=Server(closed(folder, Path(temporary) / 'plain')))
            rates: dict[str, list[float]] = {k: [] for k in servers}
            times: dict[str, list[float]] = {k: [] for k in servers}
            for turn in range(-1, args.repeats):
                for key in list(servers) if turn % 2 else list(servers)[::-1]:
                    rate, taken = load(servers[key], pictures, args.seconds if turn >= 0 else 2)
                    if turn >= 0:
                        rates[key].append(rate)
                        times[key] += taken
            assert [s.stop() for s in servers.values()] == [0, 0]
        ratios = [c / p for c, p in zip(rates['cascade'], rates['plain'], strict=True)]
        found[name] = dict(
            requests_per_second={k: round(statistics.median(v), 1) for k, v in rates.items()},
            cascade_over_plain=round(statistics.median(ratios), 3),
            lowest=round(min(ratios), 3),
            milliseconds={
                k: {f'p{q}': round(1000 * float(np.percentile(v, q)), 1) for q in (50, 95, 99)}
                for k, v in times.items()
            },
        )
    return found


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 20,000 by 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    head = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + chunk(b'IDAT', zlib.compress(bytes(100_000)))
        + chunk(b'IEND', b'')
    )


def hostile(args: argparse.Namespace) -> dict:
    """--rows requests of eight clients, one in twenty of them bad; every good one must get its own answer."""
    kinds = ('bomb', 'large', 'truncated', 'cmyk', '16 bit', 'wrong type', 'slow', 'hangs up')
    with tempfile.TemporaryDirectory() as temporary:
        folder, pictures = small_release(Path(temporary) / 'cascade')
        service = Service(timm_cascade.load(folder))
        asked = [service.prepare(p) for p in pictures]
        expected = [service.describe(a, *service.answers([a])) for a in asked]
        server = Server(folder, '--image-bytes', str(LIMIT), '--body-seconds', '2')
        picture = Image.open(io.BytesIO(pictures[0]))
        deep = Image.fromarray((np.arange(784, dtype=np.uint16) * 80).reshape(28, 28))
        bodies = {
            'bomb': bomb(),
            'truncated': pictures[0][: len(pictures[0]) // 2],
            'cmyk': encoded(picture.convert('CMYK'), 'JPEG'),
            '16 bit': encoded(deep, 'PNG'),
            'wrong type': b'{"inputs": 5}',
        }
        counts: dict[str, dict[str, int]] = {k: {} for k in ('good', *kinds)}
        lock, wrong = threading.Lock(), []  # type: ignore[var-annotated]

        def note(kind: str, what: object) -> None:
            with lock:
                counts[kind][str(what)] = counts[kind].get(str(what), 0) + 1

        def rude(kind: str) -> None:
            head = b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: '
            if kind in bodies:
                media = 'application/json' if kind == 'wrong type' else 'image/png'
                note(kind, server.ask('POST', '/predict', bodies[kind], **{'Content-Type': media})[0])
                return
            with socket.create_connection(('127.0.0.1', server.port), timeout=30) as connection:
                connection.sendall(head + (b'100000000' if kind == 'large' else b'1000') + b'\r\n\r\nabc')
                if kind == 'hangs up':
                    note(kind, 'gone')
                else:
                    note(kind, connection.recv(65536).split(b' ', 2)[1].decode())

        def client(number: int) -> None:
            chance = random.Random(number)
            connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=120)
            for i in range(number, args.rows, CLIENTS):
                if chance.random() < 0.05:
                    rude(chance.choice(kinds))
                    continue
                place = chance.randrange(len(pictures))
                connection.request('POST', '/predict', pictures[place], {'Content-Type': 'image/png'})
                response = connection.getresponse()
                answer = json.loads(response.read())
                note('good', response.status)
                want = expected[place]
                same = response.status == 200 and all(answer[k] == want[k] for k in ('index', 'exit', 'label'))
                if not same or abs(answer['confidence'] - want['confidence']) > 1e-4:
                    with lock:
                        wrong.append((i, place, answer))
            connection.close()

        load(server, pictures, 5)
        before = server.mebibytes()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        load(server, pictures, 5)
        after, code = server.mebibytes(), server.stop()
    return dict(
        requests=args.rows,
        answers={k: v for k, v in counts.items() if v},
        good_ones_with_a_wrong_answer=len(wrong),
        resident_mib=dict(before=round(before), after=round(after)),
        exit_code=code,
    )


def kills(args: argparse.Namespace) -> dict:
    """`timm-cascade predict` killed --repeats times at random moments and started again, beside a run left alone."""
    from scripts.experiments.prediction.measure import repeated

    with tempfile.TemporaryDirectory() as temporary:
        path, outs = repeated(Path(temporary), args.rows), [Path(temporary) / n for n in ('calm', 'killed')]
        start = [sys.executable, '-m', 'timm_cascade', 'predict', str(RELEASE), '--data', str(path), '--unit', '512']
        commands = [[*start, '--batch-size', '128', '--max-drop', '0.005', '--out', str(out)] for out in outs]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        began = time.perf_counter()
        subprocess.run(commands[0], check=True, capture_output=True, env=environment)
        whole, chance, killed = time.perf_counter() - began, random.Random(0), 0
        for _ in range(args.repeats):
            process = subprocess.Popen(
                commands[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
            try:
                process.wait(chance.uniform(0.2, whole))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            process.wait()
        subprocess.run(commands[1], check=True, capture_output=True, env=environment)
        parts = [{p.name: p.read_bytes() for p in sorted(out.glob('*.parquet'))} for out in outs]
        left = sorted(p.name for p in outs[1].iterdir() if p.name not in {q.name for q in outs[0].iterdir()})
    return dict(rows=args.rows, killed=killed, parts=len(parts[0]), identical=parts[0] == parts[1], left_behind=left)

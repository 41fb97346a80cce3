"""A server in a process of its own: clients that misbehave, and an orderly end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT

import timm_cascade
from timm_cascade.cli.main import main


class Server:
    """`timm-cascade serve` on a free port of the loopback interface."""

    def __init__(self, folder, *options):
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'timm_cascade', 'serve', str(folder), '--port', '0', *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if 'http://127.0.0.1:' in line:
                break
        else:
            raise AssertionError(''.join(self.log))
        self.port = int(line.rsplit(':', 1)[1])
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if self.get('/ready')[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(''.join(self.log))

    def get(self, path, data=None):
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', data)
        if data is not None:
            request.add_header('Content-Type', 'image/png')
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def connect(self):
        return socket.create_connection(('127.0.0.1', self.port), timeout=60)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def release(cascade, tmp_path):
    timm_cascade.save(cascade, tmp_path / 'release')
    return tmp_path / 'release'


def read_all(connection):
    data = b''
    try:
        while found := connection.recv(65536):
            data += found
    except OSError:  # a reset is an end as well
        pass
    return data


def test_clients_that_misbehave_harm_no_other_and_sigterm_answers_what_has_arrived(release, pictures):
    options = '--body-seconds 1 --image-bytes 100000 --threads 1 --max-batch 2 --max-wait 0.3'
    server = Server(release, *options.split())
    try:
        misbehave(server, pictures[:24])
        end_with_a_request(server, pictures[0])
    finally:
        assert server.stop() == 0


def misbehave(server, pictures):
    head = b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: '
    with server.connect() as slow, server.connect() as huge, server.connect() as endless, server.connect() as gone:
        slow.sendall(head + b'1000\r\n\r\nabc')
        huge.sendall(head + b'100000000\r\n\r\n' + b'x' * 1000)
        endless.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n')
        for _ in range(3):
            endless.sendall(b'C350\r\n' + b'x' * 50_000 + b'\r\n')
        gone.sendall(head + b'1000\r\n\r\nabc')
        gone.close()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda p: server.get('/predict', p), pictures))
        assert [status for status, _ in answers] == [200] * len(pictures)
        assert b' 413 ' in huge.recv(65536) and b' 413 ' in endless.recv(65536) and b' 408 ' in slow.recv(65536)
    garbage = server.connect()
    garbage.sendall(b'\x16\x03\x01 not http\r\n\r\n')
    assert b'400' in read_all(garbage)
    until = time.monotonic() + 30
    while b'hung_up"} 1.0' not in (text := server.get('/metrics')[1]) and time.monotonic() < until:
        time.sleep(0.05)
    for reason, count in (('slow', 1), ('too_large', 2), ('hung_up', 1)):
        assert f'timm_cascade_refusals_total{{reason="{reason}"}} {count}.0'.encode() in text


def end_with_a_request(server, picture):
    alone = []
    thread = threading.Thread(target=lambda: alone.append(server.get('/predict', picture)))
    thread.start()  # it waits 0.3 s for another one
    while b'timm_cascade_queue 1.0' not in server.get('/metrics')[1] and not alone:
        pass
    server.process.send_signal(signal.SIGTERM)
    thread.join(30)
    assert alone[0][0] == 200 and json.loads(alone[0][1])['label'] in 'abcd'
    assert server.process.wait(30) == 0
    with pytest.raises(OSError):
        server.connect()


@pytest.mark.slow
def test_several_processes_share_the_port_and_the_metrics(release, pictures):
    server = Server(release, '--workers', '2')
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda p: server.get('/predict', p), pictures))
        assert [status for status, _ in answers] == [200] * 96
        text = server.get('/metrics')[1].decode()
        assert 'timm_cascade_requests_total{status="200"} 96.0' in text
    finally:
        assert server.stop() == 0


def test_what_cannot_be_served_is_said_at_once(release, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(['serve', str(release), '--port', str(port)]) == 2
        assert f'port {port} of 127.0.0.1 cannot be opened (Address already in use)' in capsys.readouterr().err
    assert main(['serve', str(tmp_path / 'none'), '--port', '0']) == 2
    assert 'none' in capsys.readouterr().err
    assert main(['serve', str(release), '--port', '0', '--queue', '0']) == 2
    assert 'queue is 0' in capsys.readouterr().err
    assert main(['serve', str(release), '--port', '0', '--workers', '0']) == 2
    (tmp_path / 'token').write_text('\n')
    assert main(['serve', str(release), '--port', '0', '--token-file', str(tmp_path / 'token')]) == 2
    assert 'is empty' in capsys.readouterr().err

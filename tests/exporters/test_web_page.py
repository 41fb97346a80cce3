"""The page in a real browser: headless Chromium runs the stages and gives what the runner gives."""

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from exporters.cases import load_runner
from PIL import Image

from timm_cascade.errors import ExportError
from timm_cascade.exporters import web_page

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = """
--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --remote-debugging-port=0
""".split()
REPORT = """
<script>
const onPhone = () => new Promise(done => {
  const frame = document.createElement('iframe');
  frame.style.width = '390px';
  frame.onload = () => frame.contentWindow.ready.then(() => {
    const {scrollWidth, clientWidth} = frame.contentDocument.documentElement;
    done({scrollWidth, clientWidth});
  });
  frame.src = location.href;
  document.body.append(frame);
});
if (window.top === window) window.ready
  .then(async () => ({
    answers: await Promise.all(samples.map(s => predict(s.tensor, settings.at(-1).thresholds))),
    savings: [0.6, -0.004, -0.012].map(v => saving(v)),
    phone: await onPhone(),
  }))
  .catch(e => ({error: String(e)}))
  .then(r => fetch('report', {method: 'POST', body: JSON.stringify(r)}));
</script>
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what the page reports."""

    def do_POST(self):
        self.server.report = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def page(exported, tmp_path, monkeypatch):
    folder = tmp_path / 'page'
    shutil.copytree(exported, folder)
    generator = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    for i in range(4):
        pixels = generator.integers(0, 255, (3 + 2 * i, 4 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30 + i)).save(tmp_path / 'images' / f'{i}.png')
    return folder, tmp_path / 'images'


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
@pytest.mark.skipif(shutil.which('npm') is None, reason='npm is not installed')
def test_the_browser_answers_as_the_runner_does(page, tmp_path):
    folder, images = page
    try:
        web_page.write_page(folder, [images])
    except ExportError as e:
        pytest.skip(f'onnxruntime-web cannot be fetched here: {e}')
    html = (folder / 'index.html').read_text()
    (folder / 'index.html').write_text(html.replace('</html>', f'{REPORT}</html>'))
    server = ThreadingHTTPServer(('localhost', 0), partial(Handler, directory=str(folder)))
    server.done = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = f'--user-data-dir={tmp_path / "profile"}'
    address = f'http://localhost:{server.server_port}/index.html'
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS, profile, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert server.done.wait(240), 'the page reported nothing'
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    assert 'answers' in server.report, server.report
    assert server.report['savings'] == ['60 % of MACs saved', '0 % of MACs saved', '1 % more MACs']
    phone = server.report['phone']
    assert phone['scrollWidth'] == phone['clientWidth'] > 300, 'a phone would scroll sideways'
    cascade = load_runner(folder).Cascade(folder)
    point = cascade.set_max_drop(1.0)
    assert point['max_drop'] == max(p['max_drop'] for p in cascade.manifest['table']['points'])
    for i, got in enumerate(server.report['answers']):
        want = cascade.predict(cascade.preprocess(Image.open(images / f'{i}.png'))[None])
        assert got['exit'] == want.exit[0] and got['best'] == want.logits[0].argmax()
        assert abs(got['confidence'] - want.confidence[0]) < 0.01  # the two resize alike, up to rounding


def test_without_npm_the_error_says_so(page, monkeypatch):
    monkeypatch.setattr(web_page.shutil, 'which', lambda name: None)
    with pytest.raises(ExportError, match=r'onnxruntime-web.*npm.*not installed'):
        web_page.write_page(page[0])


def test_samples_that_are_not_images(page, tmp_path):
    (tmp_path / 'text.txt').write_text('no image')
    with pytest.raises(ExportError, match='has no samples; expected image files'):
        web_page.write_page(page[0], [tmp_path / 'text.txt'])


def test_the_page_loads_nothing_from_elsewhere():
    html = (web_page.Path(web_page.__file__).with_name('web') / 'index.html').read_text()
    assert 'http://' not in html and 'https://' not in html and 'src="//' not in html

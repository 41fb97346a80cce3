"""The page in a real browser: an image is dropped, the dial is moved, and it shows which exit answered."""

import shutil
import subprocess
import threading

import pytest
import uvicorn
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from timm_cascade.serving.app import PAGE, create_app
from timm_cascade.serving.server import bind
from timm_cascade.serving.service import Service

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
SCRIPT = """
<script>
(async () => {
  const seen = [];
  try {
    await start();
    take(new File([await (await fetch('picture')).blob()], 'a.png'));
    for (const step of [0, 1, 21]) {
      $('dial').value = step;
      showDial();
      await ask();
      seen.push({setting: $('setting').textContent, summary: $('summary').textContent,
        exits: [...$('exits').children].map(e => e.className), scores: $('scores').children.length});
    }
    image = new File(['x'], 'b.png');
    await ask();
    seen.push({error: $('error').textContent, hidden: $('result').hidden});
    image = new File([await (await fetch('picture')).blob()], 'a.png');
    await ask();
  } catch (e) { seen.push(String(e)); }
  await fetch('report', {method: 'POST', body: JSON.stringify(seen)});
})();
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
def test_the_page_shows_which_exit_answered(cascade, pictures, tmp_path):
    service = Service(cascade)
    app, reports, done = create_app(service), [], threading.Event()

    async def page(request):
        return HTMLResponse(PAGE + SCRIPT)

    async def picture(request):
        return Response(pictures[0], media_type='image/png')

    async def report(request):
        reports.append(await request.json())
        done.set()
        return Response()

    app.router.routes[:0] = [
        Route('/test', page),
        Route('/picture', picture),
        Route('/report', report, methods=['POST']),
    ]
    bound = bind('127.0.0.1', 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
    port = bound.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    profile, address = f'--user-data-dir={tmp_path / "profile"}', f'http://127.0.0.1:{port}/test'
    flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', profile, address]
    browser = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert done.wait(120), 'the page reported nothing'
    finally:
        browser.kill()
        browser.wait()
        server.should_exit = True
        thread.join(30)
    *shown, error = reports[0]
    for found, max_drop in zip(shown, (None, 0.0, 0.05), strict=True):
        asked = service.prepare(pictures[0], max_drop)
        (answer,) = service.answers([asked])
        want = service.describe(asked, answer)
        assert found['summary'].startswith(want['label'] + ',') and found['scores'] == 4
        assert found['exits'].index('answered') == want['exit'] and len(found['exits']) == 3
        assert found['setting'].startswith("server's own" if max_drop is None else f'{100 * max_drop:.2f} %')
    assert 'not an image that can be read' in error['error'] and error['hidden']

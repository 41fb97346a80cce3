"""The README and the pages beside it: short, with links that lead somewhere and code that is run elsewhere."""

from __future__ import annotations

import re
import shlex

import pytest
from helpers import ROOT

from timm_cascade.cli.main import _parser


def test_the_readme_is_short_and_its_quickstart_is_the_example():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert text.count('\n') <= 120
    example = (ROOT / 'scripts' / 'examples' / 'quickstart.py').read_text(encoding='utf-8')
    assert f'```python\n{example.partition("import timm_cascade")[1]}' in text
    assert example[example.index('import timm_cascade') :] in text


@pytest.mark.parametrize('name', ['README.md', '.github/CONTRIBUTING.md', 'hub/samples/README.md'])
def test_links_lead_to_files(name):
    page = ROOT / name
    for target in re.findall(r'\]\(([^)#]+)', page.read_text(encoding='utf-8')):
        assert target.startswith('https://') or (page.parent / target).exists(), target


@pytest.mark.parametrize('name', ['README.md', '.github/CONTRIBUTING.md', 'docs/pages/how-to', 'docs/pages/evidence'])
def test_scripts_that_are_named_exist(name):
    """`python scripts/...` in a page is a command that can be given."""
    page = ROOT / name
    for file in [page] if page.is_file() else page.glob('*.md'):
        for script in re.findall(r'python (scripts/[\w/.]+)', file.read_text(encoding='utf-8')):
            assert (ROOT / script).exists(), f'{file.name}: {script}'


def test_pages_include_their_examples():
    """A formatter that takes the line of an include for Python makes it text that readers see."""
    included = set()
    for file in (ROOT / 'docs' / 'pages').rglob('*.md'):
        for line in file.read_text(encoding='utf-8').splitlines():
            if re.match(r'\W*8\W*<', line):
                found = re.fullmatch(r'--8<-- [\'"]([\w.-]+)[\'"]', line)
                assert found, f'{file.name}: {line}'
                included.add(found[1])
    assert included >= {file.name for file in (ROOT / 'scripts' / 'examples').glob('*.py')}


def test_commands_on_pages_have_these_options():
    parser, seen = _parser(), 0
    for file in (ROOT / 'README.md', *(ROOT / 'docs' / 'pages').rglob('*.md')):
        text = re.sub(r'\\\n\s*', '', file.read_text(encoding='utf-8'))
        for command in re.findall(r'^ {4}timm-cascade (.*)', text, re.MULTILINE):
            words = shlex.split(command.replace('$((', '').replace('FOLDER|REPO', 'FOLDER'), comments=True)
            if '...' in words:
                continue
            try:
                parser.parse_args(words)
            except SystemExit:
                raise AssertionError(f'{file.name}: timm-cascade {command}') from None
            seen += 1
    assert seen > 10

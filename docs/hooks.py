"""What mkdocs cannot know by itself: the order of the pages, results beside them, help texts and public names."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGES, RESULTS, PACKAGE = DOCS / 'pages', DOCS / 'results', DOCS.parent / 'timm_cascade'
# pages that are not named here follow their section's others by name, so that a new page needs no entry
SECTIONS = {
    'tutorials': ('Tutorials', 'first-cascade'),
    'how-to': (
        'How-to',
        'your-own-images',
        'train-heads',
        'choose-max-drop',
        'save-time',
        'predict',
        'share-on-the-hub',
        'timm-scripts',
    ),
    'explanation': (
        'Explanation',
        'what-the-number-promises',
        'how-samples-exit',
        'when-a-smaller-network-is-better',
        'saved-format',
    ),
    'reference': ('Reference', 'api', 'thresholds', 'command-line', 'errors', 'files'),
    'evidence': ('Evidence', 'index', 'releases'),
}


def on_config(config: Any) -> Any:
    """Lists every page under its section."""
    config.nav = ['index.md']
    for folder, (title, *first) in SECTIONS.items():
        names = {path.stem for path in (PAGES / folder).glob('*.md')}
        order = [name for name in first if name in names] + sorted(names - set(first))
        if order:
            config.nav.append({title: [f'{folder}/{name}.md' for name in order]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Serves docs/results as results/, and pictures of releases as results/releases/NAME/."""
    from mkdocs.structure.files import File

    served = {f'results/{path.name}': path for path in RESULTS.iterdir() if path.is_file()}
    for path in (DOCS.parent / 'hub' / 'releases').glob('*/*.png'):
        served[f'results/releases/{path.parent.name}/{path.name}'] = path
    for uri, path in served.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are in the repository become links within the site; `<!-- commands -->` and others are filled."""
    up = '../' * page.file.src_uri.count('/')
    markdown = markdown.replace(f'{up}../results/', f'{up}results/')
    markdown = markdown.replace(f'{up}../../hub/releases/', f'{up}results/releases/')
    if '<!-- commands -->' in markdown:
        markdown = markdown.replace('<!-- commands -->', commands())
    markdown = re.sub(r'<!-- keys of (\w+) -->', lambda match: keys(match[1]), markdown)
    return re.sub('<!-- other names of ([\\w.]+) -->', lambda match: others(markdown, match[1]), markdown)


def public_names(module: Path) -> list[str]:
    """The names in `__all__` of a module, read from its text."""
    for node in ast.parse(module.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError(f'{module} has no __all__.')


def others(markdown: str, module: str) -> str:
    """Entries for the public names of a module that neither the page nor the one of timm_cascade has; errors apart."""
    folder = PACKAGE.joinpath(*module.split('.')[1:])
    shown = set(re.findall(r'^::: [\w.]+\.(\w+)$', markdown, re.MULTILINE)) | {'create_model'}
    if folder != PACKAGE:
        shown |= set(public_names(PACKAGE / '__init__.py'))
    names = [n for n in public_names(folder / '__init__.py') if n not in shown and not n.startswith('__')]
    return '\n\n'.join(f'::: {module}.{n}' for n in names if not n.endswith('Error'))


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    os.environ['COLUMNS'] = '92'
    sys.path.insert(0, str(DOCS.parent))
    from timm_cascade.cli.main import main

    def printed(*argv: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*argv, '--help'])
        return out.getvalue().rstrip()

    whole = printed()
    found = re.search(r'\{([\w,-]+)\}', whole)
    if found is None:
        raise ValueError('timm-cascade --help names no commands.')
    text = [f'```text\n{whole}\n```']
    text += [f'## timm-cascade {name}\n\n```text\n{printed(name)}\n```' for name in found[1].split(',')]
    return '\n\n'.join(text)


def keys(name: str) -> str:
    """A table of the keys of a file, from its model in timm_cascade.formats."""
    sys.path.insert(0, str(DOCS.parent))
    from timm_cascade import formats

    schema = getattr(formats, name).model_json_schema()
    kinds = dict(integer='whole number', number='number', string='text', boolean='true or false', null='null')

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return {**schema['$defs'][node['$ref'].rpartition('/')[2]], **node} if '$ref' in node else node

    def kind(node: dict[str, Any]) -> str:
        node = resolved(node)
        if options := node.get('anyOf') or node.get('oneOf'):
            return ' or '.join(dict.fromkeys(kind(option) for option in options))
        if 'enum' in node or 'const' in node:
            return ', '.join(f'`{value}`' for value in node.get('enum', [node.get('const')]))
        if node.get('type') == 'array':
            return f'list of: {kind(node.get("items", {}))}'
        text = kinds.get(node.get('type', ''), 'object' if node.get('type') == 'object' else 'short value')
        low, high = node.get('minimum'), node.get('maximum')
        if low is not None and high is not None and high < 1e5:
            return f'{text} from {low:g} to {high:g}'
        return text + (f' from {low:g}' if low is not None and low >= 0 else '')

    rows = ['| key | value | required |', '| --- | --- | --- |']

    def walk(node: dict[str, Any], place: str) -> None:
        node = resolved(node)
        for key, child in node.get('properties', {}).items():
            child = resolved(child)
            required = 'yes' if key in node.get('required', []) else ''
            rows.append(f'| `{place}{key}` | {kind(child)} | {required} |')
            options = [resolved(o) for o in [child, *child.get('anyOf', []), *child.get('oneOf', [])]]
            options += [resolved(o) for option in options for o in option.get('oneOf', [])]
            inner: dict[str, dict[str, Any]] = {}
            for option in options:
                option = resolved(option.get('items', {})) if option.get('type') == 'array' else option
                if 'properties' in option:
                    inner[option['title']] = option
            suffix = '[].' if child.get('type') == 'array' else '.'
            for option in inner.values():
                walk(option, f'{place}{key}{suffix}')

    walk(schema, '')
    return '\n'.join(dict.fromkeys(rows))

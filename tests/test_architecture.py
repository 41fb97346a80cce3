"""The floors of the library: a module imports only from floors below its own, or from its own room."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / 'timm_cascade'
FLOORS = [
    {'errors', 'version'},
    {'utils'},
    {'backbone', 'data', 'formats', 'heads'},
    {'fronts', 'inference', 'thresholds'},
    {'model'},
    {'exporters', 'hub', 'measure', 'prediction', 'serving', 'training'},
    {'top'},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TOP = {'__init__', '__main__', 'cli', 'moved', 'ray', 'registry', 'run'}
MODULES = sorted(PACKAGE.rglob('*.py'))
# thresholds are numpy and scipy only, so that they serve programs without torch
HEAVY = {'torch', 'timm', 'accelerate', 'datasets', 'huggingface_hub', 'PIL', 'torchvision'}


def room_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).with_suffix('').parts[0]
    return 'top' if name in TOP else name


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions included."""
    found: list[tuple[int, str]] = []
    package = ['timm_cascade', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or ''))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            found += [
                (node.lineno, '.'.join([*base, *([node.module] if node.module else []), alias.name]))
                for alias in node.names
            ]
    return found


def test_every_module_stands_on_a_floor():
    assert {room_of(path) for path in MODULES} <= set(FLOOR)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_below(path):
    room = room_of(path)
    for line, name in imports(path):
        parts = name.split('.')
        if parts[0] != 'timm_cascade':
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in FLOOR else 'top'
        assert other == room or FLOOR[other] < FLOOR[room], f'{path}:{line} imports {name} from floor {FLOOR[other]}'


@pytest.mark.parametrize('path', sorted((PACKAGE / 'thresholds').glob('*.py')), ids=lambda p: p.name)
def test_thresholds_know_no_torch(path):
    assert not [name for _, name in imports(path) if name.split('.')[0] in HEAVY]


def test_no_file_name_twice_and_no_file_too_long():
    names = Counter(path.name for path in MODULES if path.name != '__init__.py')
    assert [name for name, count in names.items() if count > 1] == []
    long = {str(p): n for p in MODULES if (n := len(p.read_text(encoding='utf-8').splitlines())) > 400}
    assert long == {}


def test_no_module_is_shadowed_by_what_its_package_exports():
    import importlib

    for init in PACKAGE.rglob('__init__.py'):
        name = '.'.join(('timm_cascade', *init.relative_to(PACKAGE).parts[:-1]))
        package = importlib.import_module(name)
        for module in (p.stem for p in init.parent.iterdir() if p.suffix == '.py' or (p / '__init__.py').is_file()):
            exported = getattr(package, module, None)
            assert exported is None or module.startswith('__') or type(exported).__name__ == 'module', (name, module)


def test_nothing_is_imported_in_a_circle():
    """Between rooms the floors forbid it; inside a room the order of imports at module level must exist."""
    graph = {}
    for path in MODULES:
        name = '.'.join(('timm_cascade', *path.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__')
        tree = ast.parse(path.read_text(encoding='utf-8'))
        top = {n.lineno for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))}
        graph[name] = {target for line, target in imports(path) if line in top}
    modules = set(graph)

    def resolve(target: str) -> str | None:
        while target and target not in modules:
            target = target.rpartition('.')[0]
        return target if target.count('.') >= 1 else None

    edges = {
        m: {r for t in targets if (r := resolve(t)) and r != m and not m.startswith(r + '.')}
        for m, targets in graph.items()
    }
    done, active = set(), []

    def visit(module: str) -> None:
        assert module not in active, ' -> '.join([*active[active.index(module) :], module])
        if module in done:
            return
        active.append(module)
        for other in edges.get(module, ()):
            visit(other)
        active.pop()
        done.add(module)

    for module in edges:
        visit(module)

"""The GPU's page, from what was measured so far."""

from __future__ import annotations

from typing import Any

from scripts.experiments.benchmark.page import cell, verdict

MB = 1e6


def markdown(content: dict[str, Any]) -> list[str]:
    """The page's lines."""
    m, tf32 = content['machine'], content['tf32']
    text = [
        '# Benchmark on a GPU' if content['cuda'] else '# Benchmark on a GPU: a trial on a CPU, not a result',
        '',
        f'    {content["command"]}',
        '',
        f'{m["device"]}, torch {m["torch"]}, timm {m["timm"]}'
        + (f', CUDA {content["cuda"]}' if content['cuda'] else '')
        + f'; at most {content["minutes"]:g} minutes in all. TF32 in float32 networks: '
        f'{_on(tf32["convolutions"])} in convolutions, {_on(tf32["products"])} in matrix products.',
        '',
        'Random weights and three exits, or the Fashion-MNIST release and its eight; coarse random pictures, '
        'thresholds between the confidences that were observed, so that about the stated share of the remaining images '
        'exits at each exit. Ratios of times taken in turns within one run, medians with quartiles in brackets; '
        'the clock is read when the device is done. At batch 1 ten images, one after the other.',
        '',
        '- eager, channels-last: without the compiler, in these memory formats; the cascade in the faster one.',
        '- graphs: `torch.compile(mode="reduce-overhead")`, channels-last, CUDA graphs; the cascade '
        '`model.compile(mode="reduce-overhead")`, stages padded to a few batch sizes.',
        '- static: the same, each batch size compiled by itself; compiled: torch.compile in its default mode.',
        '- best: the plain network in its fastest mode of all that the row was measured with.',
        '- ideal: the measured times of the stages with their heads, each at the batch sizes that came to it.',
    ]
    done = [c for c in content['cells'] if 'error' not in c]
    text += _compared([c for c in done if c['kind'] == 'compare'])
    text += _regrouped([c for c in done if c['kind'] == 'regroup'])
    text += _compiled(content['compile'])
    failed = [c for c in content['cells'] if 'error' in c]
    if failed:
        text += ['', '## Failed', '']
        text += [f'- {_name(c)}: `{c["error"]}`' for c in failed]
    if content['missing']:
        text += ['', '## Not measured', '', f'The time did not suffice for {len(content["missing"])}:', '']
        groups: dict[tuple[str, str], list[str]] = {}
        for name in content['missing']:
            kind, network, *rest = name.split(', ')
            groups.setdefault((kind, network), []).append(' '.join(rest))
        text += [f'- {kind}, {network}: {"; ".join(each)}' for (kind, network), each in groups.items()]
    return text


def _on(value: bool) -> str:
    return 'on' if value else 'off'


def _name(c: dict[str, Any]) -> str:
    return f'{c["kind"]}, {c["network"]}, {c["dtype"]}, batch {c["batch"]}, {" ".join(c["modes"])}'


def _compared(cells: list[dict[str, Any]]) -> list[str]:
    if not cells:
        return []
    text = [
        '',
        '## Beside the plain network',
        '',
        'Targets: at most 0.85 of best from 20 % up when compiled, 1.00 eager from 40 % up.',
        '',
        '| network | dtype | batch | mode | exit | came to each stage | of best | of the ideal | ideal of best |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for c in cells:
        for r in c['rows']:
            eager = r['mode'] in ('eager', 'channels-last')
            aim = (1.0 if r['share'] >= 0.4 else None) if eager else (0.85 if r['share'] else None)
            mode = r['mode'] if c.get('still_compiled', {}).get(r['mode'], True) else f'{r["mode"]} (gave up: eager)'
            text.append(
                f'| {c["network"]} | {c["dtype"]} | {c["batch"]} | {mode} | {r["share"]:.0%} | '
                f'{" ".join(map(str, r["came"]))} | {verdict(r["to_best"], aim)} | {cell(r["to_ideal"])} | '
                f'{cell(r["ideal_to_best"])} |'
            )
    text += [
        '',
        '## The plain network, and exits closed',
        '',
        'Milliseconds per image of the plain network in each mode; time of the cascade with every exit closed over the '
        'plain network in the same mode, compiled not at batch 1. Target: 1.01.',
        '',
        '| network | dtype | batch | plain, ms per image | best | closed |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for c in cells:
        plain = ', '.join(f'{mode} {ms:.3g}' for mode, ms in c['plain_ms'].items())
        closed = '; '.join(f'{mode} {verdict(s, 1.01, digits=3)}' for mode, s in c['closed'].items())
        text.append(f'| {c["network"]} | {c["dtype"]} | {c["batch"]} | {plain} | {c["best"]} | {closed} |')
    return text


def _regrouped(cells: list[dict[str, Any]]) -> list[str]:
    if not cells:
        return []
    text = [
        '',
        '## Regrouping',
        '',
        'Eight batches through `stream`, which lets the remaining images of several batches go on together, and '
        'through `predict`, which does not. Gain: time of `predict` over that of `stream`; plain in the same mode. '
        'Peak memory is what a call allocates at most, above weights and images.',
        '',
        '| network | dtype | batch | mode | exit | gain | stream over plain | predict over plain | peak MB: plain, '
        'predict, stream |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for c in cells:
        for r in c['rows']:
            peak = ', '.join(f'{r["peak"][k] / MB:,.0f}' for k in ('plain', 'predict', 'stream')) if 'peak' in r else ''
            text.append(
                f'| {c["network"]} | {c["dtype"]} | {c["batch"]} | {r["mode"]} | {r["share"]:.0%} | '
                f'{cell(r["gain"])} | {cell(r["stream_to_plain"])} | {cell(r["predict_to_plain"])} | {peak} |'
            )
    return text


def _compiled(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    text = [
        '',
        '## Time to compile',
        '',
        'Seconds to the first answer, in processes that compiled at the same time with one thread each: the plain '
        'network for one batch size, the cascade for one image or for any number, with exits open and closed.',
        '',
        '| network | dtype | mode | batch | plain | cascade |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    keys = dict.fromkeys((r['network'], r['dtype'], r['mode'], r['batch']) for r in rows)
    for key in keys:
        found = {
            r['way']: f'{r["seconds"]:.1f}' if 'seconds' in r else f'failed: `{r["error"]}`'
            for r in rows
            if (r['network'], r['dtype'], r['mode'], r['batch']) == key
        }
        text.append(f'| {" | ".join(map(str, key))} | {found.get("plain", "")} | {found.get("cascade", "")} |')
    return text

import re
from html.parser import HTMLParser

import pytest

import timm_cascade
from timm_cascade.data import ImageData
from timm_cascade.measure.report import write_report

NAMES = ['<b>', 'b', 'c', 'd']


class Counts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href')]


@pytest.fixture
def calibrated(calibrated):
    calibrated.label_names = NAMES
    return calibrated


def test_the_page_says_what_evaluate_measures(calibrated, images, tmp_path):
    calibrated.thresholds = [0.4, None]
    data = ImageData(images.images, images.labels, NAMES)
    write_report(calibrated, data, tmp_path / 'report.html')
    text = (tmp_path / 'report.html').read_text()
    report, page = timm_cascade.evaluate(calibrated, data), Counts(text)
    assert not page.links and page.tags.count('svg') == 2 and '<b>' not in text and '&lt;b&gt;' in text
    said = f'{report.full_accuracy:.1%} correctly, the cascade at its active thresholds {report.accuracy:.1%} with '
    assert said + f'{report.macs_share:.1%}' in text
    assert f'{report.exit_shares[0]:.1%} of the images, {report.exit_accuracy[0]:.1%} correct' in text
    assert 'closed' in text and 'not a certified setting' in text
    hints = re.findall(r'answered as [^:]*: (\d+) ', text)
    assert len(hints) == 16 and sum(map(int, hints)) == len(images)


def test_without_labels_or_calibration_no_page(small, images, tmp_path):
    with pytest.raises(timm_cascade.NotCalibratedError):
        write_report(small, images, tmp_path / 'report.html')
    with pytest.raises(ValueError, match='needs a label'):
        write_report(small, ImageData(images.images, None), tmp_path / 'report.html')
    assert not list(tmp_path.iterdir())

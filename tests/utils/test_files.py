import pytest

from timm_cascade.utils.files import replacing, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.txt'
    write_text(path, 'old')
    with pytest.raises(OSError, match='No space'), replacing(path) as temporary:
        temporary.write_text('half of the ne')
        raise OSError(28, 'No space left on device')
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.txt'
    write_text(path, 'old')
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text('half')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'


def test_folders_are_made_and_files_are_readable_by_others(tmp_path):
    path = tmp_path / 'new' / 'a.txt'
    write_text(path, 'x')
    assert path.stat().st_mode & 0o444

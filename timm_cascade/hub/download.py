"""Where the files of a release come from: a folder, or a Hub repository through the client's cache.

A file is only ever asked for by one of the format's fixed names. From the Hub its size is checked before it is
downloaded and its hash after; the client checks neither.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that this version of the client is built on
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubUnavailableError, ReleaseError
from ..utils.files import git_oid, sha256_of

__all__ = ['Folder', 'Repository']

COMMIT = re.compile(r'[0-9a-f]{40}')


class Folder:
    """A release on disk."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)

    def __str__(self) -> str:
        return str(self.folder)

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def path(self, name: str, limit: int) -> Path | None:
        """The file's path; None if there is no such file.

        Raises:
            ReleaseError: More than `limit` bytes.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        _check_size(str(path), path.stat().st_size, limit)
        return path


class Repository:
    """A release on the Hub, every file of it from one and the same commit.

    Args:
        repo: `user/name`, or `user/name@revision`.
        cache_dir: Cache of the Hub client; None is its default.
    """

    def __init__(self, repo: str, cache_dir: str | Path | None = None) -> None:
        self.repo, _, revision = repo.partition('@')
        self.revision = revision or None
        self.cache_dir = cache_dir
        self._api = HfApi(library_name='timm_cascade')
        self._commit = self.revision if self.revision and COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        return f'{self.repo}@{self.revision}' if self.revision else self.repo

    def refresh(self, name: str, limit: int) -> None:
        """Fetches the newest `name` of the revision, and pins all files to its commit; cached, if the Hub is away.

        Raises:
            ReleaseError: No such repository, revision or file, or a file that is too large or not what the Hub says.
        """
        if self._commit is None:
            try:
                url = hf_hub_url(self.repo, name, revision=self.revision)
                self._commit = self._api.get_hf_file_metadata(url=url).commit_hash
            except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as e:
                raise self._error(name, e) from e
            except (HTTPError, OSError):
                pass  # the cache may do
        if self.path(name, limit) is None:
            raise ReleaseError(f'{self} is not a release: it has no {name}.')

    def has(self, name: str) -> bool:
        """Whether the Hub has the file; nothing is downloaded."""
        with suppress(HTTPError, OSError):
            self._api.get_hf_file_metadata(url=hf_hub_url(self.repo, name, revision=self._commit or self.revision))
            return True
        return False

    def commit(self, name: str) -> str | None:
        """The commit that the cached file `name` is of."""
        if self._commit is None:
            cached = try_to_load_from_cache(self.repo, name, cache_dir=self.cache_dir, revision=self.revision)
            self._commit = Path(cached).parent.name if isinstance(cached, str) else None
        return self._commit

    def path(self, name: str, limit: int) -> Path | None:
        """The file's path in the cache, downloaded if it has to be; None if the repository has no such file.

        Raises:
            ReleaseError: More than `limit` bytes, or other bytes than the Hub says (downloaded again once).
            HubUnavailableError: Not in the cache, and the Hub cannot be reached.
        """
        revision = self._commit or self.revision
        cached = try_to_load_from_cache(self.repo, name, cache_dir=self.cache_dir, revision=revision)
        if isinstance(cached, str):
            path = Path(cached)
            _check_size(str(path), path.stat().st_size, limit)
            if _is_intact(path):
                return path
            return self._download(name, revision, force=True, damaged=path.resolve())
        if cached is not None:  # the client's note that this commit has no such file
            return None
        url = hf_hub_url(self.repo, name, revision=revision)
        try:
            size = self._api.get_hf_file_metadata(url=url).size
        except RemoteEntryNotFoundError:
            with suppress(HTTPError, OSError):  # for the note, so that it is known offline too
                hf_hub_download(self.repo, name, revision=revision, cache_dir=self.cache_dir)
            return None
        except (HTTPError, OSError) as e:
            raise self._error(name, e) from e
        if size is None:
            raise ReleaseError(f'{self}: the Hub does not say how large {name} is; it is not downloaded.')
        _check_size(f'{name} of {self}', size, limit)
        return self._download(name, revision)

    def _download(
        self, name: str, revision: str | None, force: bool = False, damaged: Path | None = None, resume: bool = True
    ) -> Path:
        try:
            path = Path(
                hf_hub_download(self.repo, name, revision=revision, cache_dir=self.cache_dir, force_download=force)
            )
        except (HTTPError, OSError, ValueError) as e:  # ValueError: a new download while offline
            if resume and isinstance(e, HTTPError) and not isinstance(e, HfHubHTTPError):
                # the connection ended half-way; newer clients go on by themselves
                return self._download(name, revision, force, damaged, resume=False)
            if damaged is not None:
                raise ReleaseError(
                    f'{damaged} ({name} of {self}) is damaged: its hash is not the one the Hub gave. Delete the file '
                    f'and load again; a new download failed ({e}).'
                ) from e
            raise self._error(name, e) from e
        if _is_intact(path):
            return path
        if not force:
            return self._download(name, revision, force=True)
        raise ReleaseError(
            f'{path.resolve()} ({name} of {self}) came with another hash than the Hub announced, twice. Delete the '
            f'file and load again later; do not use it.'
        )

    def _error(self, name: str, e: Exception) -> ReleaseError:
        """What is raised where the Hub does not give a file."""
        if isinstance(e, GatedRepoError):
            return ReleaseError(f'{self} is gated: ask for access on its page and log in.')
        if isinstance(e, RevisionNotFoundError):
            return ReleaseError(f'{self.repo} has no revision {self.revision!r}; check the name after the @.')
        if isinstance(e, RepositoryNotFoundError):
            return ReleaseError(
                f'{self} is not on the Hub, or is private to others. Check the name; for a private repository log '
                f'in, or set HF_TOKEN.'
            )
        if isinstance(e, RemoteEntryNotFoundError):
            return ReleaseError(f'{self} is not a release: it has no {name}.')
        if isinstance(e, HfHubHTTPError) and e.response.status_code in (401, 403):
            return ReleaseError(f'{self}: the Hub refuses access to {name} ({e}). Log in, or set HF_TOKEN.')
        reason = 'cannot be reached' if not isinstance(e, LocalEntryNotFoundError) else 'could not be asked'
        return HubUnavailableError(
            f'{name} of {self} is not in the cache, and the Hub {reason} ({type(e).__name__}: {e}). Load it once '
            f'while online, without HF_HUB_OFFLINE.'
        )


def _is_intact(path: Path) -> bool:
    """Whether the cached file has the hash that the Hub gave: the client's cache names the file by it."""
    expected = path.resolve().name
    if re.fullmatch('[0-9a-f]{64}', expected):
        return sha256_of(path) == expected
    if re.fullmatch('[0-9a-f]{40}', expected):
        return git_oid(path) == expected
    return True  # a cache without links does not say


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise ReleaseError(f'{what} has {size:,} bytes; expected are at most {limit:,}. It is not read.')

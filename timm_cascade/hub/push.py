"""Publishing a release: one commit with the files that differ, or none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from ..errors import HubUnavailableError, PushConflictError, PushDeniedError, PushError, ReleaseError
from ..utils.files import git_oid, sha256_of
from .card import PLACEHOLDER
from .download import Folder
from .release import CARD, CONFIG, FILES, Release
from .save_release import save

__all__ = ['Pushed', 'compare', 'push_to_hub']

PICTURES = '*.png'  # that a card may show
REFUSALS: dict[int, tuple[type[PushError], str]] = {  # HTTP status: what is raised, and what it says
    401: (
        PushDeniedError,
        'the token is missing or not valid. Log in with `hf auth login`, or set HF_TOKEN to a token that may write.',
    ),
    403: (
        PushDeniedError,
        'this token may not write there. Use one with write access, another name, or create_pr=True.',
    ),
    404: (PushError, 'no such repository or revision, and it cannot be made.'),
    409: (PushError, 'it exists already (the tag, or the branch).'),
    412: (
        PushConflictError,
        'the repository received another commit meanwhile; nothing was published. Look at what is there now, load it '
        'if it is better, and push again.',
    ),
}


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: Address of the commit, or of the repository where nothing differed.
        commit: Id of the commit; where nothing differed, of the one that was there already.
        files: Names of the files that were uploaded or deleted; empty where nothing differed.
        pull_request: Address of the pull request, if one was opened.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    pull_request: str | None = None


def push_to_hub(
    what: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: str | None = None,
    layout: str | None = None,
    card: str | None = None,
    commit_message: str | None = None,
) -> Pushed:
    """Publishes a cascade, or the folder it was saved in, in one commit; files that do not differ stay as they are.

    Args:
        what: A cascade, or a folder that `save` wrote.
        repo_id: `user/name`; made if it is not there.
        private: Whether a repository that is made is private.
        revision: Branch; made if it is not there. The main one by default.
        create_pr: Open a pull request instead of committing to the branch.
        tag: Git tag for the commit.
        token: Access token of the Hub; by default the one that huggingface_hub finds (HF_TOKEN, or a login).
        layout, card: See `save`; for a model only.
        commit_message: Text of the commit; the default says which files are new.

    Raises:
        PushConflictError: The repository received another commit meanwhile; nothing was published.
        PushDeniedError: No token, one that is not valid, or one that may not write there.
        PushError: The Hub refused for another reason.
        HubUnavailableError: The Hub cannot be reached.
        ReleaseError: The cascade or folder is not fit to be published.
    """
    if not isinstance(what, nn.Module) and (layout is not None or card is not None):
        raise ReleaseError('layout and card are for a model; a folder is published as it is.')
    api = HfApi(token=token, library_name='timm_cascade')
    with tempfile.TemporaryDirectory() as temporary, _named_errors(repo_id):
        folder = Path(temporary, 'release') if isinstance(what, nn.Module) else Path(what)
        if isinstance(what, nn.Module):
            save(what, folder, layout, card)
        if not (folder / CONFIG).is_file():
            raise ReleaseError(f'{folder} is not a release: it has no {CONFIG}.')
        Release(Folder(folder)).check()
        files = _files(folder, repo_id, Path(temporary))
        info = _repository(api, repo_id, revision, private)
        changed, gone = _differences(files, info)
        url, commit, request = f'{api.endpoint}/{repo_id}', str(info.sha), None
        if changed or gone:
            done = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in changed),
                    *(CommitOperationDelete(path_in_repo=name) for name in gone),
                ],
                commit_message=commit_message or f'Update {", ".join([*changed, *gone])}',
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )
            url, commit, request = done.commit_url, done.oid, done.pr_url
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit)
    return Pushed(url, commit, (*changed, *gone), request)


def compare(folder: str | Path, repo_id: str, revision: str | None = None, token: str | None = None) -> list[str]:
    """Names of the files that a push of `folder` would upload or delete.

    Raises:
        HubUnavailableError, PushDeniedError: As for push_to_hub.
    """
    api = HfApi(token=token, library_name='timm_cascade')
    with tempfile.TemporaryDirectory() as temporary, _named_errors(repo_id):
        files = _files(Path(folder), repo_id, Path(temporary))
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return sorted(files)
        return [name for names in _differences(files, info) for name in names]


def _files(folder: Path, repo_id: str, temporary: Path) -> dict[str, Path]:
    """What is published of a folder; the card names the repository it is in."""
    files = {p.name: p for p in [*(folder / name for name in FILES), *sorted(folder.glob(PICTURES))] if p.is_file()}
    if CARD in files:
        text = files[CARD].read_text(encoding='utf-8')
        files[CARD] = temporary / CARD
        files[CARD].write_text(text.replace(PLACEHOLDER, repo_id), encoding='utf-8')
    return files


def _repository(api: HfApi, repo_id: str, revision: str | None, private: bool) -> ModelInfo:
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        assert revision is not None
        api.create_branch(repo_id, branch=revision)
    except RepositoryNotFoundError:
        if api.token is None:
            api.whoami()  # raises, and says how to log in
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision, files_metadata=True)


def _differences(files: dict[str, Path], info: ModelInfo) -> tuple[list[str], list[str]]:
    """Names of the files to upload, and of those of the format that are no longer there."""
    there = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings or []}
    changed = [name for name, path in files.items() if there.get(name) not in (sha256_of(path), git_oid(path))]
    return changed, [name for name in FILES if name in there and name not in files]


@contextmanager
def _named_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as e:
        raise PushDeniedError(f'{repo_id}: there is no token. Log in with `hf auth login`, or set HF_TOKEN.') from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        kind, text = REFUSALS.get(status, (PushError, f'the Hub answered {status}; push again later.'))
        raise kind(f'{repo_id}: {text} The Hub says: {str(e).strip()}') from e
    except (HTTPError, ConnectionError) as e:
        raise HubUnavailableError(
            f'{repo_id}: the Hub cannot be reached ({type(e).__name__}: {e}); push again later.'
        ) from e

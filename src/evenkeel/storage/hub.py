"""Files of the hub, wherever a path is taken; a thin layer over ``huggingface_hub``.

Only what cannot execute goes up or comes down.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evenkeel.errors import StorageError

#: Kinds of files that this library writes.
SAFE = ("*.safetensors", "*.json", "*.md", "*.txt", "*.html", "*.png")
_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+(/[\w./-]+)?")


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """``user/name``, or ``user/name/file`` of a repository; and nothing that begins in a folder here.

    >>> is_hub_id("somebody/restored"), is_hub_id("somebody/restored/record.safetensors")
    (True, True)
    >>> is_hub_id("out/record.safetensors"), is_hub_id("./a/b"), is_hub_id("record"), is_hub_id("/a/b")
    (False, False, False, False)

    """
    text = os.fspath(source)
    parts = text.split("/")
    if not _ID.fullmatch(text) or Path(parts[0]).exists():
        return False
    return len(parts) > 2 or not Path(text).suffix.lstrip(".").isalpha()


def local(source: str | os.PathLike[str]) -> Path:
    """The place itself; of a hub id the file or folder in the cache, downloaded if it must be.

    Raises:
        StorageError: the hub cannot be reached, or has no such repository or file.

    """
    if not is_hub_id(source):
        return Path(source)
    import huggingface_hub as hub

    parts = os.fspath(source).split("/")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    with _explained(repo, f"download {source}"):
        if file:
            return Path(hub.hf_hub_download(repo, file))
        return Path(hub.snapshot_download(repo, allow_patterns=[*SAFE]))


def bring(place: Path, out: Path) -> Path:
    """Copy a file or folder of the cache; it appears whole or not at all."""
    beside = out.with_name(f".{out.name}.part")
    _gone(beside)  # of a copy that was killed
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, beside)
        return beside.rename(out)
    finally:
        _gone(beside)


def _gone(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.unlink()


def holds(source: str | os.PathLike[str], name: str) -> bool:
    """Whether a repository of the hub has this file; False where that cannot be known."""
    import huggingface_hub as hub

    try:
        hub.hf_hub_download(os.fspath(source), name)
    except Exception:  # whoever loads it says what is wrong
        return False
    return True


def push(place: Path, repo: str, card: str | None, *, private: bool) -> str:
    """Upload a file or folder; returns where it is.

    Args:
        place: of files that cannot execute.
        repo: ``user/name``; made if there is none.
        card: a README for it, where the folder has none.
        private: of a new repository.

    Raises:
        StorageError: nothing there, something that is not a safe file, no hub id, or the hub refuses.

    """
    import fnmatch

    import huggingface_hub as hub

    if repo.count("/") != 1 or not _ID.fullmatch(repo):
        raise StorageError(f"{repo!a} is no repository; expected USER/NAME, as the hub names them.")
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    if not files:
        raise StorageError(f"{place} holds nothing to push; give a file or folder of evenkeel's.")
    foreign = [p for p in files if not any(fnmatch.fnmatch(p.name, kind) for kind in SAFE)]
    if foreign:
        raise StorageError(
            f"{foreign[0]} is not pushed: only {', '.join(SAFE)} cannot execute. Move it out of {place}."
        )
    with _explained(repo, f"push {place}"):
        api: Any = hub.HfApi()
        api.create_repo(repo, exist_ok=True, private=private)
        if place.is_file():
            api.upload_file(path_or_fileobj=place, path_in_repo=place.name, repo_id=repo)
        else:
            api.upload_folder(folder_path=place, repo_id=repo, allow_patterns=[*SAFE])
        if card is not None:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo)
    return f"https://huggingface.co/{repo}"


def licence_of(base: str) -> str | None:
    """What the hub says of a repository's licence; None where it says nothing or cannot be asked."""
    import huggingface_hub as hub

    try:
        found: Any = hub.model_info(base).card_data
        return None if found is None else found.get("license")
    except Exception:
        return None


@contextmanager
def _explained(repo: str, what: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as e:
        raise StorageError(
            f"cannot {what}: the hub shows no repository {repo}. Is the name right? Of a private or gated "
            f"one, ask for access and log in: hf auth login."
        ) from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        if isinstance(e, errors.EntryNotFoundError) and not isinstance(
            e, errors.LocalEntryNotFoundError
        ):
            raise StorageError(f"cannot {what}: {repo} has no such file.") from e
        refused = getattr(getattr(e, "response", None), "status_code", None)
        if refused in (401, 403):
            raise StorageError(
                f"cannot {what}: the hub does not let you ({refused}). Log in with a token that may write: "
                f"hf auth login."
            ) from e
        raise StorageError(
            f"cannot {what}: the hub is out of reach and the cache does not have it. Connect, unset "
            f"HF_HUB_OFFLINE, or download it elsewhere (evenkeel pull {repo}) and give the folder."
        ) from e
    except errors.EntryNotFoundError as e:
        raise StorageError(f"cannot {what}: {repo} has no such file.") from e

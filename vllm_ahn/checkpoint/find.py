"""Turns the name of a checkpoint, ``FOLDER``, ``REPOSITORY`` or ``REPOSITORY@REVISION``, into a folder here."""

from __future__ import annotations

import pathlib
import re

from vllm_ahn.checkpoint.read import INDEX_NAME
from vllm_ahn.errors import AHNError, first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``"repo@rev"`` into ``("repo", "rev")``; anything else and every existing folder is ``(name, None)``.

    Raises `AHNError` for an empty revision and for the revision of a folder, which has none.
    """
    if "@" not in name or pathlib.Path(name).exists():
        return name, None
    repository, revision = name.rsplit("@", 1)
    if not revision:
        raise AHNError(f"{name}: nothing after the @, expected the name of a revision")
    if pathlib.Path(repository).exists():
        raise AHNError(
            f"{name}: {repository} is a folder, expected @{revision} after the name of a hub repository only"
        )
    return repository, revision


def local_folder(name: str, revision: str | None, weights: bool = True) -> pathlib.Path:
    """Return the folder that holds checkpoint `name`: itself, or what the hub's client keeps of the repository.

    Of a repository only ``config.json`` and, if `weights`, the safetensors files and their index are
    downloaded. Raises `AHNError` if there is neither a folder nor a repository of that name, or if the hub
    gives no answer.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise AHNError(f"{name}: a file, expected the folder of a checkpoint")
    if not _REPOSITORY.fullmatch(name):
        raise AHNError(f"{name}: no such folder, expected a folder or a hub repository")
    return _download(name, revision, ["config.json", *(["*.safetensors", INDEX_NAME] if weights else [])])


def _download(name: str, revision: str | None, files: list[str]) -> pathlib.Path:
    from huggingface_hub import errors, snapshot_download

    label = f"{name}@{revision}" if revision else name
    try:
        return pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError:
        problem = "the hub repository is gated, expected a token that was granted access (hf auth login)"
    except errors.RevisionNotFoundError:
        problem = f"the hub repository has no revision {revision}, expected a branch, tag or commit of it"
    except errors.RepositoryNotFoundError:
        problem = "no such folder, and no such hub repository, or it is private and needs a token (hf auth login)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = "no such folder, nor a hub repository in the local cache, and the hub cannot be reached"
    except errors.HFValidationError:
        problem = "no such folder, and no name that a hub repository can have"
    except Exception as error:  # whatever else the network, the disk or the hub's client comes up with
        problem = f"no such folder, and fetching it as a hub repository failed ({first_line(error)})"
    raise AHNError(f"{label}: {problem}")

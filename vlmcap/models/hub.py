"""Files of a checkpoint from the hub.

Asked for within bounded time, and one sentence for each way in which they are not to be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vlmcap.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_PARALLEL_FILES = 8
_LOCAL = "to a local folder in Hugging Face layout"


class HubUnreachableError(UserError):
    """A hub that gave no answer, or that must not be asked; what is packaged or cached may do instead."""


def fetch_file(checkpoint: str, name: str, revision: str | None) -> Path:
    """One file in the hub's cache, downloaded unless its current version is there.

    The library waits for a silent hub for six minutes before it gives up. A first request, which is not repeated, says
    within HF_HUB_ETAG_TIMEOUT whether the file can be had.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    get_hf_file_metadata(hf_hub_url(checkpoint, name, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return Path(hf_hub_download(checkpoint, name, revision=revision))


def fetch_files(checkpoint: str, names: Iterable[str], commit: str) -> None:
    """Downloads files of one commit, several at a time.

    `snapshot_download` is not used, as it lists the files without any time limit.
    """
    from huggingface_hub import hf_hub_download

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(lambda name: hf_hub_download(checkpoint, name, revision=commit), names))


def list_files(checkpoint: str, commit: str) -> list[str]:
    """Names of all files of a commit."""
    from huggingface_hub import HfApi, constants

    found = HfApi().model_info(checkpoint, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in found.siblings or ()]


def cached_folder(checkpoint: str, revision: str | None) -> Path | None:
    """The snapshot in the hub's cache, whole or in part, that holds a `config.json`; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(checkpoint, "config.json", revision=revision)
    except HFValidationError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def hub_error(
    error: Exception, checkpoint: str, revision: str | None, *, key: str, gate: str | None = None
) -> UserError:
    """The sentence for a download that failed.

    It repeats nothing that a server said, nor an address with a password in it.

    Args:
        error: What the library raised.
        checkpoint: Hub id.
        revision: Branch, tag or commit that was asked for.
        key: Configuration key of the checkpoint.
        gate: License that the hub wants accepted first, where it is known.
    """
    for cause in _chain(error):
        sentence = _access_sentence(cause, checkpoint, revision, key, gate)
        if sentence is not None:
            return UserError(sentence)
        if (sentence := _silence_sentence(cause, checkpoint, key)) is not None:
            return HubUnreachableError(sentence)
        if (sentence := _transfer_sentence(cause, checkpoint, key)) is not None:
            return UserError(sentence)
    return UserError(
        f"checkpoint '{checkpoint}' could not be downloaded ({type(error).__name__}): try again, or set {key} {_LOCAL}"
    )


def _access_sentence(
    error: BaseException, checkpoint: str, revision: str | None, key: str, gate: str | None
) -> str | None:
    """What the hub answered about the checkpoint."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{checkpoint}"
    license_text = f"accept its license ({gate}) at {page}" if gate else f"accept its license at {page}"
    match error:
        case errors.HFValidationError():
            return f"{key}={checkpoint} is neither a folder nor a hub id: set it {_LOCAL}, or to an id such as Qwen/Qwen3-8B"
        case errors.GatedRepoError() if _status(error) == 401:
            return (
                f"checkpoint '{checkpoint}' is gated and no account is logged in: {license_text}, and log in with `hf "
                "auth login` "
                f"or HF_TOKEN, or set {key} {_LOCAL}"
            )
        case errors.GatedRepoError():
            return (
                f"checkpoint '{checkpoint}' is gated and the account that is logged in has no access yet: "
                f"{license_text} with that "
                f"account, wait where its owners must agree, or set {key} {_LOCAL}"
            )
        case errors.RevisionNotFoundError():
            return (
                f"checkpoint '{checkpoint}' has no revision '{revision or 'main'}': set "
                f"{key.rpartition('.')[0]}.revision to a branch, "
                f"tag or commit of {page}/commits"
            )
        case errors.RemoteEntryNotFoundError():
            return (
                f"checkpoint '{checkpoint}' has no config.json on the hub: {key} must name a model in Hugging Face "
                "layout, "
                "not adapters or GGUF files alone"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"there is no folder '{checkpoint}' here, and the hub has no such model or it is private: correct "
                f"{key}, or log in with "
                "`hf auth login` to an account that may read it"
            )
        case errors.HfHubHTTPError() if _status(error) < 500:
            return _refusal(_status(error), checkpoint, key)
    return None


def _refusal(status: int, checkpoint: str, key: str) -> str:
    """The hub's answer about the one who asks."""
    if status == 401:
        return f"the hub does not accept this machine's token for '{checkpoint}' ({key}): log in again with `hf auth login`, or unset HF_TOKEN"
    if status == 403:
        return f"this machine's token may not read '{checkpoint}': give it the permission on the hub, or set {key} {_LOCAL}"
    if status == 429:
        return f"the hub refuses '{checkpoint}' after too many requests: wait some minutes, log in with `hf auth login`, or set {key} {_LOCAL}"
    return f"the hub refuses '{checkpoint}' (HTTP {status}): see https://huggingface.co/{checkpoint}, or set {key} {_LOCAL}"


def _silence_sentence(error: BaseException, checkpoint: str, key: str) -> str | None:
    """A hub that gave no usable answer.

    The kinds of the HTTP library are known by name, as it is the hub library's choice.
    """
    from huggingface_hub import constants, errors

    host, kinds = _host(constants.ENDPOINT), {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"checkpoint '{checkpoint}' is not on this machine, and HF_HUB_OFFLINE forbids its download: unset "
            "HF_HUB_OFFLINE "
            f"(and TRANSFORMERS_OFFLINE), or set {key} {_LOCAL}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"{host} is out of order (HTTP {_status(error)}), so '{checkpoint}' cannot be had: try again later, or set {key} {_LOCAL}"
    if isinstance(error, errors.FileMetadataError):
        return f"{host} does not answer like a hub when asked for '{checkpoint}': check HF_ENDPOINT and the proxy, or set {key} {_LOCAL}"
    if kinds & {"TimeoutException", "TimeoutError"}:
        limits = f"HF_HUB_ETAG_TIMEOUT={constants.HF_HUB_ETAG_TIMEOUT} and HF_HUB_DOWNLOAD_TIMEOUT={constants.HF_HUB_DOWNLOAD_TIMEOUT}"
        return (
            f"{host} stopped answering when asked for '{checkpoint}': try again, raise the seconds of {limits} on a "
            "slow line, "
            f"or set {key} {_LOCAL}"
        )
    if kinds & {"ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
        return f"{host} cannot be reached for '{checkpoint}': check the network, the proxy and HF_ENDPOINT, or set {key} {_LOCAL}"
    return None


def _transfer_sentence(error: BaseException, checkpoint: str, key: str) -> str | None:
    """A download that began and did not end."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"NetworkError", "ProtocolError", "ConnectionError"} or "Consistency check failed" in str(error):
        return (
            f"the connection broke off while '{checkpoint}' was fetched: run the same command again, which fetches "
            "what is still "
            f"missing, or set {key} {_LOCAL}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return (
            f"checkpoint '{checkpoint}' cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}): make room "
            "there, "
            f"set HF_HOME to another folder, or set {key} {_LOCAL}"
        )
    return None


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


def _host(endpoint: str) -> str:
    """Host and port of an address, without a user's name and password."""
    return urlsplit(endpoint).netloc.rpartition("@")[2]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

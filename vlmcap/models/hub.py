"""Downloads checkpoint files from the hub, with timeouts and one clear sentence for each kind of failure."""

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
_TO_FOLDER = "to a local folder in Hugging Face layout"


class HubUnreachableError(UserError):
    """The hub does not answer, or offline mode forbids asking it; packaged or cached files may suffice."""


def fetch_file(checkpoint: str, name: str, revision: str | None) -> Path:
    """Returns the path of a file in the hub's cache, after downloading it unless its current version is cached.

    huggingface_hub retries for six minutes if the hub does not respond. A first request without retries finds out
    within HF_HUB_ETAG_TIMEOUT whether the file is available.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    # `hf_hub_download` would silently take an old file from the cache if the hub does not answer.
    get_hf_file_metadata(hf_hub_url(checkpoint, name, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return Path(hf_hub_download(checkpoint, name, revision=revision))


def fetch_files(checkpoint: str, names: Iterable[str], commit: str) -> None:
    """Downloads files of one commit in parallel.

    `snapshot_download` is not used, because it lists the files without a timeout.
    """
    from huggingface_hub import hf_hub_download

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        # `list` waits for all of them, and raises the first exception.
        list(pool.map(lambda name: hf_hub_download(checkpoint, name, revision=commit), names))


def list_files(checkpoint: str, commit: str) -> list[str]:
    """Returns the names of all files of a commit."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(checkpoint, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()]


def cached_folder(checkpoint: str, revision: str | None) -> Path | None:
    """Returns the cached snapshot with a `config.json`, complete or not; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(checkpoint, "config.json", revision=revision)
    except HFValidationError:  # not a hub id
        return None
    # A path, None if unknown, or a marker for a file that the hub is known not to have.
    return Path(file).parent if isinstance(file, str) else None


def hub_error(
    error: Exception, checkpoint: str, revision: str | None, *, key: str, gate: str | None = None
) -> UserError:
    """Converts the exception of a failed download to an error for the user.

    The message repeats neither the server's response nor an address, which may contain a password.

    Args:
        error: Exception of the library.
        checkpoint: Hub id.
        revision: Requested branch, tag or commit.
        key: Configuration key of the checkpoint.
        gate: License that must be accepted on the hub, if known.
    """
    # An exception in the chain that says more than the one that was raised, such as a timeout behind a missing file.
    for cause in _chain(error):
        message = _access_message(cause, checkpoint, revision, key, gate)
        # The order matters: refused access, then an unreachable hub, then a broken transfer.
        if message is not None:
            return UserError(message)
        if (message := _unreachable_message(cause, checkpoint, key)) is not None:
            return HubUnreachableError(message)
        if (message := _transfer_message(cause, checkpoint, key)) is not None:
            return UserError(message)
    return UserError(
        f"checkpoint '{checkpoint}' could not be downloaded ({type(error).__name__}): try again, or set {key} "
        f"{_TO_FOLDER}"
    )


def _access_message(
    error: BaseException, checkpoint: str, revision: str | None, key: str, gate: str | None
) -> str | None:
    """Returns the message if the hub refused access to the checkpoint or does not have it."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{checkpoint}"
    license_text = f"accept its license ({gate}) at {page}" if gate else f"accept its license at {page}"
    match error:
        case errors.HFValidationError():
            return (
                f"{key}={checkpoint} is neither a folder nor a hub id: set it {_TO_FOLDER}, or to an id such as "
                "Qwen/Qwen3-8B"
            )
        # 401: not logged in. The other status of a gated repository is 403: logged in, but without access.
        case errors.GatedRepoError() if _status(error) == 401:
            return (
                f"checkpoint '{checkpoint}' is gated and no account is logged in: {license_text}, and log in with "
                f"`hf auth login` or HF_TOKEN, or set {key} {_TO_FOLDER}"
            )
        case errors.GatedRepoError():
            return (
                f"checkpoint '{checkpoint}' is gated and the account that is logged in has no access yet: "
                f"{license_text} with that account, wait if its owners must approve, or set {key} {_TO_FOLDER}"
            )
        case errors.RevisionNotFoundError():
            return (
                f"checkpoint '{checkpoint}' has no revision '{revision or 'main'}': set "
                f"{key.rpartition('.')[0]}.revision to a branch, tag or commit of {page}/commits"
            )
        case errors.RemoteEntryNotFoundError():
            return (
                f"checkpoint '{checkpoint}' has no config.json on the hub: {key} must name a model in Hugging Face "
                "layout, not adapters or GGUF files alone"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"there is no folder '{checkpoint}' here, and the hub has no such model or it is private: correct "
                f"{key}, or log in with `hf auth login` to an account that may read it"
            )
        # Statuses from 500 on are faults of the hub.
        case errors.HfHubHTTPError() if _status(error) < 500:
            return _status_message(_status(error), checkpoint, key)
    return None


def _status_message(status: int, checkpoint: str, key: str) -> str:
    """Returns the message for an HTTP status below 500 without an exception type of its own."""
    or_folder = f"or set {key} {_TO_FOLDER}"
    if status == 401:
        return (
            f"the hub does not accept this machine's token for '{checkpoint}' ({key}): log in again with "
            "`hf auth login`, or unset HF_TOKEN"
        )
    if status == 403:
        return f"this machine's token may not read '{checkpoint}': give it the permission on the hub, {or_folder}"
    if status == 429:
        return (
            f"the hub refuses '{checkpoint}' after too many requests: wait some minutes, log in with "
            f"`hf auth login`, {or_folder}"
        )
    return f"the hub refuses '{checkpoint}' (HTTP {status}): see https://huggingface.co/{checkpoint}, {or_folder}"


def _unreachable_message(error: BaseException, checkpoint: str, key: str) -> str | None:
    """Returns the message if the hub gave no usable response.

    Exceptions of the HTTP library are recognised by name, because huggingface_hub decides which library it uses.
    """
    from huggingface_hub import constants, errors

    # Names instead of classes, because httpx and requests have classes of their own for the same fault.
    host, kinds = _host(constants.ENDPOINT), {kind.__name__ for kind in type(error).__mro__}
    or_folder = f"or set {key} {_TO_FOLDER}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"checkpoint '{checkpoint}' is not on this machine, and HF_HUB_OFFLINE forbids its download: unset "
            f"HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE), {or_folder}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return (
            f"{host} is out of order (HTTP {_status(error)}), so '{checkpoint}' cannot be downloaded: try again later, "
            f"{or_folder}"
        )
    if isinstance(error, errors.FileMetadataError):
        return (
            f"{host} does not answer like a hub when asked for '{checkpoint}': check HF_ENDPOINT and the proxy, "
            f"{or_folder}"
        )
    if kinds & {"TimeoutException", "TimeoutError"}:
        limits = " and ".join(
            f"{name}={getattr(constants, name)}" for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
        )
        return (
            f"{host} stopped answering when asked for '{checkpoint}': try again, raise the seconds of {limits} on a "
            f"slow line, {or_folder}"
        )
    if kinds & {"ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
        return f"{host} cannot be reached for '{checkpoint}': check the network, the proxy and HF_ENDPOINT, {or_folder}"
    return None


def _transfer_message(error: BaseException, checkpoint: str, key: str) -> str | None:
    """Returns the message if a download started but did not finish."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}
    # `huggingface_hub` raises a plain error with this text if a file has another size than the hub states.
    if kinds & {"NetworkError", "ProtocolError", "ConnectionError"} or "Consistency check failed" in str(error):
        return (
            f"the connection broke off while '{checkpoint}' was downloaded: run the same command again, which "
            f"downloads what is still missing, or set {key} {_TO_FOLDER}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return (
            f"checkpoint '{checkpoint}' cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}): make room "
            f"there, set HF_HOME to another folder, or set {key} {_TO_FOLDER}"
        )
    return None


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


def _host(endpoint: str) -> str:
    """Returns host and port of an address, without user name and password."""
    # "https://user:password@host:8080/path" -> "host:8080"
    return urlsplit(endpoint).netloc.rpartition("@")[2]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes, the latest first."""
    while error is not None:
        yield error
        # `raise … from error` sets the cause, an exception inside of an `except` block the context.
        error = error.__cause__ or error.__context__

"""Translation of the Hub client's errors, on reads and writes, into plain sentences without a token in them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import HubError, NoSpaceError
from ..text import without_secrets

LOG_IN = "log in (`hf auth login`), or set HF_TOKEN"


@contextmanager
def translated_errors(action: str) -> Iterator[None]:
    """Translate every failure of the Hub client inside the block into an error that says what to do.

    Args:
        action: what the block does, as it follows "cannot": "publish to org/name".

    Raises:
        HubError: the reason, in one sentence, without a token in it.
        NoSpaceError: the disk is full.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import errors

    refusals = (
        *(HTTPError, InvalidURL, errors.HFValidationError, errors.OfflineModeIsEnabled),
        *(errors.EntryNotFoundError, errors.RevisionResolutionError, errors.DryRunError, errors.FileMetadataError),
        *(errors.XetDownloadError, errors.LocalTokenNotFoundError, errors.OIDCError, errors.DeviceCodeError),
    )
    try:
        yield
    except refusals as error:
        raise HubError(f"cannot {action}: {_explain(error)}") from (None if _contains_token(error) else error)
    except (OSError, RuntimeError) as error:  # from the disk, or from a transfer that ended early
        if isinstance(error, HubError | NoSpaceError) or (isinstance(error, OSError) and error.errno):
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(
                    f"cannot {action}: the disk is full ({error.filename or error.strerror})"
                ) from error
            raise
        cause = error.__cause__
        reason = _explain(cause) if isinstance(cause, refusals) else _explain_broken_transfer(error)
        raise HubError(f"cannot {action}: {reason}") from (None if _contains_token(error) else error)


def refuse_token(token: str | bool | None = None) -> None:
    """Raise HubError for a token with impossible characters, before it is sent and shown in an error elsewhere."""
    from huggingface_hub import get_token

    given = get_token() if token is None else token
    if isinstance(given, str) and not re.fullmatch(r"[\x21-\x7e]+", given):
        raise HubError(f"the Hub token contains characters that no token has; copy it again, then {LOG_IN}")


def _explain(error: BaseException) -> str:
    """Explain an error of the Hub client and say what to do."""
    import httpx2
    from huggingface_hub import errors

    cached = isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
    while (
        isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
        and error.__cause__ is not None
    ):
        error = error.__cause__
    prefix = "it is not in the cache, and " if cached else ""
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_response(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{prefix}offline (HF_HUB_OFFLINE is set); run it once with a connection"
    if isinstance(error, errors.HFValidationError):
        return f"the name is not valid on the Hub ({_first_line(error)})"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"{prefix}there is no connection to {_endpoint()} ({type(error).__name__}); try again with one"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache, and the Hub cannot be reached; try again with a connection"
    if isinstance(error, httpx2.HTTPError | errors.XetDownloadError | errors.FileMetadataError):
        return _explain_broken_transfer(error)
    return f"{_first_line(error)}; {LOG_IN}" if isinstance(error, errors.OIDCError) else _first_line(error)


def _explain_response(error: Any) -> str:
    """Explain an error response of the Hub."""
    from huggingface_hub import errors

    code, message = error.response.status_code, _first_line(error)
    repo = getattr(error, "repo_id", None)
    if isinstance(error, errors.GatedRepoError):
        page = f"{_endpoint()}/{repo}" if repo else "its page"
        return f"it is gated; accept its terms at {page}, then {LOG_IN}"
    if _rejects_token(error):
        page = f"{_endpoint()}/settings/tokens"
        return f"the Hub rejects the token, which is invalid or has expired; create one at {page} and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo or 'of that name'}, or it is private; check its name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo or 'the repository'} has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"there is no such file ({message})"
    if isinstance(error, errors.DisabledRepoError):
        return "the repository was disabled by the Hub"
    if code == 401:
        return f"the Hub requires authentication; {LOG_IN}"
    if code == 403:
        return f"the account or its token lacks permission ({message}); use one that has it: {LOG_IN}"
    if code in (409, 412):
        return f"somebody else changed it meanwhile, or it already exists ({message}); check, and run it again"
    if code == 429:
        return "the Hub's rate limit is reached; wait a few minutes and run it again"
    if code >= 500:
        return f"the Hub reports a server error ({code}); run it again later"
    return f"the Hub refuses ({code}: {message})"


def denies_access(error: Any) -> bool:
    """Whether a response denies access to an existing repository, rather than saying that there is none."""
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError) or _rejects_token(error)


def _rejects_token(error: Any) -> bool:
    """Whether a response is about the token rather than about what was requested."""
    message = (error.server_message or "").lower()
    return error.response.status_code == 401 and ("expired" in message or "credentials in auth" in message)


def _explain_broken_transfer(error: BaseException) -> str:
    return f"the transfer broke off ({_first_line(error)}); run it again, and complete files are not sent again"


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without tokens."""
    text = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip()
    return without_secrets(text.splitlines()[0].rstrip(".") if text else type(error).__name__)


def _contains_token(error: BaseException | None) -> bool:
    """Whether a token is in an error or in any of its causes."""
    while error is not None:
        if without_secrets(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT

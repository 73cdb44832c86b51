"""What the Hub refuses, for reading or writing, in plain words, and without a token in them."""

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
def speaking(what: str) -> Iterator[None]:
    """Whatever the Hub refuses or cannot inside, for reading or writing, raises an error that says what to do.

    Args:
        what: what is done inside, as it follows on "cannot": "publish to org/name".

    Raises:
        HubError: the reason, in one sentence, without a token in it.
        NoSpaceError: the disk runs full.
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
        raise HubError(f"cannot {what}: {_why(error)}") from (None if _tells(error) else error)
    except (OSError, RuntimeError) as error:  # of the disk; of a transfer that came to an end early
        if isinstance(error, HubError | NoSpaceError) or (isinstance(error, OSError) and error.errno):
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"cannot {what}: the disk is full ({error.filename or error.strerror})") from error
            raise
        why = _why(error.__cause__) if isinstance(error.__cause__, refusals) else _broken_off(error)
        raise HubError(f"cannot {what}: {why}") from (None if _tells(error) else error)


def refuse_token(token: str | bool | None = None) -> None:
    """Raise HubError for a token with characters that none has, before it is sent, and shown in somebody's error."""
    from huggingface_hub import get_token

    given = get_token() if token is None else token
    if isinstance(given, str) and not re.fullmatch(r"[\x21-\x7e]+", given):
        raise HubError(f"the Hub's token has characters in it that no token has; copy it again, then {LOG_IN}")


def _why(error: BaseException) -> str:
    """What the Hub means, and what to do."""
    import httpx2
    from huggingface_hub import errors

    cached = isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
    while (
        isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError | errors.DryRunError)
        and error.__cause__ is not None
    ):
        error = error.__cause__
    beside = "it is not in the cache, and " if cached else ""
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{beside}offline (HF_HUB_OFFLINE is set); do it with a connection, and once is enough"
    if isinstance(error, errors.HFValidationError):
        return f"that is no name the Hub knows ({_said(error)})"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"{beside}there is no connection to {_endpoint()} ({type(error).__name__}); try again with one"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache, and the Hub cannot be reached; try again with a connection"
    if isinstance(error, httpx2.HTTPError | errors.XetDownloadError | errors.FileMetadataError):
        return _broken_off(error)
    return f"{_said(error)}; {LOG_IN}" if isinstance(error, errors.OIDCError) else _said(error)


def _status(error: Any) -> str:
    """What an answer of the Hub means."""
    from huggingface_hub import errors

    code, said = error.response.status_code, _said(error)
    repo = getattr(error, "repo_id", None)
    if isinstance(error, errors.GatedRepoError):
        place = f"{_endpoint()}/{repo}" if repo else "its page"
        return f"it is gated; accept its terms at {place}, then {LOG_IN}"
    if _refuses_token(error):
        place = f"{_endpoint()}/settings/tokens"
        return f"the Hub does not take the token, it is invalid or has expired; make one at {place} and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo or 'of that name'}, or only for others; check its name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo or 'the repository'} has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"there is no such file ({said})"
    if isinstance(error, errors.DisabledRepoError):
        return "the repository was disabled by the Hub"
    if code == 401:
        return f"the Hub wants to know who asks; {LOG_IN}"
    if code == 403:
        return f"the account or its token may not do that ({said}); use one that may: {LOG_IN}"
    if code in (409, 412):
        return f"somebody else changed it meanwhile, or it is there already ({said}); look, and run it again"
    if code == 429:
        return "the Hub takes no more requests from here for now; wait some minutes and run it again"
    if code >= 500:
        return f"the Hub has a fault of its own ({code}); run it again later"
    return f"the Hub refuses ({code}: {said})"


def refuses_who_asks(error: Any) -> bool:
    """Whether it says that a repository is there, but not for these eyes; not that there is none."""
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError) or _refuses_token(error)


def _refuses_token(error: Any) -> bool:
    """Whether an answer is about the token, and not about what was asked for."""
    said = (error.server_message or "").lower()
    return error.response.status_code == 401 and ("expired" in said or "credentials in auth" in said)


def _broken_off(error: BaseException) -> str:
    return f"the transfer broke off ({_said(error)}); run it again, and files that came whole are not sent again"


def _said(error: BaseException) -> str:
    """The first words of an error, without tokens."""
    text = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip()
    return without_secrets(text.splitlines()[0].rstrip(".") if text else type(error).__name__)


def _tells(error: BaseException | None) -> bool:
    """Whether a token is in an error, or in what caused it."""
    while error is not None:
        if without_secrets(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT

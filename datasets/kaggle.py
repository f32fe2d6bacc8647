"""Download and unpack public Kaggle data sets, with or without credentials."""

import contextlib
import functools
import io
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from datasets.folder import list_folder
from datasets.images import NO_ROOM, DatasetError, building

PAGES = "https://www.kaggle.com/datasets"
CREDENTIALS = "KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY, or ~/.kaggle"
MAX_UNPACKED = 8 * 2**30  # bytes; the larger of the two sets has half a GiB
MAX_RATIO = 100  # unpacked to packed size: photographs hardly shrink, zip bombs do
MAX_MEMBERS = 100_000
TIMEOUT = 30.0  # seconds without an answer or a further byte
CHUNK = 2**20  # bytes
REFUSALS = {  # HTTP status, and its meaning and remedy
    401: f"the credentials are missing or not valid; set, renew or remove them in {CREDENTIALS}",
    403: f"access is refused; accept the data set's rules on its page, or use another account in {CREDENTIALS}",
    404: "there is no such data set any more, or these credentials may not see it; look at its page",
    429: "it had too many requests from here; wait some minutes and run again",
}


def download(slug: str, target: Path) -> None:
    """Download the data set `owner/name` and unpack it to the folder `target`, which appears only when complete.

    Raises
    ------
    DatasetError
        There is no network, Kaggle refuses, or the archive is damaged, unsafe or not the data set.
    OSError
        The parent of `target` cannot be written, or the disk is full.
    """
    with building(target) as partial:
        if target.is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            archive = Path(scratch) / f"{slug.split('/')[1]}.zip"
            _fetch(slug, archive)
            unpack(archive, partial)
        try:
            list_folder(partial)
        except DatasetError:
            raise DatasetError(
                f"{archive.name} from Kaggle unpacks to no train/<class>/ with images, so it is not the data set; "
                f"look at {PAGES}/{slug}"
            ) from None


def unpack(archive: Path, target: Path) -> None:
    """Unpack an untrusted zip file into `target`.

    Raises
    ------
    DatasetError
        The archive is damaged, would write outside `target`, holds links, or unpacks to an implausible size.
    OSError
        The disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            _check_members(file, archive, target)
            file.extractall(target)  # reads only the size in a member's header, and checks its CRC
    except DatasetError:
        raise
    except Exception as error:  # zipfile raises a dozen errors for damaged files
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        reason = " ".join(str(error).split())[:200] or error.__class__.__name__
        raise DatasetError(f"{archive.name} cannot be unpacked ({reason}); run again to download it anew") from None


def _check_members(file: zipfile.ZipFile, archive: Path, target: Path) -> None:
    members = file.infolist()
    size, packed = sum(member.file_size for member in members), archive.stat().st_size
    if size > MAX_UNPACKED or size > MAX_RATIO * max(packed, 2**20):
        raise DatasetError(
            f"{archive.name} would unpack to {size:,} bytes, which no set of photographs does; do not use it"
        )
    if len(members) > MAX_MEMBERS:
        raise DatasetError(f"{archive.name} holds {len(members):,} files, more than {MAX_MEMBERS:,}; do not use it")
    for member in members:
        path = (target / member.filename).resolve()
        if not path.is_relative_to(target.resolve()) or stat.S_ISLNK(member.external_attr >> 16):
            raise DatasetError(
                f"{archive.name} holds {member.filename!r}, which leads out of its folder; do not use it"
            )


def _fetch(slug: str, archive: Path) -> None:
    """Download the archive through Kaggle's client.

    Messages of client and server are never shown, since they may quote the credentials. The client's own download
    function repeats a failed download for more than a minute, even for a full disk, so it is not used.
    """
    failed = f"cannot download {PAGES}/{slug}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            response = _ask(slug)
    except (Exception, SystemExit) as error:  # of the client, requests or http.client
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's: the client has a folder for its settings
        raise DatasetError(f"{failed}: {_reason(error)}") from None
    with response:
        if "html" in response.headers.get("Content-Type", ""):
            raise DatasetError(f"{failed}: a web page came instead; log in to this network if required, and run again")
        length = response.headers.get("Content-Length", "")
        total = -(-int(length) // CHUNK) if length.isdecimal() else None  # chunks
        try:
            with archive.open("wb") as file, Progress(console=Console(stderr=True)) as bar:
                for chunk in bar.track(response.iter_content(CHUNK), total, description=f"downloading {archive.stem}"):
                    file.write(chunk)
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's: errors of requests have no number
            raise DatasetError(f"{failed}: the connection broke off before the end of the archive; run again") from None


def _ask(slug: str) -> Any:
    """Return the response of requests; its body, the archive, is still unread."""
    import kaggle  # asks the server about a token, and prints advice without credentials
    from kaggle.api.kaggle_api_extended import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = slug.split("/")
    with kaggle.api.build_kaggle_client() as client:
        session = client.http_client()._session
        session.send = functools.partial(session.send, timeout=TIMEOUT)  # the client sets none
        return client.datasets.dataset_api_client.download_dataset(request)


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP {status}, {REFUSALS.get(status, 'which says nothing more; try again later')}"
    kind = error.__class__.__name__
    if isinstance(error, OSError) and not isinstance(error, ValueError):  # requests' network errors
        return f"no network, or Kaggle does not answer ({kind}); check the connection and run again"
    return f"its client fails ({kind}); check the proxy's address, and the credentials in {CREDENTIALS}"

"""Download of public Kaggle data sets, with or without credentials, and their unpacking."""

import contextlib
import io
import stat
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from datasets.images import DatasetError, list_folder, move_into_place

OWNER = "samuelcortinhas"  # published both photo data sets
MAX_UNPACKED = 8 * 2**30  # bytes; the larger of the two sets has half a GiB
MAX_RATIO = 100  # unpacked to packed; photographs hardly shrink, a zip bomb does


def download(name: str, target: Path) -> None:
    """Fetch `OWNER/name` from Kaggle and unpack it as the folder `target`, which appears only when it is whole.

    Raises
    ------
    DatasetError
        No network, a refusal by Kaggle, or an archive that is damaged or unsafe.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
        # The client prints its advice on credentials to stdout at import, and leaves by SystemExit.
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import kaggle
            with contextlib.redirect_stdout(sys.stderr):
                kaggle.api.dataset_download_files(f"{OWNER}/{name}", path=partial, quiet=False)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the client's own, those of requests, OSError
            raise DatasetError(f"cannot download {OWNER}/{name} from Kaggle: {_reason(error)}") from None
        archive = Path(partial) / f"{name}.zip"
        unpack(archive, Path(partial) / "unpacked")
        list_folder(Path(partial) / "unpacked")  # is it the data set at all?
        move_into_place(Path(partial) / "unpacked", target)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip file from elsewhere into `target`.

    Raises
    ------
    DatasetError
        The archive is damaged, would write outside `target`, holds links, or unpacks to an absurd size.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            size, packed = (sum(getattr(member, key) for member in members) for key in ("file_size", "compress_size"))
            if size > MAX_UNPACKED or size > MAX_RATIO * max(packed, 2**20):
                raise DatasetError(f"{archive.name} would unpack to {size:,} bytes, which no set of photographs does")
            for member in members:
                path = (target / member.filename).resolve()
                if not path.is_relative_to(target.resolve()) or stat.S_ISLNK(member.external_attr >> 16):
                    raise DatasetError(f"{archive.name} holds {member.filename!r}, which leads out of its folder")
            file.extractall(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: encrypted
        raise DatasetError(f"{archive.name} cannot be unpacked ({error}); try the download again") from None


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {401: "the credentials are not valid", 403: "access is refused", 404: "there is no such data set",
             429: "too many requests, wait a while"}  # fmt: skip
    if status in known:
        return f"{known[status]} (HTTP {status})"
    if error.__class__.__module__.startswith("requests") and status is None:
        return "no network, or Kaggle does not answer"
    return " ".join(str(error).split())[:200] or error.__class__.__name__

"""Download a file whose SHA-256 is known."""

import hashlib
import time
from pathlib import Path

from utils.files import atomic_write


def download(path: Path, url: str, sha256: str, attempts: int = 3, timeout: float = 10.0) -> Path:
    """Download `url` to `path`, checked by status, length and hash, and written atomically.

    Proxies of the environment (HTTPS_PROXY, ...) are used. timeout: seconds without any answer. Raises OSError with the
    reason after `attempts` tries. Then nothing is left behind, and a file that was at `path` before is unchanged.
    """
    import requests

    for attempt in range(attempts):
        time.sleep(min(attempt, 5))
        try:
            response = requests.get(url, timeout=timeout)
            response.raise_for_status()
            received = hashlib.sha256(response.content).hexdigest()
            if received != sha256:
                raise ValueError(f"its SHA-256 is {received[:16]}..., expected {sha256[:16]}...")
        except (requests.RequestException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        with atomic_write(path) as temporary:
            temporary.write_bytes(response.content)
        return path
    raise OSError(f"could not download {url}: {problem}")

"""Download a file whose SHA-256 is known."""

import time
from pathlib import Path

from utils.files import atomic_write, sha256_of


def download(path: Path, url: str, sha256: str, attempts: int = 3, timeout: float = 10.0) -> Path:
    """Download `url` to `path`, streamed, checked by status and hash, and written atomically.

    Raises OSError with the reason after `attempts` tries. Then nothing is left behind, and a file that was at `path`
    before is unchanged.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    problem = "no attempt made"
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(2 ** (attempt - 1), 5))
        try:
            with atomic_write(path) as temporary:
                with requests.get(url, stream=True, timeout=timeout) as response, open(temporary, "wb") as file:
                    response.raise_for_status()
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                if (received := sha256_of(temporary)) != sha256:
                    raise ValueError(f"its SHA-256 is {received[:16]}..., expected {sha256[:16]}...")
            return path
        except (requests.RequestException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise OSError(f"could not download {url}: {problem}")

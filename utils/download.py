"""Download a file whose SHA-256 is known."""

import time
from pathlib import Path

from utils.files import atomic_write, sha256_of

MOST_BYTES = 1 << 26  # a longer answer is none of ours
MOST_SECONDS = 300.0  # for one attempt


def download(path: Path, url: str, sha256: str, attempts: int = 3, timeout: float = 10.0) -> Path:
    """Download `url` to `path`, checked by status, length, time and hash, and written atomically.

    Proxies of the environment (HTTPS_PROXY, ...) are used. timeout: seconds without any answer. Raises OSError with the
    reason after `attempts` tries. Then nothing is left behind, and a file that was at `path` before is unchanged.
    """
    import requests
    from requests.packages.urllib3.exceptions import HTTPError

    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        time.sleep(min(attempt, 5))
        try:
            with atomic_write(path) as temporary:
                with requests.get(url, stream=True, timeout=timeout) as response:
                    response.raise_for_status()
                    temporary.write_bytes(read_body(response.raw))
                if (received := sha256_of(temporary)) != sha256:
                    raise ValueError(f"its SHA-256 is {received[:16]}..., expected {sha256[:16]}...")
            return path
        except (requests.RequestException, HTTPError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise OSError(f"could not download {url}: {problem}")


def read_body(stream) -> bytes:
    """The body of a streamed answer. Raises ValueError if it is too long or takes too long."""
    body, start = b"", time.monotonic()
    while chunk := stream.read1(1 << 16, decode_content=True):  # what has arrived: a drip does not block
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        if time.monotonic() - start > MOST_SECONDS:
            raise ValueError(f"only {len(body):,} bytes came in {MOST_SECONDS:.0f} seconds")
    return body

"""Certificates for tests of TLS, made by the commands that one would type."""

import subprocess
from pathlib import Path


def certificates(folder: Path, *names: str) -> None:
    """An authority of its own, `ca.pem`, and for each name the certificate `.pem` and a `.key` it signs."""

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True, timeout=30)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-days", "30", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=home")
    for name in names:
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30", "-out", f"{name}.pem")
        openssl("x509", "-req", "-in", f"{name}.csr", *sign)

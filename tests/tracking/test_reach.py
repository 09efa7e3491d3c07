import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from metadist.tracking.reach import shortened, unwritable


def test_of_a_network_that_fails_the_systems_own_words_are_said_and_no_long_text_is_cut_in_them():
    def ending(text, *causes):
        try:
            raise causes[0] from (ending("around it", *causes[1:]) if causes[1:] else None)
        except Exception as error:
            outer = RuntimeError(text)
            outer.__cause__ = error
            return outer

    layers = "API request to http://me:hush@server:5000/x failed with exception " + "x" * 400
    assert shortened(ending(layers, OSError("layer"), ConnectionRefusedError(111, "Connection refused"))) == (
        "Connection refused"
    )
    assert shortened(ending(layers, TimeoutError("timed out"))) == "timed out"
    said = shortened(ending("no such run\nmore", ValueError("inner")))
    assert said == "no such run"
    assert shortened(ending(layers, ValueError("inner"))).endswith("x ...") and "hush" not in shortened(
        ending(layers, OSError("x"))
    )


class Taking(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format, *args):
        pass


class OtherName(Taking):
    """As MLflow's server answers to a name that it was not started with."""

    def do_POST(self):
        self.send_error(403, "Forbidden", "Invalid Host header - possible DNS rebinding attack detected")


def test_a_server_that_was_not_told_its_name_is_not_one_that_wants_a_password():
    with HTTPServer(("localhost", 0), OtherName) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        said = unwritable(f"http://localhost:{server.server_port}")
        assert said.endswith(f"--allowed-hosts 'localhost:{server.server_port}'") and "PASSWORD" not in said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, to make a certificate with")
def test_a_server_is_asked_with_the_certificate_that_mlflow_is_told_of(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    made += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(made, check=True, capture_output=True)
    server, context = HTTPServer(("localhost", 0), Taking), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"https://localhost:{server.server_port}"
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH", raising=False)
        assert "certificate" in unwritable(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        assert unwritable(uri) == ""
    finally:
        server.shutdown()
        server.server_close()

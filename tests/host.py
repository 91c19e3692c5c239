"""A download host on this machine, and what it serves."""

import io
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Host(ThreadingHTTPServer):
    """Answers every request with `status` and `content`, of which it sends the first `sent` bytes only."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/flickr8k.zip"
        self.status, self.content, self.sent, self.chunked, self.requests = 200, b"", None, False, 0


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        host = self.server
        host.requests += 1
        self.send_response(host.status)
        if host.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(host.content)))
        self.end_headers()
        if host.chunked:
            self.wfile.write(f"{len(host.content):x}\r\n".encode())
        self.wfile.write(host.content[: host.sent])
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """A running host; it is gone after the context."""
    with Host() as host:
        thread = threading.Thread(target=host.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield host
        finally:
            host.shutdown()
            thread.join()


def archive_of(folder, leave_out=(), extra=()):
    """The zip file of `folder` as bytes, without the files named in `leave_out`, with the (path, text) of `extra`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in leave_out:
                file.write(path, path.relative_to(folder))
        for path, text in extra:
            file.writestr(path, text)
    return buffer.getvalue()

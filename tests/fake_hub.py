"""Hugging Face's hub on loopback: as much of its interface as making a repository and fetching it asks for."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, SHA = "hf_token_of_the_tests", "c" * 40


class FakeHub(BaseHTTPRequestHandler):
    """Repositories are files by name in ``server.repositories``; all requests are noted in ``server.asked``."""

    protocol_version = "HTTP/1.1"

    def answer(self, code, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        content, hub = self.body(), self.server.repositories
        self.server.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            if name in hub:
                return self.answer(409, {"error": "You already created this model repo"})
            hub[name] = {}
            self.server.created.append(given)
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if what == "preupload":
            files = [each["path"] for each in json.loads(content)["files"]]
            told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": told})
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                hub[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"http://{self.headers['Host']}/{name}/commit/{SHA}"
        return self.answer(200, {"commitUrl": address, "commitOid": SHA, "success": True})

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path, hub = self.path.partition("?")[0], self.server.repositories
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = hub.get(found[1], {})
            oid = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
            told = [{"type": "file", "path": p, "size": len(c), "oid": oid[p]} for p, c in files.items()]
            return self.answer(200, told)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if found[1] not in hub:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": path} for path in hub[found[1]]]
            return self.answer(200, {"id": found[1], "sha": SHA, "siblings": siblings})
        name, file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path).groups()
        content = hub[name].get(file)
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@contextmanager
def fake_hub():
    """A hub that nobody has used yet; its address is ``endpoint``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repositories, server.asked, server.created = {}, [], []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

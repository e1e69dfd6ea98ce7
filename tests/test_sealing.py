"""The digest that a file carries of itself, against hashlib on the whole of it."""

import hashlib
import zipfile

import pytest

from kshot import sealing
from kshot.errors import UserError
from kshot.sealing import BLANK, add_zip_comment, check_seal, seal


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1 << 20])
@pytest.mark.parametrize("before", [0, 3, 150])
def test_the_digest_is_that_of_the_file_with_its_blank(chunk, before, tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "CHUNK", chunk)
    file, content = tmp_path / "a", before * b"x" + BLANK.encode() + b"after"
    file.write_bytes(content)
    seal(file)
    expected = hashlib.sha256(content).hexdigest().encode()
    assert file.read_bytes() == before * b"x" + b"kshot-sha256:" + expected + b"after"
    assert check_seal(file)
    file.write_bytes(file.read_bytes() + b".")
    with pytest.raises(UserError, match="damaged or edited"):
        check_seal(file)


@pytest.mark.parametrize("content", [b"", b"x", b"kshot-sha256"])
def test_a_file_without_one(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    assert not check_seal(tmp_path / "a")


def test_as_the_comment_of_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("name", "content")
    add_zip_comment(tmp_path / "a.zip")
    seal(tmp_path / "a.zip")
    assert check_seal(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("name") == b"content"
        assert archive.comment.startswith(b"kshot-sha256:")

"""A folder at a URL and the local one in its place: holes for what is there, whole files, and none of the temporary name."""

import pytest

from clip4vla.errors import UserError
from clip4vla.io.out_folder import PIECE, OutFolder, open_out


@pytest.fixture
def there(tmp_path):
    """A folder with a large note, a tar and a file of another kind; it is also a URL of a file system with real folders."""
    folder = tmp_path / "there"
    (folder / ".parts").mkdir(parents=True)
    (folder / "a.tar").write_bytes(bytes(range(256)) * 400)
    (folder / ".parts/a.json").write_bytes(b"n" * (2 * PIECE + 5))
    (folder / "check.html").write_text("page")
    return folder


def test_what_is_there_is_a_hole_until_it_is_pulled(there):
    with open_out(f"file://{there}/") as out:
        tar, note = out.local / "a.tar", out.local / ".parts/a.json"
        assert {path.name for path in out.local.rglob("*.*")} == {"a.tar", "a.json", ".parts"}
        assert tar.stat().st_size == 102400 and tar.stat().st_blocks == 0 == note.stat().st_blocks
        out.pull([note, out.local / ".parts/b.json"])
        assert note.read_bytes() == (there / ".parts/a.json").read_bytes() and tar.stat().st_blocks == 0
        (there / "b.tar").write_bytes(b"another's")
        out.refresh()
        assert (out.local / "b.tar").stat().st_size == 9 and note.read_bytes()[:1] == b"n"
        assert out.shown(note) == f"file://{there}/.parts/a.json"
    assert not out.local.exists()


def test_a_file_appears_whole_and_leaves_a_hole(there):
    with open_out(f"file://{there}") as out:
        for name in ("a.tar", "new.tar"):
            (out.local / name).write_bytes(b"whole" * 1000)
            out.publish(out.local / name, keep=False)
            assert (there / name).read_bytes() == b"whole" * 1000
            assert ((out.local / name).stat().st_size, (out.local / name).stat().st_blocks) == (5000, 0)
        out.remove(out.local / "a.tar")
        out.remove(out.local / "never.tar")
    assert {path.name for path in there.iterdir()} == {".parts", "new.tar", "check.html"}


def test_an_error_names_the_url_alone(there):
    url = f"file://{there}"
    with pytest.raises(UserError) as raised, open_out(url) as out:
        raise UserError(f"{out.local}/a.tar: bad")
    assert str(raised.value) == f"{url}/a.tar: bad"
    with (
        pytest.raises(UserError, match="a.tar/x.json: cannot be written: .*: start again when it answers"),
        open_out(url) as out,
    ):
        (out.local / "x.json").touch()
        OutFolder(f"{url}/a.tar", out.local).publish(out.local / "x.json")


def test_a_local_folder_is_itself(there):
    with open_out(str(there)) as out:
        assert out.local == there and out.shown(there / "a.tar") == f"{there}/a.tar"
        out.refresh()
        out.pull([there / "a.tar"])
        out.publish(there / "a.tar", keep=False)
        assert (there / "a.tar").stat().st_blocks > 0
        out.remove(there / "a.tar")
    assert not (there / "a.tar").exists()

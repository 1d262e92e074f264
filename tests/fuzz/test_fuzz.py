"""The first hundred cases; `make fuzz` runs ten thousand. And that what must not be done is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_a_hundred_mutated_inputs():
    done = subprocess.run([sys.executable, str(HERE), "--count", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("deed", "found"),
    [
        ("open('case/in/a.png').read(); open('case/out.png', 'w').close(); os.mkdir('home/x')", ""),
        ("os.system('true')", "os.system"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("open('written', 'a')", "open for writing"),
        ("os.open('written', os.O_CREAT)", "open for writing"),
        ("os.rename('case/in/a.png', 'case/b.png')", "os.rename"),
        ("pathlib.Path('case/in/a.png').unlink()", "changed its inputs"),
        ("os.mkdir('case/link/x')", "os.mkdir"),
        ("open('case/../secret.png').read()", "read case/../secret.png, which nobody named"),
        ("socket.create_connection(('127.0.0.1', 1))", "OSError no network"),
    ],
)
def test_the_guard_notices(deed: str, found: str, tmp_path: Path):
    for folder in ("case/in", "home", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "case" / "link").symlink_to("../elsewhere")
    for file in ("secret.png", "case/in/a.png"):
        (tmp_path / file).touch()
    code = (
        "import os, pathlib, socket, subprocess\n"
        "from pathlib import Path\n"
        "from fuzz.guard import Guard\n"
        "guard = Guard(Path('home'), Path('secret.png'))\n"
        "with guard.watching(Path('case'), Path('case/in'), []) as found:\n"
        f"    try: {deed}\n"
        "    except OSError as error: print('OSError', error)\n"
        "print(*found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert (found in done.stdout) if found else (done.stdout == "\n"), done.stdout + done.stderr

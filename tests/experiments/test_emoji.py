"""experiments/emoji/split.py: emoji held out by name, with all skin tones of a name on one side."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "emoji" / "split.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


TONES = ("LIGHT", "MEDIUM-LIGHT", "MEDIUM", "MEDIUM-DARK", "DARK")
NAMES = [*(f"thing {i}" for i in range(400))]
NAMES += [f"person {i}: {tone.lower()} skin tone" for i in range(60) for tone in TONES]
NAMES += [f"person {i}" for i in range(60)] + [None] * 40


@pytest.mark.parametrize("name", ["Boy, MEDIUM-LIGHT SKIN TONE", "boy: dark skin tone", "Boy", "boy "])
def test_names_without_skin_tone(script: ModuleType, name: str):
    assert script.without_tone(name) == "boy"


def test_no_name_is_on_both_sides(script: ModuleType):
    train, test = script.split(NAMES)
    ours, theirs = ({script.without_tone(NAMES[i]) for i in part} for part in (train, test))
    assert not ours & theirs
    assert len(test) == 300 == len(set(test))
    assert all(sum(script.without_tone(NAMES[i]) == name for i in test) <= 2 for name in theirs)
    unused = [script.without_tone(NAMES[i]) for i in set(range(len(NAMES))) - {*train, *test}]
    assert unused and set(unused) <= theirs
    assert {i for i, name in enumerate(NAMES) if name is None} <= set(train)
    assert script.split(NAMES) == (train, test)


def test_the_files_have_all_columns(tmp_path: Path):
    table = pa.table({"image": [f"{i}" for i in range(len(NAMES))], "name": NAMES})
    pq.write_table(table, tmp_path / "all.parquet")
    command = [sys.executable, SCRIPT, tmp_path / "all.parquet", "--output", tmp_path / "parts"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    train, test = (pq.read_table(tmp_path / "parts" / f"{name}.parquet") for name in ("train", "test"))
    assert train.column_names == test.column_names == ["image", "name"]
    assert f"train.parquet: {train.num_rows} images" in printed and test.num_rows == 300
    assert not set(train["image"].to_pylist()) & set(test["image"].to_pylist())
    balanced = pq.read_table(tmp_path / "parts" / "balanced.parquet")["name"].to_pylist()
    for name, times in {"thing": 3, "person": 1}.items():
        ours = [given for given in train["name"].to_pylist() if given and given.startswith(name)]
        assert sorted(given for given in balanced if given and given.startswith(name)) == sorted(times * ours)
    assert balanced.count(None) == 3 * 40

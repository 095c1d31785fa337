"""Whatever is in a table, a prompt file, a record or a picture: what they are for, or one line."""

import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import magcache
from magcache.app.media import read_image
from magcache.app.prompts import read_prompts
from magcache.app.record import is_record

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400)
KEYS = st.text() | st.sampled_from(
    ["mag_ratio", "measured_on", "calibrated_steps", "trials", "prompt", "seed", "image"]
)
KEYS |= st.sampled_from(["save_file", "made_by", "comparison", "files", "rows", "constants", "prompts", "psnr"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=20)
RATIOS = st.lists(st.tuples(*[st.floats(0.5, 2)] * 2), min_size=1).map(
    lambda steps: [r for step in steps for r in step]
)
TABLES = st.fixed_dictionaries(
    {"mag_ratio": RATIOS}, optional={"measured_on": VALUES, "calibrated_steps": VALUES, "trials": VALUES}
)
LINES = st.lists(VALUES.map(json.dumps)).map("\n".join) | st.text()


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def one_line(error: Exception) -> bool:
    return 0 < len(str(error)) < 2000 and "\n" not in str(error)


@given(value=VALUES | TABLES)
def test_tables(path, value):
    path.write_text(json.dumps(value))
    try:
        table = magcache.load_table(path)
    except ValueError as error:
        assert one_line(error)
        return
    assert len(table.ratios) == 2 * table.steps
    try:
        magcache.read_trials(table)
    except ValueError as error:
        assert one_line(error)


@given(content=st.binary() | LINES.map(str.encode))
def test_prompts(path, content):
    path.write_bytes(content)
    try:
        lines = read_prompts(path, 0)
    except ValueError as error:
        assert one_line(error)
        return
    assert [line.number for line in lines] == [*range(1, len(lines) + 1)]
    assert all(line.prompt.strip() and 0 <= line.seed < 2**63 for line in lines)


@given(content=st.binary() | VALUES.map(json.dumps).map(str.encode))
def test_records(path, content):
    path.write_bytes(content)
    assert not is_record(path)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=20),
    length=st.integers(0, 5000),
)
def test_pictures(path, kind, changes, length):
    file = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(file, kind)
    content = bytearray(file.getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[:length] if length < 4000 else content)
    try:
        assert read_image(str(path)).mode == "RGB"
    except ValueError as error:
        assert one_line(error)

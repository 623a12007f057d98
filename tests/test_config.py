"""Reading and editing settings files: YAML 1.2, one line about the first bad key, and edits that lose nothing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from ruamel.yaml import YAML

from scforget import config, schema
from scforget.errors import ConfigError
from scforget.settings import Settings

ROOT = Path(__file__).parents[1]


class Inner(Settings):
    rate: Annotated[float, Field(gt=0)]
    names: list[str]


class Toy(Settings):
    seed: int
    inner: Inner


TOY = """\
# the seed of everything
seed: 42 # an answer

inner:
  # chosen by hand
  rate: 1e-4
  names: [a, b] # in this order
"""


@pytest.fixture
def toy(tmp_path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TOY)
    return path


def one_line(error: ConfigError, path: Path, key: str) -> str:
    assert error.exit_code == 2
    assert (error.path, error.key) == (path, key)
    assert "\n" not in str(error)
    assert str(error).startswith(str(path))
    return error.why


# reading


def test_read_yaml_reads_version_1_2(tmp_path):
    (tmp_path / "a.yaml").write_text('a: 1e-4\nb: on\nc: .inf\nd: 0o17\ne: null\nf: "1e-4"\n')
    found = config.read_yaml(tmp_path / "a.yaml")
    assert found == {"a": 1e-4, "b": "on", "c": float("inf"), "d": 15, "e": None, "f": "1e-4"}
    assert isinstance(found["a"], float)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: 1\nseed: 2\n", 'duplicate key "seed"'),
        (b"inner:\n  rate: 1\n  rate: 2\n", 'duplicate key "rate"'),
        (b"seed: [1\n", "expected ',' or ']'"),
        (b"seed: \xff\n", "invalid start byte"),
        (b"seed: 2001-99-99\n", "month must be in 1..12"),
        (b"seed: \x00\n", "#x0000"),
    ],
)
def test_read_yaml_says_in_one_line_what_is_no_yaml(tmp_path, content, said):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not readable as YAML") as caught:
        config.read_yaml(path)
    assert said in one_line(caught.value, path, "")


def test_read_yaml_says_that_there_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file; run from the project's root") as caught:
        config.read_yaml(tmp_path / "params.yaml")
    one_line(caught.value, tmp_path / "params.yaml", "")


@pytest.mark.parametrize(
    ("before", "after", "key", "said"),
    [
        ("seed: 42", "seed: '42'", "seed", "input should be a valid integer, found '42' (str)"),
        ("seed: 42", "seed: 42.0", "seed", "input should be a valid integer, found 42.0 (float)"),
        ("seed: 42", "seed: true", "seed", "input should be a valid integer, found True (bool)"),
        ("seed: 42", "", "seed", "missing; every setting stands in the file, so that DVC sees it"),
        ("seed: 42", "sed: 42", "seed", "missing; every setting stands in the file, so that DVC sees it (and 1 more)"),
        ("rate: 1e-4", "rate: '1e-4'", "inner.rate", "input should be a valid number, found '1e-4' (str)"),
        ("rate: 1e-4", "rate: 0.0", "inner.rate", "input should be greater than 0, found 0.0 (float)"),
        ("rate: 1e-4", "rate: .nan", "inner.rate", "input should be greater than 0, found nan (float)"),
        ("names: [a", "nams: [a", "inner.names", "missing; every setting stands in the file, so that DVC sees it"),
        ("names: [a", "more: 1\n  names: [a", "inner.more", "unknown key; check its spelling and its place"),
        ("names: [a, b]", "names: [a, 2]", "inner.names.1", "input should be a valid string, found 2 (int)"),
    ],
)
def test_load_names_the_first_bad_key_and_its_value(toy, before, after, key, said):
    assert config.load(toy, Toy).inner.rate == 1e-4  # unquoted
    toy.write_text(TOY.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        config.load(toy, Toy)
    assert one_line(caught.value, toy, key).startswith(said)


@pytest.mark.parametrize("content", ["", "null\n", "[1, 2]\n", "text\n"])
def test_load_and_edits_refuse_a_file_that_is_no_mapping(toy, tmp_path, content):
    toy.write_text(content)
    (tmp_path / "profile.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError):
        config.load(toy, Toy)
    with pytest.raises(ConfigError, match="not a mapping"):
        config.apply_overrides(toy, tmp_path / "profile.yaml", Toy)
    with pytest.raises(ConfigError, match="not a mapping"):
        config.set_value(toy, ("seed",), 1, Toy)
    assert toy.read_text() == content


# editing


def test_set_value_changes_one_value_and_nothing_else(toy):
    config.set_value(toy, ("inner", "rate"), 0.5, Toy)
    assert toy.read_text() == TOY.replace("1e-4", "0.5")
    config.set_value(toy, ("seed",), 17, Toy)
    assert toy.read_text() == TOY.replace("1e-4", "0.5").replace("42", "17")


def test_apply_overrides_keeps_comments_order_and_style(toy, tmp_path):
    (tmp_path / "profile.yaml").write_text("inner: {names: [c], rate: 1e-2}\nseed: 1\n")
    config.apply_overrides(toy, tmp_path / "profile.yaml", Toy)
    text = toy.read_text()
    assert [line.split("#")[1].strip() for line in text.splitlines() if "#" in line] == [
        "the seed of everything", "an answer", "chosen by hand", "in this order"
    ]  # fmt: skip
    assert text.index("seed:") < text.index("inner:") < text.index("rate:") < text.index("names: [c]")
    assert config.load(toy, Toy) == Toy(seed=1, inner=Inner(rate=1e-2, names=["c"]))


def test_apply_overrides_of_nothing_leaves_the_params_of_the_project_as_they_are(tmp_path):
    path, before = tmp_path / "params.yaml", (ROOT / "params.yaml").read_bytes()
    path.write_bytes(before)
    (tmp_path / "profile.yaml").write_text("{}\n")
    config.apply_overrides(path, tmp_path / "profile.yaml", schema.Params)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("profile", "key"),
    [("seed: x\n", "seed"), ("seed: 1\ninner: {rat: 1.0}\n", "inner.rat"), ("inner: 3\n", "inner")],
)
def test_apply_overrides_of_a_bad_profile_changes_nothing_and_names_the_profile(toy, tmp_path, profile, key):
    path = tmp_path / "bad.yaml"
    path.write_text(profile)
    with pytest.raises(ConfigError) as caught:
        config.apply_overrides(toy, path, Toy)
    one_line(caught.value, path, key)
    assert toy.read_text() == TOY
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.yaml", "params.yaml"]


@pytest.mark.parametrize("profile", ["[1]\n", "", "seed: 1\nseed: 2\n"])
def test_apply_overrides_refuses_a_profile_that_is_no_mapping(toy, tmp_path, profile):
    (tmp_path / "bad.yaml").write_text(profile)
    with pytest.raises(ConfigError):
        config.apply_overrides(toy, tmp_path / "bad.yaml", Toy)
    assert toy.read_text() == TOY


def test_edits_on_a_full_disk_leave_the_old_file_and_no_temporary(toy, monkeypatch):
    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        config.set_value(toy, ("seed",), 1, Toy)
    assert toy.read_text() == TOY
    assert [file.name for file in toy.parent.iterdir()] == ["params.yaml"]


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Six digits, as people write them: ruamel keeps the style of a float at the price of its last bit."""
    return st.floats(low, high).map(lambda value: float(f"{value:.6g}"))


LEAVES = {
    ("seed",): st.integers(-(2**40), 2**40),
    ("train", "seeds"): st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True),
    ("datasets", "pbmc68k", "training", "learning_rate"): floats(1e-9, 1e3),
    ("datasets", "pbmc68k", "prepare", "layer"): st.none() | st.text("abc #é", min_size=1, max_size=8),
    ("unlearn", "ssd", "alpha"): floats(1e-6, 1e6) | st.just(float("inf")),
    ("audit", "margins", "elbo"): floats(1e-3, 1e9),
}


def merged(content: Any, changes: dict[tuple[str, ...], Any]) -> Any:
    content = copy.deepcopy(content)
    for key, value in changes.items():
        place = content
        for part in key[:-1]:
            place = place[part]
        place[key[-1]] = value
    return content


@given(st.fixed_dictionaries({}, optional=LEAVES))
@settings(deadline=None, max_examples=15)
def test_apply_overrides_equals_a_merge_of_plain_values(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("edit")
    path, profile = folder / "params.yaml", folder / "profile.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    before = config.read_yaml(path)
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        place = nested
        for part in key[:-1]:
            place = place.setdefault(part, {})
        place[key[-1]] = value
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(nested, text)
    profile.write_text(text.getvalue())
    config.apply_overrides(path, profile, schema.Params)
    assert config.read_yaml(path) == merged(before, changes)

    def comments(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]

    assert comments(path.read_text()) == comments((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_of_the_project_can_be_applied(tmp_path, profile):
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    config.apply_overrides(path, profile, schema.Params)
    assert schema.load(path) != schema.load(ROOT / "params.yaml")
    once = path.read_bytes()
    config.apply_overrides(path, profile, schema.Params)
    assert path.read_bytes() == once

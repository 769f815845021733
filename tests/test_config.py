"""Typed YAML: data only, unknown keys named with the nearest known one, overrides, a round trip."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from inhibitor.config import Config, UserPath
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-4


class Outer(Config):
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    counts: dict[str, Annotated[int, Field(gt=0)]] = Field(default={})
    losses: dict[Literal["soft", "hard"] | Literal["hidden"], float] = Field(default={})
    bits: Literal[8, 6, 4] = 8
    folder: UserPath | None = None
    task: Literal["local", "ray"] = "local"


def write(path, text):
    file = path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_values_overrides_and_round_trip(tmp_path):
    file = write(tmp_path, "name: a\nmany:\n- {learning_rate: 1.0}\n")
    config = Outer.load(file, ["inner.learning_rate=2e-5", "many.0.learning_rate=3", "name=b"])
    assert config == Outer(name="b", inner=Inner(learning_rate=2e-5), many=(Inner(learning_rate=3.0),))
    assert Outer.load(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\ninner: {lerning_rate: 1}", [], "inner.lerning_rate.*Did you mean 'learning_rate'"),
        ("name: a\nlearning_rate: 1", [], "the unknown key 'learning_rate'. Known: bits, counts, folder"),
        ("name: a\ninner: {nme: a}", [], "inner.nme: .* the unknown key 'nme'. Known: learning_rate."),
        ("name: a\nmany: [{}, {7: a}]", [], "many.1.7: expected a known key, got the unknown key '7'"),
        ("nme: a", [], "nme: expected a known key, got the unknown key 'nme'. Did you mean 'name'"),
        ("name: [1]", [], "name"),
        ("name: a\ninner: {learning_rate: fast}", [], "learning_rate.*fast"),
        ("- a", [], "keys and values, got list"),
        ("", [], "keys and values"),
        ("name: [", [], "plain YAML"),
        ("name: !!python/object/apply:os.system [ls]", [], "plain YAML"),
        ("name: a\nname: b", [], r"plain YAML, each key once, got the key 'name' twice in .*recipe\.yaml., line 2"),
        ("name: a\ninner: {learning_rate: 1, learning_rate: 2}", [], "the key 'learning_rate' twice"),
        ("name: a", ["counts={a: 1, a: 2}"], "counts: expected a plain value"),
        ("inner: {learning_rate: 1}", [], "name: expected a value, got nothing. Add that key"),
        ("name: 2024", [], "name: expected text, got 2024. Write it in quotes"),
        ("name: a\nfolder: 7", [], "folder: expected text, got 7"),
        ("name: a\nmany: 3", [], r"many: expected a list, got 3. Write it in brackets: \[3\]"),
        ("name: a\nmany: [3]", [], "many.0: expected keys and values, got 3"),
        ("name: a\ncounts:", [], "counts: expected keys and values, got nothing"),
        ("name: a\ncounts: {a: 0}", [], "counts.a: expected a number greater than 0, got 0"),
        ("name: a\ncounts: {a: 1.5}", [], "counts.a: expected a whole number, got 1.5"),
        ("name: a\nlosses: {sofd: 1}", [], "losses.sofd: expected soft, hard or hidden, got 'sofd'"),
        ("name: a\nlosses: {soft: x}", [], "losses.soft: expected a number, got 'x'"),
        ("name: a\nbits: 5", [], "bits: expected 8, 6 or 4, got 5"),
        ("name: a\ntask: slurm", [], "task: expected local or ray, got 'slurm'"),
        ("name: a", ["name"], "key=value"),
        ("name: a", ["=1"], "key=value"),
        ("name: a", ["many.0.learning_rate=1"], "many"),
        ("name: a", ["name.x=1"], "exists"),
        ("name: a", ["name=["], "plain value"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_faults_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Outer.load(write(tmp_path, text), overrides)


def test_the_constructor_names_an_unknown_key_too():
    with pytest.raises(ValidationError, match=r"Unknown key 'nme'\. Did you mean 'name'\?"):
        Outer(nme="a")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a #1", "a #1"),
        ("run: 1", "run: 1"),
        ("2024-06-01", "2024-06-01"),
        ("nan", "nan"),
        (" 'off' ", "off"),
        ("- x", "- x"),
        ("", None),
        ("null", None),
    ],
)
def test_a_plain_override_is_taken_whole(tmp_path, text, value):
    assert Outer.load(write(tmp_path, "name: a"), [f"folder={text}"]).folder == (None if value is None else Path(value))


def test_numbers_and_lists_in_overrides(tmp_path):
    overrides = ["counts.a=1e3", "inner.learning_rate=2e-5", "many=[{learning_rate: 1e-4}]", "bits=6"]
    config = Outer.load(write(tmp_path, "name: a\ncounts:\nfolder: 2024-06-01"), overrides)
    assert config.counts == {"a": 1000}
    assert config.inner == Inner(learning_rate=2e-5)
    assert config.many == (Inner(learning_rate=1e-4),)
    assert (config.bits, config.folder) == (6, Path("2024-06-01"))


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    file = write(tmp_path, "name: a\nfolder: ~/runs")
    assert Outer.load(file).folder == Path("/home/ada/runs")
    assert Outer.load(file, ["folder=~/x"]).folder == Path("/home/ada/x")
    assert Outer.load(file, ["folder=~no-such-user/x"]).folder == Path("~no-such-user/x")


def test_a_missing_or_enormous_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*no file"):
        Outer.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="1 MiB"):
        Outer.load(write(tmp_path, "#" * (1 << 20) + "\nname: a"))


def test_shipped_recipes_are_valid():
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        if not path.name.startswith("reproduce-"):
            assert DistillConfig.load(path).stages

"""Typed YAML: data only, unknown keys named with the nearest known one, overrides, a round trip."""

import pytest

from inhibitor.config import Config
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-4


class Outer(Config):
    name: str
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


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
        ("nme: a", [], "nme|name"),
        ("name: [1]", [], "name"),
        ("name: a\ninner: {learning_rate: fast}", [], "learning_rate.*fast"),
        ("- a", [], "keys and values, got list"),
        ("", [], "keys and values"),
        ("name: [", [], "plain YAML"),
        ("name: !!python/object/apply:os.system [ls]", [], "plain YAML"),
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


def test_a_missing_or_enormous_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*no file"):
        Outer.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="1 MiB"):
        Outer.load(write(tmp_path, "#" * (1 << 20) + "\nname: a"))


def test_shipped_recipes_are_valid():
    from pathlib import Path

    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        if not path.name.startswith("reproduce-"):
            assert DistillConfig.load(path).stages

"""``inhibitor report`` as a user meets it."""

import pytest

from tests.report import samples


@pytest.mark.parametrize("name", ["page [bold]x.html", "page [/x].html", "a page whose name is long " + "x" * 60])
def test_a_path_is_printed_as_it_is(cli, tmp_path, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "40")
    run = samples.write(tmp_path / "run [red]", samples.finetune())
    status, out, error = cli("report", run, "--output", tmp_path / name)
    assert (status, error) == (0, "")
    assert out.splitlines()[-1] == f"Report: {tmp_path / name}"
    assert (tmp_path / name).is_file()

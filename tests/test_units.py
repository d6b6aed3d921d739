"""What `python -m bench.units` prints."""

import json
import sys
from pathlib import Path

from bench import units

ROOT = Path(__file__).resolve().parent.parent


def test_command_prints_one_json_object(monkeypatch, capsys):
    command = ["units.py", "--unet", "sd21", "--resolution", "768", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    units.main()
    found = json.loads(capsys.readouterr().out)
    counts = [found[key] for key in ("units", "groups", "heads", "ff", "depth")]
    assert counts == [1620, 704, 390, 512, 14]
    assert found["unet"] == "sd21" and found["resolution"] == 768
    assert found["params"] == 865_910_724
    assert round(found["macs"] / 1e9, 2) == 1074.55
    assert abs(found["macs_paper"] / 1384.2e9 - 1) < 0.002
    assert all(type(found[key]) is int for key in ("macs", "macs_paper", "params"))
    assert 0 < found["floor"] < 1


def test_command_prints_a_table_whose_rows_add_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["units.py", "--unet", "pocket", "--depth", "none"])
    units.main()
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("level"))
    total = next(i for i, line in enumerate(lines) if line.startswith("total"))
    rows = [line.replace(",", "").split() for line in lines[header + 1 : total + 1]]
    for column in range(1, 7):  # counts and parameters
        assert sum(int(row[column]) for row in rows[:-1]) == int(rows[-1][column])
    assert int(rows[-1][5]) == 0  # no depth units
    assert abs(sum(float(row[7]) for row in rows[:-1]) - float(rows[-1][7])) < 0.1
    assert "lowest budget" in lines[total + 1]

"""The families that benchmarks/visual_path.py measures: their configs are read, and have the published widths."""

from pathlib import Path

import pytest

from benchmarks import visual_path
from llava_fast.families import read_config

ROWS = {"blip-2": (1408, 257, 32), "instructblip": (1408, 257, 32), "idefics3": (1152, 676, 169)}


@pytest.mark.parametrize("name", visual_path.GUESTS)
def test_a_family_is_read_at_its_published_widths(name, tmp_path):
    guest = visual_path.GUESTS[name]
    guest.config(2, 3).save_pretrained(tmp_path)
    guest.images().save_pretrained(tmp_path)
    config, _ = read_config(Path(tmp_path))
    found = config.vision.hidden_size, config.vision.rows_per_tile, config.projected_per_tile
    assert (found, config.vision.num_layers) == (ROWS[name], 2)


def test_another_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        visual_path.main(["blip-2,llava"])
    assert "no family 'llava': choose of blip-2, instructblip, idefics3" in capsys.readouterr().err

"""U-Nets by name and the table of what can be pruned of one."""

import json

import pytest

from bench.units import Table, describe
from common.errors import UserError
from common.ranges import check
from teacher.shapes import ASSETS, load_shape


@pytest.mark.parametrize(
    ("name", "depth", "pixels"),
    [
        ("sd15", "paper", 512),
        ("sdxl", "all", 1024),
        ("pocket", "none", 64),
    ],
)
def test_levels_add_up_to_the_whole_at_the_unets_own_resolution(name, depth, pixels):
    found = describe(name, depth=depth)
    assert found["resolution"] == pixels
    for key in ("units", "groups", "heads", "ff", "depth", "params", "macs"):
        assert sum(level[key] for level in found["levels"]) == found[key]
    assert found["units"] == sum(found[key] for key in ("groups", "heads", "ff", "depth"))
    gone = sum(level["prunable"] * level["macs"] for level in found["levels"])
    assert 1 - gone / found["macs"] == pytest.approx(found["floor"])
    assert all(0 <= level["prunable"] <= 1 for level in found["levels"])
    assert (found["depth"] == 0) == (depth == "none")


def test_the_first_level_of_sd21_by_hand():
    """Outside the blocks lie conv_in, the time embedding and conv_out, on 96 x 96 latents."""
    levels = {level["level"]: level for level in describe("sd21", 768)["levels"]}
    conv = 96 * 96 * 9 * 4 * 320
    assert levels["input"]["macs"] == conv + 320 * 1280 + 1280 * 1280
    assert levels["output"]["macs"] == conv
    assert levels["output"]["params"] == 2 * 320 + 9 * 320 * 4 + 4
    assert levels["mid_block"]["units"] == 2 * 32 + 2 * 20 + 32


def test_a_folder_with_a_unet_or_a_pipeline_will_do(tmp_path):
    config = (ASSETS / "unets" / "sd21.json").read_text()
    for folder in (tmp_path / "unet", tmp_path):  # the second holds the first
        folder.mkdir(exist_ok=True)
        (tmp_path / "unet" / "config.json").write_text(config)
        assert sum(p.numel() for p in load_shape(str(folder)).parameters()) == 865_910_724


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"block_out_channels": 3}',
        '{"block_out_channels": [30, 60]}',
        '{"block_out_channels": [32], "down_block_types": ["NoSuchBlock"]}',
        '{"block_out_channels": [32], "down_block_types": 3}',
        '{"block_out_channels": [32], "up_block_types": [{}]}',
        '{"block_out_channels": [32], "down_block_types": ["SimpleCrossAttnDownBlock2D"]}',
    ],
)
def test_what_is_no_configuration_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_embed_type", "timestep"), ("num_class_embeds", 10), ("addition_embed_type", "image")],
)
def test_unets_conditioned_on_other_things_are_refused(tmp_path, key, value):
    config = json.loads((ASSETS / "unets" / "sd15.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=key):
        load_shape(str(tmp_path))


def test_mistakes_say_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match="sd15, sd21, sd21-base, sdxl, pocket"):
        load_shape("sd3")
    with pytest.raises(UserError, match="sd15"):
        load_shape(str(tmp_path / "nowhere"))
    for resolution in (0, -8, 4, 100):
        with pytest.raises(UserError, match=str(resolution)):
            describe("pocket", resolution)
    with pytest.raises(UserError, match="--text-tokens 0"):
        check(Table(text_tokens=0))
    config = json.loads((ASSETS / "unets" / "sd15.json").read_text())
    del config["sample_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--resolution"):
        describe(str(tmp_path))

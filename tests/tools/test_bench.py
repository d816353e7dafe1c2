"""The benchmarks measure what they say: published sizes, ratios of known work, and each command runs."""

import json
import time

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdgen_lib import bench, bench_runs, bench_tools


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(**config)


def test_the_full_size_model_is_stable_diffusion_2():
    """Published: a UNet of 865.9 million parameters, a VAE of 83.7 million; 46.8 and 155 GFLOP at 128 pixels."""
    unet, vae = on_meta(UNet2DConditionModel, bench_tools.SD2_UNET), on_meta(AutoencoderKL, bench_tools.SD2_VAE)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 865.9
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 83.7
    latents, context = torch.zeros(1, 4, 16, 16, device="meta"), torch.zeros(1, 77, 1024, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    assert bench_tools.flops(lambda: unet(latents, t, encoder_hidden_states=context)) / 1e9 == pytest.approx(
        46.8, abs=1
    )
    assert bench_tools.flops(lambda: vae.decode(latents)) / 1e9 == pytest.approx(155, abs=3)


def test_flops_of_a_matrix_product():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert bench_tools.flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_the_ratio_is_that_of_the_times():
    row = bench_tools.compare(
        "waiting", lambda: time.sleep(0.02), lambda: time.sleep(0.06), "a longer wait", 10, "cpu", 3, work=1e6, top=1e9
    )
    assert 2 < row["lowest"] <= row["ratio"] <= row["highest"] < 4
    assert row["ours, images/s"] == pytest.approx(10 / 0.02, rel=0.3)
    assert row["share of ceiling"] == pytest.approx(1e6 / 0.02 / 1e9, rel=0.3)


def test_searches_are_compared_seed_by_seed():
    """Differences -0.02, 0, -0.01: their mean is -0.01, their standard deviation 0.01."""
    rows = [{"classifier epochs": 50, "without pruning": 100, "CAS": whole + less, "CAS without pruning": whole}
            for whole, less in ((0.9, -0.02), (0.8, 0.0), (0.7, -0.01))]  # fmt: skip
    found = bench_runs.over_seeds(rows)
    assert found["share"] == 0.5 and found["without pruning"] == 300
    assert found["difference"] == pytest.approx(-0.01)
    assert found["its standard error"] == pytest.approx(0.01 / 3**0.5)


def test_peak_memory_is_seen():
    with bench_tools.Peak("cpu") as before:
        pass
    with bench_tools.Peak("cpu") as during:
        block = torch.ones(300_000_000 // 4)  # 0.3 GB
        time.sleep(0.1)
        del block
    assert 0.25 < during.gigabytes - before.gigabytes < 0.6


def test_the_ceiling_is_a_speed_that_the_machine_reaches():
    assert 1e9 < bench_tools.ceiling("cpu", torch.float32) < 1e14


@pytest.mark.parametrize(
    ("arguments", "column"),
    [(["sampler", "--batch", "4", "--steps", "2"], "ratio"), (["train", "--images", "40"], "ratio"),
     (["phases", "--batch", "2", "--steps", "2", "--precision", "fp32", "bf16"], "images/s")],
)  # fmt: skip
def test_commands(arguments, column, tmp_path, capsys):
    assert bench.main([*arguments, "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["device"] == "cpu" and all(row[column] > 0 for row in found["rows"])
    assert column in capsys.readouterr().out
    if arguments[0] == "phases":
        assert len(found["rows"]) == 2 * 5  # step 1, sampling, encoding, step 3 by LoRA and whole; two precisions
        assert {row["precision"] for row in found["rows"]} == {"fp32", "bf16"}


def test_a_wrong_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["samplr"])
    assert "invalid choice: 'samplr'" in capsys.readouterr().err

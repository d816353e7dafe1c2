"""The benchmarks measure what they say: published sizes, ratios of known work, and each command runs."""

import argparse
import json
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import create_trial

from sdgen_lib.config.settings import resolve
from sdgen_lib.course import Course
from sdgen_lib.diffusion.backbone import Backbone
from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.loss import diffusion_loss
from sdgen_lib.tools import bench, bench_luck, bench_runs, bench_tools
from tests import small as small_run
from tests import soak


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(**config)


# --- what they measure with ---


def test_the_full_size_model_is_stable_diffusion_2():
    """Published: a UNet of 865.9 million parameters, a VAE of 83.7 million; 46.8 and 155 GFLOP at 128 pixels."""
    unet, vae = on_meta(UNet2DConditionModel, bench_tools.SD2_UNET), on_meta(AutoencoderKL, bench_tools.SD2_VAE)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 865.9
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 83.7
    latents, context = torch.zeros(1, 4, 16, 16, device="meta"), torch.zeros(1, 77, 1024, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    unet_flops = bench_tools.flops(lambda: unet(latents, t, encoder_hidden_states=context))
    assert unet_flops / 1e9 == pytest.approx(46.8, abs=1)
    assert bench_tools.flops(lambda: vae.decode(latents)) / 1e9 == pytest.approx(155, abs=3)


def test_flops_of_a_matrix_product():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert bench_tools.flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_the_ratio_is_that_of_the_times():
    def ours():
        time.sleep(0.02)

    def peer():
        time.sleep(0.06)

    row = bench_tools.compare("waiting", ours, peer, "a longer wait", 10, "cpu", 3, work=1e6, top=1e9)
    assert 2 < row["lowest"] <= row["ratio"] <= row["highest"] < 4
    assert row["ours, images/s"] == pytest.approx(10 / 0.02, rel=0.3)
    assert row["share of ceiling"] == pytest.approx(1e6 / 0.02 / 1e9, rel=0.3)


def test_peak_memory_is_seen():
    with bench_tools.Peak("cpu") as before:
        pass
    with bench_tools.Peak("cpu") as during:
        block = torch.ones(300_000_000 // 4)  # 0.3 GB
        time.sleep(0.1)
        del block
    assert 0.25 < during.gigabytes - before.gigabytes < 0.6


def test_the_ceiling_is_the_fastest_of_six_products(monkeypatch):
    """Of 2048 x 2048 matrices: 2 x 2048^3 floating-point operations in the shortest of the times."""
    times = iter([0.5, 0.4, 0.25, 0.3, 0.5, 0.26])
    monkeypatch.setattr(bench_tools, "seconds", lambda work, device: [next(times), work()][0])
    assert bench_tools.ceiling("cpu", torch.float32) == 2 * 2048**3 / 0.25
    assert next(times, None) is None


def test_pixels_are_compared():
    images, others = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8), torch.full((2, 3, 4, 4), 9, dtype=torch.uint8)
    others[0, 0, 0, 0] = 255
    found = bench_runs.pixel_difference(images, others)
    assert found["largest pixel difference"] == 248
    assert found["mean pixel difference"] == pytest.approx((95 * 2 + 248) / 96)


# --- the peers ---


def test_the_plain_loop_takes_the_gradient_of_the_diffusion_loss(tiny):
    """The peer does the same work as ours: with the same noise, the same gradients."""
    latents, labels = torch.randn(4, *tiny.latent_shape), torch.arange(4)
    gradients = []
    for step in (bench.plain_step, _ours):
        encoder = bench_tools.encoder_for(tiny)
        torch.manual_seed(3)
        step(tiny, encoder, latents, labels)
        gradients.append(encoder.linear.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def _ours(model, encoder, latents, labels):
    t, noise = torch.randint(0, 1000, (len(latents),)), torch.randn_like(latents)
    condition = encoder.conditioner()(labels)
    diffusion_loss(model.predict_noise, latents, condition, t, noise, model.alphas_cumprod).backward()


def test_the_plain_loop_compares_in_float32_what_a_model_predicts_in_16_bits(flat_model):
    """On a card the squared error of two formats has no gradient."""
    flat_model.predict_noise = lambda latents, t, condition: (latents + condition.context.sum()).bfloat16()
    encoder, seen = bench_tools.ClassEncoder(2, 1, 4), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.F, "mse_loss", lambda a, b: seen.append((a.dtype, b.dtype)) or (a - b).square().mean())
        bench.plain_step(flat_model, encoder, torch.randn(2, 4, 2, 2), torch.arange(2))
    assert seen == [(torch.float32, torch.float32)]


# --- whole runs ---


def test_searches_are_compared_seed_by_seed():
    """Differences -0.02, 0, -0.01: their mean is -0.01, their standard deviation 0.01."""
    rows = [
        {"classifier epochs": 50, "without pruning": 100, "CAS": whole + less, "CAS without pruning": whole}
        for whole, less in ((0.9, -0.02), (0.8, 0.0), (0.7, -0.01))
    ]
    found = bench_runs.over_seeds(rows)
    assert found["share"] == 0.5 and found["without pruning"] == 300
    assert found["difference"] == pytest.approx(-0.01)
    assert found["its standard error"] == pytest.approx(0.01 / 3**0.5)


@pytest.fixture
def small_runs(tmp_path, monkeypatch):
    """Runs of the benchmarks are very small ones in the folder that is returned."""
    small_run.write_dataset(tmp_path / "small.npz")
    smallest = {**soak.SMALL, "dataset": str(tmp_path / "small.npz"), "runs_dir": str(tmp_path / "runs")}

    def small(recipe="demo", backbone="tiny", **given):
        kept = {name: given[name] for name in ("seed", "pruning", "precision") if name in given}
        return resolve(**{**smallest, **kept})

    for module in (bench_runs, bench_luck):
        monkeypatch.setattr(module, "settings", types.SimpleNamespace(resolve=small))
    monkeypatch.setattr(bench_luck, "runs_dir", lambda: tmp_path / "bench")
    return tmp_path / "runs"


def test_a_search_with_pruning_and_one_without_share_their_step_1(small_runs):
    (row,) = bench_runs.pruning(argparse.Namespace(backbone="tiny", repeats=1))
    assert row["without pruning"] == 6 * 4  # trials, epochs
    assert row["share"] == row["classifier epochs"] / 24 <= 1
    assert 0 < row["CAS"] <= 1 and 0 < row["CAS without pruning"] <= 1
    (run,) = small_runs.glob("*/*/")
    assert len(list(run.glob("1_transfer/*/record.json"))) == 1 and len(list(run.glob("2_tune/*/record.json"))) == 2


def test_images_in_float32_are_those_of_a_run_in_float32(small_runs):
    """These runs compute in float32: drawn once more, no pixel differs, and the classifiers reach the same."""
    (row,) = bench_runs.exactness(argparse.Namespace(backbone="tiny", repeats=1))
    assert row["largest pixel difference"] == 0 == row["mean pixel difference"]
    assert row["CAS"] == row["CAS in float32"] and row["CAS, deviation"] == row["CAS in float32, deviation"]
    found = Course(bench_runs.settings.resolve()).cas("after 2")
    assert row["CAS"] == pytest.approx(sum(found["test"]) / 2)
    assert row["what"].startswith(f"images after 2, seed 0, IS {found['point']['num_inference_steps']}, UGS ")


def test_searches_of_one_step_1_are_judged_alike_and_are_done_once(small_runs, monkeypatch):
    asked = argparse.Namespace(backbone="tiny", dataset="small", repeats=2)
    rows = bench_luck.luck(asked)
    long, *short, last = rows
    assert [row["what"] for row in rows] == [
        "search 0, 18 trials",
        "search 1, 6 trials",
        "search 2, 6 trials",
        "2 searches",
    ]
    assert long["within one of it"] and long["standard error to the long search's"] == 0  # of its own end
    for row in short:
        error = row["standard error to the long search's"]
        assert row["within one of it"] == (row["judged"] >= long["judged"] - error)
    near = sum(row["within one of it"] for row in short)
    assert last["within one of it"] == f"{near} of 2"
    assert last["judged"] == pytest.approx(sum(row["judged"] for row in short) / 2)
    (run,) = small_runs.glob("*/*/")
    assert len(list(run.glob("1_transfer/*/record.json"))) == 1 and not list(run.glob("2_tune/*/record.json"))
    logs = {path: path.stat().st_size for path in (small_runs.parent / "bench").rglob("*.log")}
    assert sorted(path.name for path in logs) == [
        *("judging 0.log", "judging 1.log", "search 0, 18 trials.log"),
        *("search 1, 6 trials.log", "search 2, 6 trials.log"),
    ]
    monkeypatch.setattr(bench_luck.Course, "draw", None)  # nothing is drawn again
    assert bench_luck.luck(asked) == rows
    assert {path: path.stat().st_size for path in logs} == logs


def test_a_difference_of_judged_points_has_the_error_of_its_sets():
    """Two sets of two classifiers: what a set has in common is no luck of one classifier, and shared by the points."""
    space = {"IS": IntDistribution(1, 9), "UGS": FloatDistribution(0, 9), "epoch": IntDistribution(0, 9)}
    points = [{"IS": 5, "UGS": 1.0, "epoch": k} for k in range(3)]
    trials = [create_trial(params=point, distributions=space, value=0.5) for point in points]
    values = [[[0.5, 0.6], [0.7, 0.8]], [[0.4, 0.6], [0.6, 0.8]], [[0.5, 0.5], [0.9, 0.9]]]
    judged = bench_luck._Judged({tuple(point.values()): np.array(v) for point, v in zip(points, values)})
    assert judged.mean(trials[0]) == pytest.approx(0.65)
    # means of sets: .55 .75, .5 .7, .5 .9; differences of the points: .05 .05, .05 -.15, 0 -.2: variances 0, .02, .02
    assert judged.error(trials[0], trials[1]) == pytest.approx((0.04 / 3 / 2) ** 0.5)
    assert judged.error(trials[2], trials[2]) == 0


@pytest.mark.slow
def test_a_short_course_is_compared_with_one_in_float32(small_runs, monkeypatch):
    asked, small = [], bench_runs.settings.resolve
    monkeypatch.setattr(bench_runs.settings, "resolve", lambda **given: asked.append(given) or small(**given))
    (row,) = bench_runs.whole_course(argparse.Namespace(backbone="tiny", device="cpu", repeats=2))
    assert row["ratio"] > 0 and row["lowest"] == row["highest"]  # one turn
    folders = [given.pop("runs_dir") for given in asked]
    assert len(set(folders)) == 4 and not any(Path(folder).exists() for folder in folders)
    ours, exact = asked[0], {**asked[0], "precision": "fp32", "pruning": False}
    assert asked == [ours, exact, ours, exact]  # once to warm up


# --- the command ---


@pytest.fixture
def uncompiled(monkeypatch):
    """The batches that a UNet was to be compiled for, which would take a minute; it is not."""
    asked = []
    monkeypatch.setattr(Backbone, "compile_unet", lambda self, batch, *_: asked.append(batch))
    return asked


@pytest.mark.parametrize(
    ("arguments", "column"),
    [
        (["sampler", "--batch", "4", "--steps", "2"], "ratio"),
        (["train", "--images", "40"], "ratio"),
        (["inversion", "--images", "40"], "ratio"),
        (["classifier"], "ratio"),
        (["phases", "--batch", "2", "--steps", "2", "--precision", "fp32", "bf16"], "images/s"),
        (["scaling"], "images/s"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands(arguments, column, tmp_path, capsys, monkeypatch, uncompiled):
    monkeypatch.setattr(bench, "SIZES", ((4, 2, 32), (3, 5, 16)))
    load = bench.data.load
    monkeypatch.setattr(bench.data, "load", lambda name, **options: load("digits:100", **options))
    assert bench.main([*arguments, "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["device"] == "cpu" and all(row[column] > 0 for row in found["rows"])
    assert column in capsys.readouterr().out
    shares = [row["share of ceiling"] for row in found["rows"] if "share of ceiling" in row]
    assert all(0 < share < 1 for share in shares)
    assert uncompiled == ([8] if arguments[0] == "sampler" else [])  # as a run does: guidance doubles the batch
    if arguments[0] == "phases":
        assert len(found["rows"]) == 2 * 5  # step 1, sampling, encoding, step 3 by LoRA and whole; two precisions
        assert {row["precision"] for row in found["rows"]} == {"fp32", "bf16"}


def small(config, **changes):
    return {**config, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, **changes}


@pytest.mark.parametrize("what", ["sampler", "train", "phases", "inversion"])
def test_a_model_with_random_weights_needs_no_files(what, monkeypatch, uncompiled):
    """ "sd2-random", here with few channels."""
    unet = small(bench_tools.SD2_UNET, attention_head_dim=8, cross_attention_dim=16)
    monkeypatch.setattr(bench_tools, "SD2_UNET", unet)
    monkeypatch.setattr(bench_tools, "SD2_VAE", small(bench_tools.SD2_VAE))
    arguments = ["--backbone", "sd2-random", "--device", "cpu", "--repeats", "1", "--batch", "2", "--steps", "2"]
    assert bench.main([what, *arguments, "--images", "4"]) == 0


def test_the_random_model_is_a_backbone(monkeypatch):
    monkeypatch.setattr(bench_tools, "SD2_UNET", small(bench_tools.SD2_UNET, attention_head_dim=8))
    monkeypatch.setattr(bench_tools, "SD2_VAE", small(bench_tools.SD2_VAE))
    found = bench_tools.load("sd2-random", "cpu", "bf16")
    assert (found.tokens, found.width, found.latent_shape, found.image_size) == (77, 1024, (4, 16, 16), 128)
    assert found.dtype == found.unet.dtype == torch.bfloat16 and found.vae.dtype == torch.float32
    assert not any(p.requires_grad for part in (found.unet, found.vae) for p in part.parameters())
    condition = Condition(torch.zeros(1, 77, 1024))
    assert found.predict_noise(torch.zeros(1, 4, 16, 16), torch.zeros(1).long(), condition).shape == (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["samplr"], "invalid choice: 'samplr'"),
        (["sampler", "--device", "gpu"], 'A device is "cpu", "cuda", "mps" or a numbered one'),
        (["sampler", "--device", "cuda:99"], "There is no device 'cuda:99'"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and said in " ".join(capsys.readouterr().err.split())

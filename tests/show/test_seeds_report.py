"""Tables over seeds, from records that a real `Run` wrote; the rows are made by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_rel

from sdgen_lib.config.settings import resolve
from sdgen_lib.evaluate.augmented_studies import TAIL
from sdgen_lib.show import report, seeds_report
from sdgen_lib.store.run import Run, Step, run_path


def made(base, seed, name, test, *, needs=(), family="digits", settings=None, version=1, **inputs):
    """A finished row of a seed's run; ``test``: what its classifiers reached."""
    s = resolve(dataset=family, backbone="tiny", recipe="demo", seed=seed, runs_dir=str(base), **settings or {})
    run = Run(s, run_path(s, s.dataset), {"data": lambda: f"data {seed} {settings}", "model": lambda: "m"})
    facts = {"test": test, "balanced_test": [value / 2 for value in test], "num_images": 50, "largest_class": 0.125}
    steps = tuple(Step(n, lambda folder, s: {}, topics=("seed",), roots=("data",), inputs=given) for n, given in needs)
    topics, more = ("seed", "table", "cas", "finetune"), {"inputs": inputs, "version": version}
    step = Step(name, lambda folder, s: facts, topics, steps, roots=("data",), **more)
    return run.result(step)


def shown(base, capsys):
    report.main([str(base), "--seeds"])
    return capsys.readouterr().out


def test_differences_are_paired_by_seed_and_the_interval_is_over_seeds(tmp_path, capsys):
    """The interval is scipy's of the seeds' means; a row is compared with the real row that was trained as it was."""
    random = np.random.default_rng(0)
    values = {}
    for augmentation in ("none", "randaugment"):
        options = {"augmentation": augmentation, "steps": 40}
        for kind in ("real", "both"):
            values[kind, augmentation] = random.uniform(0.5, 0.9, (4, 3))
            for seed, test in enumerate(values[kind, augmentation].tolist()):
                made(tmp_path, seed, f"worth/{kind}", test, options=options)
    for seed in range(4):  # longer training: not what the others are compared with
        made(tmp_path, seed, "worth/real", [0.1, 0.1], options={"augmentation": "none", "steps": 80})
    rows = seeds_report.rows_over_seeds(seeds_report.families(tmp_path)["digits/tiny-demo"], "worth")
    table = seeds_report.table_of(rows, "real")
    assert len(table) == 5 and set(table.seeds) == {4}
    for augmentation in ("none", "randaugment"):
        mine, real = (values[kind, augmentation].mean(1) for kind in ("both", "real"))
        low, high = (100 * value for value in ttest_rel(mine, real).confidence_interval(0.95))
        row = table.loc[f"both, augmentation={augmentation!r}"]
        expected = (
            f'{100 * (mine - real).mean():+.1f} [{low:+.1f}, {high:+.1f}] to "real, augmentation={augmentation!r}'
        )
        assert row.difference.startswith(expected), row.difference
        over_seeds = f"{100 * mine.mean():.1f} ± {100 * mine.std(ddof=1):.1f}"
        assert row[f"accuracy %, {seeds_report.OVER_SEEDS}"] == over_seeds
    assert "Over seeds, digits/tiny-demo: beside real images" in shown(tmp_path, capsys)


def test_rows_of_one_seed_are_counted_and_other_generators_and_families_stand_apart(tmp_path, capsys):
    for seed in (0, 1):
        made(tmp_path, seed, "table_2/real", [0.9 + seed / 100])
        for generator in ("a", "b"):
            block = ("5_datasets/block_01", {"block": 1, "generator": [generator, 1]})
            made(tmp_path, seed, "table_2/x1", [0.5 + seed / 10], needs=(block,))
        made(tmp_path, seed, "table_2/real", [0.3], family="cifar10")
    made(tmp_path, 0, "table_2/x2", [0.5])
    said = shown(tmp_path, capsys)
    assert said.count("Over seeds, ") == 2 and "(1 rows of one seed alone are not here.)" in said
    digits = said.split("Over seeds, digits")[1]
    assert "x1, generator=['a', 1]" in digits and "x1, generator=['b', 1]" in digits and "x2" not in digits
    assert "91.0" not in digits and "90.5 ± 0.7" in digits and "12.5" in digits
    assert "-35.5 [-92.7, +21.7] to 'real': no difference is shown" in digits  # scipy: t of one degree, 12.7062


def test_a_row_of_a_long_tail_is_named_by_what_it_has_and_compared_with_the_plain_one(tmp_path, capsys):
    for seed, extra in enumerate((0.0, 0.02, 0.01)):
        for name in ("real", "oversampled, randaugment", "filled: text"):
            row = dataclasses.asdict(TAIL[name])
            fill = ("long_tail/filling", {"drawn": 0, "conditioning": "text"})
            gain = 0.1 + extra if name != "real" else 0.0
            needs = (fill,) if row["filled"] else ()
            made(tmp_path, seed, "long_tail", [0.5 + gain], needs=needs, row=row, options={"steps": 9})
    said = shown(tmp_path, capsys)
    assert (
        "augmentation='randaugment', oversample=True" in said or "oversample=True, augmentation='randaugment'" in said
    )
    assert said.count("+11.0 [+8.5, +13.5] to 'long tail': better") == 2


def test_one_seed_is_no_table(tmp_path, capsys):
    made(tmp_path, 0, "worth/real", [0.5], options={})
    with pytest.raises(SystemExit, match="No row in .* has two seeds: run the notebooks with -p seed 1"):
        report.main([str(tmp_path), "--seeds"])


def test_rows_that_differ_in_a_setting_the_data_or_a_version_stay_apart(tmp_path, capsys):
    """Each pair of runs differs in one of them, and never by the seed alone."""
    for seed in (0, 1):
        for change in ({}, {"num_images": 800}, {"finetune_epoch_images": 300}, {"augmented_tail_factor": 2.0}):
            made(tmp_path, seed, "table_2/real", [0.9], num_images=50, settings=change)
        made(tmp_path, seed, "table_2/real", [0.9], num_images=50, version=2)
    rows = seeds_report.rows_over_seeds(seeds_report.families(tmp_path)["digits/tiny-demo"], "table_2")
    assert [len(row.facts) for row in rows] == [2] * 5
    names = list(seeds_report.named(rows))
    assert any("num_images=800" in name for name in names) and any("epoch_images=300" in name for name in names)
    assert any("augmented_tail_factor=2.0" in name for name in names)
    assert "num_images=50" not in shown(tmp_path, capsys)

"""The chapters as methods of one run: steps 1 to 4 (`steps.Steps`), and here the CAS tables and step 5."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import classifier, cost, data, devices, runs, shards
from .parts import classifier_options
from .ranks import ALONE, Ranks
from .sample import balanced_labels
from .steps import ROWS, Steps

__all__ = ["ROWS", "Course", "classifier_options"]


class Course(Steps):
    """One run: its data, backbone and folder, and the five steps of the method.

    ``Course(settings)`` loads the data and checks it; the backbone is loaded when first needed. Every step returns its
    result, from the run folder where it is already there.
    """

    def scores(
        self, sets: dict[str, Callable[[], data.Split]], of: int = 1
    ) -> Iterator[tuple[str, list[classifier.Score]]]:
        """For each set of a table, by its name, the scores of the run's classifier seeds.

        ``of``: the sets of the whole table. On them, and not on how many are left to do, depends how many cores each
        classifier is given, and so its rounding.
        """
        if not sets:
            return
        seeds = range(self.settings.seed, self.settings.seed + self.settings.classifier_seeds)

        def score(split: data.Split, seed: int, look: Callable[..., None]) -> classifier.Score:
            return classifier.score(split.images, split.labels, self.data.val, self.data.test, self.data.num_classes,
                                    seed=seed, on_epoch=look, **classifier_options(self.settings))  # fmt: skip

        works = (functools.partial(score, split, seed) for load in sets.values() for split in [load()]
                 for seed in seeds)  # fmt: skip
        found = devices.side_by_side(works, devices.best_at_once(of * len(seeds)))
        with tqdm(total=len(sets) * len(seeds), unit="classifier") as bar, contextlib.closing(found):
            for name in sets:
                bar.set_description(name)
                scores = []
                for _ in seeds:
                    scores.append(next(found))
                    bar.update()
                yield name, scores

    @staticmethod
    def _accuracies(scores: list[classifier.Score]) -> dict[str, list[float]]:
        """A row's accuracies as fractions, as the tables keep them."""
        return {"test": [f.test_accuracy for f in scores], "val": [f.val_accuracy for f in scores]}

    def _same(self, found: dict[str, Any] | None, point: dict[str, Any] | None, num_images: int) -> bool:
        """Whether a stored row of a table is what the settings ask for now."""
        asked = (point, num_images, self.settings.classifier_seeds)
        return bool(found) and asked == (found["point"], found["num_images"], len(found["test"]))

    @runs.one_at_a_time("table_1.json")
    def cas(self, row: str) -> dict[str, Any]:
        """A row of table 1: where it samples, its CAS with each classifier seed, and the seconds it took to generate.

        The images start from fresh noise, of no trial; kept in ``table_1.json``.
        """
        path = self.run.path / "table_1.json"
        rows = runs.load_json(path, {})
        point = self.point(row)
        if not self._same(rows.get(row), point, self.settings.num_images):
            labels = balanced_labels(self.settings.num_images, self.data.num_classes)
            self._prepare(point, len(labels))  # its time is not generation's
            start = time.perf_counter()
            images = self.draw(point, labels, "table 1", progress=f"{row}: generating")
            seconds = time.perf_counter() - start
            ((_, scores),) = self.scores({f"{row}: CAS": lambda: data.Split(images, labels)})
            rows[row] = {"point": point, **self._accuracies(scores), "seconds": seconds, "num_images": len(labels),
                         "select_on": self.settings.select_on}  # fmt: skip
            runs.save_json(path, rows)
        return rows[row]

    @runs.one_at_a_time("5_datasets")
    def synthetic(self, multiple: int) -> data.Split:
        """Step 5: the synthetic set of ``multiple`` times the real one's size.

        It is made of blocks as large as the real set, each with the real class counts (``class_mix`` "balanced": equal
        ones). The first block is x1, the first two are x2, and so on: prefixes of one set. With ``larger_sets``
        "random", as in the released code, x1 is a block apart (number 0) and x2 .. are random parts of all the others.
        """
        s = self.settings
        paths = [self.make_block(block, progress=f"synthetic block {block}") for block in self._blocks(multiple)]
        whole = data.Split(torch.cat([shards.load_images(path) for path in paths]), self._labels().repeat(len(paths)))
        if s.larger_sets == "nested" or multiple == 1:
            return whole
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(s.seed * 1009 + multiple))
        return whole.take(order[: multiple * len(self.data.train)])

    def _blocks(self, multiple: int) -> list[int]:
        """The numbers of the blocks that a set is made of, or taken from."""
        if self.settings.larger_sets == "nested":
            return list(range(1, multiple + 1))
        return [0] if multiple == 1 else list(range(1, self.settings.max_multiple + 1))

    def _labels(self) -> torch.Tensor:
        """The labels of a block."""
        real = self.data.train.labels.sort().values
        return balanced_labels(len(real), self.data.num_classes) if self.settings.class_mix == "balanced" else real

    def block_point(self) -> dict[str, Any]:
        """Where the synthetic set samples, and with which class mix: what a block is noted to be of."""
        return {**self.point("after 4"), "class_mix": self.settings.class_mix}

    def make_block(self, block: int, ranks: Ranks = ALONE, progress: str | None = None) -> Path:
        """The file of block ``block`` (1, 2, .., 0 for one apart) of the synthetic set, made if missing.

        See `shards.make_block`.
        """
        path, labels = self.run.folder("5_datasets") / f"block_{block:02d}.npz", self._labels()
        point = self.block_point()
        set_name, first_index = ("synthetic", (block - 1) * len(labels)) if block else ("synthetic x1", 0)
        shards.make_block(
            path, lambda labels, first: self.draw(point, labels, set_name, first), labels, point,
            first_index=first_index, batch_size=self.settings.sample_batch_size, ranks=ranks, progress=progress,
        )  # fmt: skip
        return path

    @runs.one_at_a_time("table_2.json")
    def scaling(self) -> dict[str, dict[str, list[float]]]:
        """The row of table 2: accuracies with real images and with x1 .. xK, each seed; kept in ``table_2.json``."""
        s, path = self.settings, self.run.path / "table_2.json"
        point = {**self.point("after 4"), "class_mix": s.class_mix, "larger_sets": s.larger_sets}
        if s.larger_sets == "random":
            point["of"] = s.max_multiple
        rows, start = runs.load_json(path, {}), time.perf_counter()
        rows = {name: row for name, row in rows.items() if row["point"] in (None, point)}  # none of another step 4
        names = ["real", *(f"x{k}" for k in range(1, s.max_multiple + 1))]
        n = len(self.data.train)  # of each set: where it samples, how many images
        wanted = {name: (None, n) if name == "real" else (point, int(name[1:]) * n) for name in names}
        kept = {name: self._predicted_path(name) for name in names}
        todo = [name for name in names
                if not (self._same(rows.get(name), *wanted[name]) and runs.is_whole(kept[name]))]  # fmt: skip
        if todo:
            print(f"Step 5: {names[-1]} synthetic set, {len(names)} x {s.classifier_seeds} classifiers "
                  f"({cost.text(self, '5_datasets')}).")  # fmt: skip
        with self.run.lock("5_datasets"):  # all of them drawn first: the classifiers will have the cores to themselves
            for block in sorted({block for name in todo if name != "real" for block in self._blocks(int(name[1:]))}):
                self.make_block(block, progress=f"synthetic block {block}")

        def load(name: str) -> data.Split:
            return self.data.train if name == "real" else self.synthetic(int(name[1:]))

        for name, scores in self.scores({name: functools.partial(load, name) for name in todo}, of=len(names)):
            runs.save_tensors(kept[name], {"predicted": scores[0].predicted})
            rows[name] = {"point": wanted[name][0], "num_images": wanted[name][1], **self._accuracies(scores)}
            runs.save_json(path, rows)
        if not self.run.is_done("5_datasets"):
            self.run.record("5_datasets", time.perf_counter() - start)
        return {name: rows[name] for name in names}

    def _predicted_path(self, name: str) -> Path:
        return self.run.folder("5_datasets") / f"predicted_{name}.safetensors"

    def predicted(self, name: str) -> torch.Tensor:
        """What the first classifier of a row of table 2 ("real", "x1", ..) takes the test images for: int64 (N,).

        Raises ValueError for a row that the table has not.
        """
        if name not in (rows := self.scaling()):
            raise ValueError(f"Table 2 has no row {name!r}. It has: {', '.join(rows)} (max_multiple is the last).")
        return runs.load_tensors(self._predicted_path(name))["predicted"]

"""Explorers of the generated set: can it be told from the real one, and which classes does it confuse?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ipywidgets
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from . import classifier, figures
from .course import Course, classifier_options
from .data import Split
from .widgets import Clickable, Explorer, picture, show

KINDS = ("generated", "real")  # 0, 1
MATRIX_CLASSES = 12  # shown at most: the most confused ones of a larger set


# --- real or generated ---


@dataclasses.dataclass(frozen=True)
class Questions:
    """images uint8 (N, 3, H, W); is_real and guessed_real bool (N,); classes int64 (N,)."""

    images: torch.Tensor
    is_real: torch.Tensor
    guessed_real: torch.Tensor
    classes: torch.Tensor


def real_or_generated(course: Course, num_questions: int = 12, epochs: int = 8) -> tuple[Questions, float]:
    """Questions for `quiz`, as many real as generated, and the accuracy of a classifier that was trained to tell.

    The classifier (a ResNet20 of two classes, the classifier two-sample test of Lopez-Paz and Oquab 2017) learns from
    the real training images and block 1 of the set; it is chosen, scored and asked on real test images and as many of
    block 2: none that it has seen. 0.5 would mean that the two cannot be told apart.
    """
    if num_questions < 2 or num_questions % 2:
        raise ValueError(f"num_questions must be an even number from 2, not {num_questions!r}: half of them are real.")
    n, made = len(course.data.train), course.synthetic(2)
    images = torch.cat([made.images[:n], course.data.train.images])
    random = torch.Generator().manual_seed(course.settings.seed)

    def mixed(real: Split, generated: torch.Tensor) -> tuple[Split, torch.Tensor]:
        count = min(len(real), len(generated))
        real = real.take(torch.randperm(len(real), generator=random)[:count])
        pair = torch.cat([made.images[generated[:count]], real.images])
        kinds = torch.arange(2).repeat_interleave(count)
        return Split(pair, kinds), torch.cat([made.labels[generated[:count]], real.labels])

    fresh = n + torch.randperm(n, generator=random)
    chosen = len(fresh) // 3
    val, _ = mixed(course.data.val, fresh[:chosen])
    test, classes = mixed(course.data.test, fresh[chosen:])
    options = {**classifier_options(course.settings), "seed": course.settings.seed, "epochs": epochs}
    with tqdm(total=epochs, desc="real or generated", unit="epoch") as bar:
        judge, _ = classifier.train_classifier(
            images, torch.arange(2).repeat_interleave(n), val, len(KINDS), on_epoch=lambda *_: bar.update(), **options
        )
    half, ask = num_questions // 2, len(test) // 2
    if half > ask:
        raise ValueError(f"num_questions must be at most {2 * ask} with these few images, not {num_questions}.")
    rows = torch.cat([torch.arange(half), ask + torch.arange(half)])[torch.randperm(2 * half, generator=random)]
    guessed = classifier.predict(judge, test.images[rows]).bool()
    questions = Questions(test.images[rows], test.labels[rows].bool(), guessed, classes[rows])
    return questions, classifier.accuracy(judge, test)


class Quiz(Explorer):
    """A blind test: one image at a time, real or generated? Scored, with the classifier's guess beside the reader's."""

    def __init__(self, questions: Questions, accuracy: float, class_names: Sequence[str]):
        """As `real_or_generated` makes them; ``answers`` keeps the reader's (True: real)."""
        self.questions, self.accuracy, self.class_names, self.answers = questions, accuracy, class_names, []
        self.image, self.words = picture(), ipywidgets.HTML()
        self.buttons = {kind: ipywidgets.Button(description=kind) for kind in reversed(KINDS)}
        for kind, button in self.buttons.items():
            button.on_click(lambda _, real=kind == "real": self.answer(real))
        widget = ipywidgets.VBox([self.image, ipywidgets.HBox(list(self.buttons.values())), self.words])
        super().__init__(widget, self.still, "Real or generated? Buttons to answer with in a live notebook")
        self._ask()

    def answer(self, real: bool) -> None:
        """The reader's answer to the question that is shown."""
        if len(self.answers) < len(self.questions.images):
            self.answers.append(real)
            self._ask()

    def _ask(self) -> None:
        q, done, total = self.questions, len(self.answers), len(self.questions.images)
        truth = q.is_real[:done].tolist()
        yours, its = (sum(a == b for a, b in zip(truth, said)) for said in (self.answers, q.guessed_real.tolist()))
        lines = []
        if done:
            i = done - 1
            right = "Right" if self.answers[i] == truth[i] else "Wrong"
            lines.append(f"{right}: number {done} is {KINDS[truth[i]]}, class {self.class_names[q.classes[i]]}. "
                         f"The classifier said {KINDS[int(q.guessed_real[i])]}.")  # fmt: skip
            lines.append(f"You: {yours} of {done}. The classifier: {its} of {done}.")
        if done < total:
            lines.append(f"Question {done + 1} of {total}: real or generated?")
            show(self.image, figures.image_grid([q.images[done : done + 1]], [""], scale=2.2))
        else:
            lines.append(f"On all held-out images the classifier is right in {self.accuracy:.1%}; a coin in 50%.")
            for button in self.buttons.values():
                button.disabled = True
            show(self.image, self.still())
        self.words.value = "<br>".join(lines)

    def still(self) -> Figure:
        """All the questions on one page, the answers upside down below."""
        q, rows = self.questions, 2 if len(self.questions.images) > 6 else 1
        numbers = [f"{i + 1}" for i in range(len(q.images))]
        half = -(-len(numbers) // rows)
        figure = figures.image_grid(
            [q.images[k * half : (k + 1) * half] for k in range(rows)],
            [f"{k * half + 1} to {min((k + 1) * half, len(numbers))}" for k in range(rows)], scale=0.95,
            title="Real or generated?",
        )  # fmt: skip
        real = ", ".join(number for number, is_real in zip(numbers, q.is_real) if is_real)
        figure.supxlabel(
            f"Real: {real}. The classifier is right in {self.accuracy:.0%} of all.", fontsize=8, rotation=180
        )
        return figure


def quiz(course: Course, num_questions: int = 12) -> Quiz:
    """`Quiz` about the run's generated set; trains the classifier first."""
    return Quiz(*real_or_generated(course, num_questions), course.data.class_names)


# --- confusion ---


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """int64 (num_classes, num_classes): rows the true class, columns the predicted one."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


class Confusion(Explorer):
    """The confusion matrices of classifiers on the same real images, side by side; a click shows the images of a cell.

    ``predictions``: int64 (N,) for each classifier, by its name. More than 12 classes: those most confused in all.
    """

    def __init__(self, predictions: dict[str, torch.Tensor], split: Split, class_names: Sequence[str]):
        self.predictions, self.split, self.class_names = predictions, split, class_names
        count = len(class_names)
        self.matrices = {name: confusion_matrix(p, split.labels, count) for name, p in predictions.items()}
        missed = sum(m - m.diag().diag() for m in self.matrices.values())
        order = (missed.sum(0) + missed.sum(1)).argsort(descending=True, stable=True)
        self.classes = sorted(order[:MATRIX_CLASSES].tolist())
        self.points, self.image = Clickable(), picture()
        self.words = ipywidgets.HTML("click on a number: its images")
        cells = [(name, true, said) for name in predictions for true in self.classes for said in self.classes
                 if self.matrices[name][true, said]]  # fmt: skip
        figure = self._still()
        place = {c: i for i, c in enumerate(self.classes)}
        spots = [(figure.axes[list(predictions).index(name)], place[said], place[true],
                  f"{class_names[true]} taken for {class_names[said]}: {self.matrices[name][true, said]}")
                 for name, true, said in cells]  # fmt: skip
        self.points.draw(figure, spots, lambda i: self.choose(*cells[i]), size=20)
        super().__init__(
            ipywidgets.VBox([self.points, self.words, self.image]), self._still,
            "Confusion matrices; a click on a number shows its images in a live notebook",
        )  # fmt: skip

    def choose(self, name: str, true: int, said: int) -> None:
        """Shows the real images of class ``true`` that classifier ``name`` took for ``said``."""
        rows = ((self.split.labels == true) & (self.predictions[name] == said)).nonzero().flatten()
        self.words.value = (
            f"{name}: {len(rows)} images of class {self.class_names[true]} taken for {self.class_names[said]}"
            + (", the first twelve:" if len(rows) > 12 else ":")
        )
        show(self.image, figures.image_grid([self.split.images[rows[:12]]], [""], scale=0.9))

    def _still(self) -> Figure:
        accuracies = [float((p == self.split.labels).float().mean()) for p in self.predictions.values()]
        names = [self.class_names[c] for c in self.classes]
        return figures.confusions(
            {f"{name}: {value:.1%} right": self.matrices[name][self.classes][:, self.classes].numpy()
             for name, value in zip(self.matrices, accuracies)}, names,
        )  # fmt: skip


def confusion(course: Course, multiple: int = 1) -> Confusion:
    """Compares two classifiers of table 2 on the real test images: one of the real ones, one of the set x``multiple``.

    Raises ValueError for a multiple that the table has not.
    """
    predictions = {
        "trained on real images": course.predicted("real"),
        f"trained on generated images, x{multiple}": course.predicted(f"x{multiple}"),
    }
    return Confusion(predictions, course.data.test, course.data.class_names)

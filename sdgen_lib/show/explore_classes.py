"""Explorers of the generated set: can it be told from the real one, and which classes does it confuse?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ipywidgets
import torch
from matplotlib.figure import Figure
from sklearn import metrics
from torch import nn
from tqdm.auto import tqdm

from ..classify import Score, accuracy, predict, train_classifier
from ..course import Course
from ..data import Split
from . import figures
from .widgets import Clickable, Explorer, Words, picture, show

KINDS = ("generated", "real")  # 0, 1
QUESTIONS = 12  # of a quiz, where there are images enough
MATRIX_CLASSES = 12  # shown at most: the most confused ones of a larger set


# --- real or generated ---


@dataclasses.dataclass(frozen=True)
class Questions:
    """images uint8 (N, 3, H, W); is_real and guessed_real bool (N,); classes int64 (N,)."""

    images: torch.Tensor
    is_real: torch.Tensor
    guessed_real: torch.Tensor
    classes: torch.Tensor


def real_or_generated(course: Course, num_questions: int | None = None, epochs: int = 8) -> tuple[Questions, float]:
    """Questions for `quiz`, as many real as generated, and the accuracy of a classifier that was trained to tell.

    The classifier (a ResNet20 of two classes, the classifier two-sample test of Lopez-Paz and Oquab 2017) learns from
    the real training images and block 1 of the set; it is chosen, scored and asked on real test images and as many of
    block 2: none that it has seen. 0.5 would mean that the two cannot be told apart. A run without a second block
    (``max_multiple`` 1) has half of the first one for either, and as many real images to learn from.
    None: 12 questions, or as many as there are images for. Raises ValueError for an odd number of questions, for more
    than there are images for, and where there is no image to ask about.
    """
    if num_questions is not None and (type(num_questions) is not int or num_questions < 2 or num_questions % 2):
        raise ValueError(f"num_questions must be an even number from 2, not {num_questions!r}: half of them are real.")
    n, random = len(course.data.train), torch.Generator().manual_seed(course.settings.seed)
    if course.settings.max_multiple > 1:
        made = course.synthetic(2)
        known, real, fresh = made.take(range(n)), course.data.train, made.take(n + torch.randperm(n, generator=random))
    else:
        made = course.synthetic(1).take(torch.randperm(n, generator=random))
        known, fresh = made.take(range(n // 2)), made.take(range(n // 2, n))
        real = course.data.train.take(torch.randperm(n, generator=random)[: len(known)])
    chosen = max(1, len(fresh) // 3)  # with two classes there are two images or more
    val, _ = _mixed(course.data.val, fresh.take(range(chosen)), random)
    test, classes = _mixed(course.data.test, fresh.take(range(chosen, len(fresh))), random)
    ask = len(test) // 2
    if not ask:
        raise ValueError(f"{n} training and {len(course.data.test)} test images are too few for a quiz: give 2 and 1.")
    half = min(QUESTIONS // 2, ask) if num_questions is None else num_questions // 2
    if half > ask:
        raise ValueError(f"num_questions must be at most {2 * ask} with these few images, not {num_questions}.")
    images = torch.cat([known.images, real.images])
    judge = _judge(course, Split(images, torch.arange(2).repeat_interleave(len(known))), val, epochs)
    rows = torch.cat([torch.arange(half), ask + torch.arange(half)])[torch.randperm(2 * half, generator=random)]
    guessed = predict(judge, test.images[rows]).bool()
    return Questions(test.images[rows], test.labels[rows].bool(), guessed, classes[rows]), accuracy(judge, test)


def _mixed(real: Split, generated: Split, random: torch.Generator) -> tuple[Split, torch.Tensor]:
    """As many generated images as real ones, drawn at random, labelled by `KINDS`; and the class of each."""
    count = min(len(real), len(generated))
    real, generated = real.take(torch.randperm(len(real), generator=random)[:count]), generated.take(range(count))
    kinds = torch.arange(2).repeat_interleave(count)
    return Split(torch.cat([generated.images, real.images]), kinds), torch.cat([generated.labels, real.labels])


def _judge(course: Course, training: Split, val: Split, epochs: int) -> nn.Module:
    options = {**course.classifier_options, "seed": course.settings.seed, "epochs": epochs}
    with tqdm(total=epochs, desc="real or generated", unit="epoch") as bar:
        judge, _ = train_classifier(training, val, len(KINDS), on_epoch=lambda *_: bar.update(), **options)
    return judge


class Quiz(Explorer):
    """A blind test: one image at a time, real or generated? Scored, with the classifier's guess beside the reader's."""

    def __init__(self, questions: Questions, accuracy: float, class_names: Sequence[str]):
        """As `real_or_generated` makes them; ``answers`` keeps the reader's (True: real)."""
        self.questions, self.accuracy, self.class_names, self.answers = questions, accuracy, class_names, []
        self.image, self.words = picture(), Words()
        self.buttons = {kind: ipywidgets.Button(description=kind) for kind in reversed(KINDS)}
        for kind, button in self.buttons.items():
            button.on_click(lambda _, real=kind == "real": self.answer(real))
        widget = ipywidgets.VBox([self.image, ipywidgets.HBox(list(self.buttons.values())), self.words])
        super().__init__(widget, self._still, "Real or generated? Buttons to answer with in a live notebook")
        self._ask()

    def answer(self, real: bool) -> None:
        """The reader's answer to the question that is shown."""
        if len(self.answers) < len(self.questions.images):
            self.answers.append(real)
            self._ask()

    def _ask(self) -> None:
        q, done, total = self.questions, len(self.answers), len(self.questions.images)
        lines = self._score() if done else []
        if done < total:
            lines.append(f"Question {done + 1} of {total}: real or generated?")
            show(self.image, figures.image_grid([q.images[done : done + 1]], [""], scale=2.2))
        else:
            lines.append(f"On all held-out images the classifier is right in {self.accuracy:.1%}; a coin in 50%.")
            for button in self.buttons.values():
                button.disabled = True
            show(self.image, self._still())
        self.words.say(*lines)

    def _score(self) -> list[str]:
        """What the last question's answer was, and how many the reader and the classifier have right."""
        q, done = self.questions, len(self.answers)
        truth, guessed = q.is_real[:done].tolist(), q.guessed_real[:done].tolist()
        yours, its = (sum(a == b for a, b in zip(truth, said)) for said in (self.answers, guessed))
        right = "Right" if self.answers[-1] == truth[-1] else "Wrong"
        kind, name = KINDS[truth[-1]], self.class_names[q.classes[done - 1]]
        return [
            f"{right}: number {done} is {kind}, class {name}. The classifier said {KINDS[guessed[-1]]}.",
            f"You: {yours} of {done}. The classifier: {its} of {done}.",
        ]

    def _still(self) -> Figure:
        """All the questions on one page, the answers upside down below."""
        q, rows = self.questions, 2 if len(self.questions.images) > 6 else 1
        numbers = [f"{i + 1}" for i in range(len(q.images))]
        half = -(-len(numbers) // rows)
        parts = [slice(k * half, (k + 1) * half) for k in range(rows)]
        names = [f"{numbers[part][0]} to {numbers[part][-1]}" for part in parts]
        figure = figures.image_grid([q.images[part] for part in parts], names, scale=0.95, title="Real or generated?")
        real = ", ".join(number for number, is_real in zip(numbers, q.is_real) if is_real)
        answers = f"Real: {real}. The classifier is right in {self.accuracy:.0%} of all."
        figure.supxlabel(answers, fontsize=8, rotation=180)
        return figure


def quiz(course: Course, num_questions: int | None = None) -> Quiz:
    """`Quiz` about the run's generated set, see `real_or_generated`; trains the classifier first."""
    return Quiz(*real_or_generated(course, num_questions), course.data.class_names)


# --- confusion ---


class Confusion(Explorer):
    """The confusion matrices of classifiers on the same real images, side by side; a click shows the images of a cell.

    ``predictions``: int64 (N,) for each classifier, by its name. More than 12 classes: those most confused in all.
    ``matrices``: int64 (C, C) each, rows the true class, columns the predicted one.
    """

    def __init__(self, predictions: dict[str, torch.Tensor], split: Split, class_names: Sequence[str]):
        self.predictions, self.split, self.class_names = predictions, split, class_names
        self.matrices = {name: self._matrix(predicted) for name, predicted in predictions.items()}
        missed = sum(m - m.diag().diag() for m in self.matrices.values())
        order = (missed.sum(0) + missed.sum(1)).argsort(descending=True, stable=True)
        self.classes = sorted(order[:MATRIX_CLASSES].tolist())
        self.points, self.image, self.words = Clickable(), picture(), Words()
        self.words.say("click on a number: its images")
        self._draw()
        super().__init__(
            ipywidgets.VBox([self.points, self.words, self.image]),
            self._still,
            "Confusion matrices; a click on a number shows its images in a live notebook",
        )

    def _matrix(self, predicted: torch.Tensor) -> torch.Tensor:
        classes = range(len(self.class_names))
        return torch.from_numpy(metrics.confusion_matrix(self.split.labels, predicted, labels=classes))

    def _draw(self) -> None:
        """The matrices, with a button over each number that is not 0."""
        figure, cells, spots = self._still(), [], []
        for ax, (name, matrix) in zip(figure.axes, self.matrices.items()):
            shown = matrix[self.classes][:, self.classes]
            for row, column in shown.nonzero().tolist():
                true, said = self.classes[row], self.classes[column]
                words = f"{self.class_names[true]} taken for {self.class_names[said]}: {matrix[true, said]}"
                cells.append((name, true, said))
                spots.append((ax, column, row, words))
        self.points.draw(figure, spots, lambda i: self.choose(*cells[i]), size=20)

    def choose(self, name: str, true: int, said: int) -> None:
        """Shows the real images of class ``true`` that classifier ``name`` took for ``said``."""
        rows = ((self.split.labels == true) & (self.predictions[name] == said)).nonzero().flatten()
        self.words.say(
            f"{name}: {len(rows)} images of class {self.class_names[true]} taken for {self.class_names[said]}"
            + (", the first twelve:" if len(rows) > 12 else ":")
        )
        show(self.image, figures.image_grid([self.split.images[rows[:12]]], [""], scale=0.9))

    def _still(self) -> Figure:
        shown = {}
        for name, matrix in self.matrices.items():
            reached = Score.of(self.predictions[name], self.split.labels, len(self.class_names))
            title = f"{name}\n{reached.accuracy:.1%} right, balanced {reached.balanced_accuracy:.1%}"
            shown[title] = matrix[self.classes][:, self.classes].numpy()
        return figures.confusions(shown, [self.class_names[c] for c in self.classes])


def confusion(course: Course, multiple: int = 1) -> Confusion:
    """Compares two classifiers of table 2 on the real test images: one of the real ones, one of the set x``multiple``.

    Raises ValueError for a multiple that the table has not.
    """
    predictions = {
        "trained on real images": course.predicted("real"),
        f"trained on generated images, x{multiple}": course.predicted(f"x{multiple}"),
    }
    return Confusion(predictions, course.data.test, course.data.class_names)

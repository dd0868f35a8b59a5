"""Extractive question answering: the span of a context that answers a question, or none (SQuAD 1.1
and 2.0).

As in Devlin et al. 2019, section 4.2: a row is the question and a window of the context; the model
scores each token as the answer's first and as its last; a window that does not hold the answer
points at the first token of the row, [CLS]. A question is answered by the span with the highest sum
of both scores over all its windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts, losses
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Heads,
    HostBatch,
    Measures,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import Values
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import RecordError, UserError, in_range
from fmjax.metrics import answers as answer_metrics
from fmjax.metrics import classes as class_metrics
from fmjax.metrics import details
from fmjax.tasks.question_windows import (
    SIZED,
    Context,
    Question,
    StoredWindows,
    Windows,
    columns,
    to_rows,
    values_of,
)
from fmjax.tasks.row_tables import Part, remembered, row_key, row_table, settings
from fmjax.tasks.token_rows import pad_rows, tokenizer_of

# Settings on which the rows do not depend.
NOT_OF_ROWS = ("max_answer", "unanswerable", "null_threshold", "n_best")
NO_ANSWER = "(no answer)"  # in a report
NEVER = -1e9  # the score of what cannot be an answer: finite, for sums of two


@dataclasses.dataclass(frozen=True)
class Task(contracts.Task):
    """Settings of question answering. The lengths are in tokens; windows of a context begin every
    `stride` of them.

    Where questions may have no answer (`unanswerable`, found in the training data), there is none
    if that scores more than `null_threshold` above the best span; that it has none scores what it
    does in the window that is least sure of it.
    """

    sized: ClassVar[tuple[str, ...]] = SIZED

    context: str = "context"
    question: str = "question"
    answers: str = "answers"
    max_question: int = 64  # longer ones are cut
    max_answer: int = 30
    stride: int = 0  # 0: half of what has room; BERT has 128 in rows of 384
    unanswerable: bool = False
    null_threshold: float = 0.0
    n_best: int = 20  # spans of a question among which the score is shared out

    def __post_init__(self) -> None:
        for name in ("max_question", "max_answer", "n_best"):
            in_range(f"task.{name}", vars(self)[name], least=1)

    @property
    def heads(self) -> Heads:
        return {"span": {}}

    @property
    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys((self.context, self.question), "text")

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.reads, self.answers)

    @property
    def measures(self) -> Measures:
        parts = answer_metrics.PARTS if self.unanswerable else {}
        return {**class_metrics.LOSS, **answer_metrics.ANSWERS, **parts}

    def resolve(self, source: Source) -> Config:
        """Returns whether questions of the training data have no answer."""
        check_columns(source, self.columns)

        def find() -> Config:
            none = any(not self.answers_of(source, index) for index in range(len(source)))
            return {"unanswerable": True} if none else {}

        return remembered(source, settings(self), find)

    def answers_of(self, source: Source, index: int) -> tuple[str, ...]:
        """Returns the texts of a record's answers."""
        return tuple(self.read_answers(source[index], source.where(index))[0])

    def context_of(self, source: Source, index: int) -> str:
        """Returns a record's context."""
        return str(source[index][self.context])

    def read_answers(self, record: Mapping[str, Value], where: str) -> tuple[list[str], list[int]]:
        """Returns the texts of a record's answers, and where each starts in the context, in
        characters.

        Raises UserError, naming the record, if they are not there.
        """
        given = record[self.answers]
        texts, starts = (
            (given.get(name) for name in ("text", "answer_start"))
            if isinstance(given, Mapping)
            else (None, None)
        )
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            wanted = '{"text": [...], "answer_start": [...]}'
            raise RecordError(
                where, f'column "{self.answers}" holds {given!r:.60}, not {wanted}; correct it'
            )
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not isinstance(record[self.context], str):
                raise RecordError(where, "context and answers must be texts; correct the record")
            if (
                not text
                or type(start) is not int
                or start < 0
                or not record[self.context].startswith(text, start)
            ):
                problem = f'the answer "{text}" is not at character {start} of the context'
                raise RecordError(where, f"{problem}; correct the record")
        return texts, starts

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> Windows:
        """Tokenizes a source into rows of `max_length` tokens. Raises UserError, naming the record,
        for one without text.
        """
        check_columns(source, self.columns)
        tokenizer = tokenizer_of(processors)

        def make(part: Part) -> Values:
            records = [part[index] for index in range(len(part))]
            contexts, questions = self.read(records, tokenizer, part.where)
            answered = [
                question._replace(span=self.span(part, index, contexts[question.context]))
                for index, question in enumerate(questions)
            ]
            # Raises for what does not fit.
            to_rows(contexts, answered, tokenizer, max_length, part.where, self.stride)
            return values_of(contexts, answered, part.begin)

        key = row_key(self, tokenizer, max_length, NOT_OF_ROWS)
        return StoredWindows(
            row_table(source, columns(tokenizer), key, make),
            tokenizer,
            max_length,
            self.stride,
            partial(self.context_of, source),
            partial(self.answers_of, source),
        )

    def span(self, source: Source, index: int, context: Context) -> tuple[int, int] | None:
        """Returns the first and last token of a record's first answer; None if it has none."""
        texts, starts = self.read_answers(source[index], source.where(index))
        span = context.tokens(starts[0], starts[0] + len(texts[0])) if texts else None
        if texts and span is None:
            problem = f"the answer {texts[0]!r:.60} has no token; correct the record"
            raise RecordError(source.where(index), problem, index)
        return span

    def read(
        self, records: Sequence[Mapping[str, Value]], tokenizer: Tokenizer, where: Where
    ) -> tuple[list[Context], list[Question]]:
        """Returns the contexts, each once, and the questions, without their answers."""
        contexts: dict[str, int] = {}
        encoded: list[Context] = []
        for index, record in enumerate(records):
            for column in self.reads:
                text = record[column]
                if not isinstance(text, str) or not text.strip():
                    problem = f'column "{column}" holds {text!r:.60}, not text; correct the record'
                    raise RecordError(where(index), problem, index)
            if record[self.context] not in contexts:
                contexts[record[self.context]] = len(encoded)
                text = record[self.context]
                encoded.append(Context(*tokenizer.encode_with_offsets(text), partial(str, text)))
                if not encoded[-1].ids.size:
                    problem = f'column "{self.context}" has no token; correct the record'
                    raise RecordError(where(index), problem, index)
        asked = tokenizer.encode_batch([record[self.question] for record in records])
        questions = [
            Question(ids[: self.max_question], contexts[record[self.context]])
            for ids, record in zip(asked, records, strict=True)
        ]
        return encoded, questions

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of rows."""
        return {"span": jnp.float32(batch["start_positions"].shape[0])}

    def losses(self, outputs: Batch, batch: Batch) -> jax.Array:
        """Returns the mean cross-entropy of the first and the last token of each row [B]."""
        start, end = possible(outputs["span"], batch["context_mask"], first=0.0)
        first = losses.softmax_cross_entropy(start, batch["start_positions"])
        return (first + losses.softmax_cross_entropy(end, batch["end_positions"])) / 2

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of the rows' losses."""
        return {"span": self.losses(outputs, batch).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns each row's best span, its score, that of no answer, and the loss."""
        scores, first, last = self.best(outputs["span"], batch["context_mask"], 1)
        null = outputs["span"][:, 0].sum(axis=-1)
        return {
            "scores": scores,
            "first": first,
            "last": last,
            "null": null,
            "losses": self.losses(outputs, batch),
        }

    def best(
        self, logits_BL2: jax.Array, mask_BL: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the scores of the best spans of each row, in order, and their first and last
        tokens [B,count].
        """
        start, end = possible(logits_BL2, mask_BL, first=NEVER)
        rows, length = mask_BL.shape
        most = min(self.max_answer, length)
        later = jnp.pad(end, ((0, 0), (0, most - 1)), constant_values=NEVER)
        sums = start[:, :, None] + later[:, jnp.arange(length)[:, None] + jnp.arange(most)[None]]
        scores, places = jax.lax.top_k(sums.reshape(rows, length * most), min(count, length * most))
        return scores, places // most, places // most + places % most

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns the mean loss of a row, and the official exact match and F1 over questions, 0 to
        100.
        """
        assert isinstance(examples, StoredWindows)
        (lost,) = class_metrics.real_rows(valid, arrays["losses"])
        references = examples.references()
        given = self.given_answers(arrays, valid, examples)
        return class_metrics.defined(
            {"loss": lost.mean()} | answer_metrics.answers(given, references)
        )

    def given_answers(self, arrays: HostBatch, valid: np.ndarray, examples: Windows) -> list[str]:
        """Returns the answer to each question, "" for none."""
        found = examples.answers(arrays, valid)
        return ["" if self.is_null(null, best) else text for text, _, best, null in found]

    def details(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> Record:
        """Returns the questions with the lowest F1, of equal ones with the largest loss: the mean
        over their windows.
        """
        assert isinstance(examples, StoredWindows)
        given, questions = self.given_answers(arrays, valid, examples), examples.questions
        answers = examples.references()
        references = answer_metrics.counted(answers)
        scores = 100 * answer_metrics.each(given, references)[:, 1]
        real = np.flatnonzero(valid)
        owners = np.array([examples.rows[number].question for number in real.tolist()])
        windows = np.bincount(owners, minlength=len(questions))
        sums = np.bincount(owners, arrays["losses"][real], minlength=len(questions))

        def row(index: int) -> Record:
            expected = " / ".join(dict.fromkeys(answers[index]))
            return {
                "example": index + 1,
                "question": details.shortened(examples.tokenizer.decode(questions[index].ids)),
                "expected": details.shortened(expected) or NO_ANSWER,
                "predicted": details.shortened(given[index]) or NO_ANSWER,
                "f1": float(scores[index]),
            }

        return {"worst": details.worst(sums / np.maximum(windows, 1), windows, row, scores)}

    def is_null(self, null: float, best: float) -> bool:
        """Returns whether a question has no answer, by the scores of none and of the best span."""
        return self.unanswerable and null - best > self.null_threshold

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from objects with the task's question and context, or pairs of both."""
        tokenizer = tokenizer_of(processors)
        records: list[Mapping[str, Value]] = []
        for number, example in enumerate(examples):
            if isinstance(example, list | tuple) and len(example) == 2:
                example = dict(zip((self.question, self.context), example, strict=True))
            needed = {self.question, self.context}
            if not isinstance(example, Mapping) or not needed <= set(example):
                wanted = f'an object with "{self.question}" and "{self.context}", or a pair of both'
                raise UserError(
                    f"{where(number)}: is not a question about a context; give {wanted}"
                )
            records.append(example)
        contexts, questions = self.read(records, tokenizer, where)
        rows = to_rows(contexts, questions, tokenizer, max_length, where, self.stride)
        read = Windows(contexts, questions, rows, tokenizer, 0)
        batch = pad_rows([read.assembled(row) for row in rows], tokenizer.pad_id)
        mask = np.stack([read.context_mask(row, batch["input_ids"].shape[1]) for row in rows])
        return {
            **batch,
            "context_mask": mask,
            "_windows": read,
            "_rows": rows,
            "_questions": questions,
        }

    def describe(
        self, outputs: HostBatch, batch: Mapping[str, Value], processors: Processors
    ) -> list[Record]:
        """Returns the answer to each question, "" if it has none; its score, a share among the best
        spans (and none); and where it starts and ends in the context, in characters.
        """
        read: Windows = batch["_windows"]
        logits = np.asarray(outputs["span"])
        mask = batch["context_mask"]
        mask = np.pad(mask, ((0, 0), (0, logits.shape[1] - mask.shape[1])))
        best = self.best(jnp.asarray(logits), jnp.asarray(mask), self.n_best)
        scores, first, last = map(np.asarray, best)
        spans: list[dict[tuple[int, int], float]] = [{} for _ in batch["_questions"]]
        null = np.full(len(spans), np.inf)
        for row, values, *tokens in zip(batch["_rows"], scores, first, last, strict=True):
            own = spans[row.question]
            for score, *place in zip(values.tolist(), *tokens, strict=True):
                if score > NEVER / 2:
                    span = read.characters(row, *map(int, place))
                    own[span] = max(own.get(span, -np.inf), score)
        for row, value in zip(batch["_rows"], logits[:, 0].sum(axis=-1), strict=True):
            null[row.question] = min(null[row.question], value)
        return [
            self.answer(read.contexts[question.context].text, own, float(none))
            for question, own, none in zip(batch["_questions"], spans, null, strict=True)
        ]

    def answer(
        self, text: str, spans: Mapping[tuple[int, int], float], null: float
    ) -> dict[str, Value]:
        """Returns what `describe` says of one question, by the scores of its spans and of none."""
        (begin, end), best = max(spans.items(), key=lambda item: item[1])
        among = [
            *sorted(spans.values(), reverse=True)[: self.n_best],
            *([null] if self.unanswerable else []),
        ]
        if self.is_null(null, best):
            (begin, end), best = (0, 0), null
        share = float(np.exp(best - max(among)) / np.exp(np.array(among) - max(among)).sum())
        return {"answer": text[begin:end], "score": share, "start": begin, "end": end}


def possible(
    logits_BL2: jax.Array, mask_BL: jax.Array, first: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores of each token as the first and as the last of the answer [B,L], NEVER
    outside the context; `first` is added to those of the row's first token in its place.
    """
    outside = jnp.where(mask_BL > 0, 0.0, NEVER).at[:, 0].set(first)
    return logits_BL2[..., 0] + outside, logits_BL2[..., 1] + outside

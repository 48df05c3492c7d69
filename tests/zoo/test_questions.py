"""The shipped questions: the same every time, and fair."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from moe_compress.evaluation.tasks import selection
from moe_compress.zoo import questions
from support.slow import slow_after


@pytest.fixture(autouse=True, scope="module")
def _text_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        for name, make in questions.MAKERS.items():
            patch.setitem(questions.MAKERS, name, functools.cache(make))
        yield


@pytest.mark.parametrize("name", slow_after(1, questions.MAKERS))
def test_questions_are_the_same_every_time_and_fair(name):
    found = questions.MAKERS[name]("heldout", 60)
    assert found == questions.MAKERS[name]("heldout", selection.QUESTIONS)[:60]
    for question in found:
        assert len(set(question.choices)) == questions.CHOICES and 0 <= question.answer < questions.CHOICES
        assert question.prompt == question.prompt.rstrip()
        assert all(choice[0] == " " and choice[-1] != " " for choice in question.choices)
    even = [len(set(map(len, question.choices))) == 1 for question in found]
    assert np.mean(even) > 0.8 and len({question.answer for question in found}) == questions.CHOICES
    assert not {q.prompt for q in found} & {q.prompt for q in questions.MAKERS[name]("calibration", selection.SHOTS)}


def test_right_choices_stand_in_their_documents_and_wrong_ones_do_not():
    texts = {(d.source, d.domain): d.text for d in zoo_documents()}
    for question in questions.MAKERS["local_cloze"]("heldout", 60):
        own = [text for (source, _), text in texts.items() if source == question.source]
        right = question.choices[question.answer]
        assert any(question.prompt + right in text for text in own)
        assert not any(question.prompt + wrong in text for text in own for wrong in set(question.choices) - {right})


def zoo_documents():
    from moe_compress.zoo import text

    return [document for document in text.documents("heldout") if document.domain in questions.DOMAINS]

"""Tasks of lm_eval: against a scorer of our own, on packed and edited checkpoints, kept and paired, and bad words."""

from __future__ import annotations

import ast
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_compress
from moe_compress import zoo
from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.evaluation.tasks import lm_eval_runner, selection
from moe_compress.evaluation.tasks import report as task_evaluation
from moe_compress.evaluation.tasks.lm_eval_runner import TaskAnswers
from moe_compress.evaluation.tasks.report import TaskReport, task_report
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import make_options
from moe_compress.zoo import questions
from support.slow import slow_after

pytest.importorskip("lm_eval")

LIMIT = 60


@pytest.fixture(autouse=True, scope="module")
def _text_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        for name, make in questions.MAKERS.items():
            patch.setitem(questions.MAKERS, name, functools.cache(make))
        yield


def scores(correct: list[int], width: int = 4) -> TaskAnswers:
    right = torch.tensor(correct, dtype=torch.bool)
    return TaskAnswers(right, torch.arange(len(right)), torch.zeros(len(right), width, dtype=torch.float64))


def plain_likelihoods(model, tokenizer, question: questions.Question) -> list[float]:
    """Of each choice behind the prompt, by one forward each."""
    found = []
    for choice in question.choices:
        prompt = tokenizer(question.prompt)["input_ids"]
        whole = tokenizer(question.prompt + choice)["input_ids"]
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(float(log_p[at - 1, whole[at]]) for at in range(len(prompt), len(whole))))
    return found


@pytest.fixture(scope="module")
def zoo_answers():
    model = moe_compress.load("tiny-mixtral", torch.float32)
    tokenizer = load_tokenizer(zoo.path("tiny-mixtral"), model.config.vocab_size)
    tasks = selection.choose("local")
    return model, tokenizer, tasks, lm_eval_runner.run_tasks(model, tokenizer, tasks, limit=LIMIT)


@torch.no_grad()
def test_answers_are_those_of_a_plain_forward(zoo_answers):
    _, tokenizer, _, found = zoo_answers
    exact = moe_compress.load("tiny-mixtral", torch.float64, experts_implementation="eager")
    for name, make in questions.MAKERS.items():
        for number, question in enumerate(make("heldout", 8)):
            expected = np.array(plain_likelihoods(exact, tokenizer, question))
            assert found[name].likelihood[number].tolist() == pytest.approx(expected, abs=2e-3)
            best = int((expected / [len(choice) for choice in question.choices]).argmax())
            assert bool(found[name].correct[number]) == (best == question.answer)


def test_a_trained_model_is_far_from_chance(zoo_answers):
    for each in zoo_answers[3].values():
        assert each.chance == 0.25 and lm_eval_runner.accuracy(each)["interval"][0] > 0.33


@pytest.mark.slow  # test_answers_are_those_of_a_plain_forward
def test_the_numbers_are_those_of_simple_evaluate(zoo_answers):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, tasks, found = zoo_answers
    with selection.quiet():
        stock = simple_evaluate(
            model=HFLM(model, tokenizer=tokenizer, batch_size=4),
            tasks=[part for each in tasks for part in each.parts],
            limit=LIMIT,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
    for each in tasks:
        expected = stock["results"][each.name][f"{each.metric},none"]
        assert float(found[each.name].correct.double().mean()) == pytest.approx(expected)


def test_nothing_is_printed_and_every_answer_counts(zoo_answers, capfd):
    model, tokenizer, tasks, found = zoo_answers
    steps = []
    again = lm_eval_runner.run_tasks(model, tokenizer, tasks, limit=3, progress=lambda *step: steps.append(step))
    assert capfd.readouterr() == ("", "")
    assert steps == [(number, 2 * 3 * questions.CHOICES) for number in range(1, 25)]
    assert all(torch.equal(again[name].document, found[name].document[:3]) for name in again)


def test_examples_come_before_the_question():
    alone, taught = (selection.choose("local", fewshot)[0] for fewshot in (0, 2))
    assert selection.identity(alone, 2) != selection.identity(taught, 2) == selection.identity(taught, 2)
    prompt = taught.parts[0].instances[0].args[0]
    shown = questions.MAKERS["local_cloze"]("calibration", selection.SHOTS)
    assert prompt.endswith(alone.parts[0].instances[0].args[0])
    assert sum(each.prompt + each.choices[each.answer] in prompt for each in shown) == 2


def test_pairs_of_answers():
    before, after = scores([1] * 60 + [0] * 40), scores([1] * 50 + [0] * 10 + [1] * 2 + [0] * 38)
    found = lm_eval_runner.paired(before, after)
    assert found["delta"]["value"] == pytest.approx(-0.08) and (found["lost"], found["gained"]) == (10, 2)
    spread = (0.12 - 0.08**2) ** 0.5 / 10
    assert found["delta"]["interval"] == pytest.approx([-0.08 - 1.96 * spread, -0.08 + 1.96 * spread], abs=0.011)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert lm_eval_runner.paired(before, before) | {"delta": 0} == {"delta": 0, "lost": 0, "gained": 0, "p": 1.0}
    assert lm_eval_runner.accuracy(before)["interval"] == pytest.approx([0.502, 0.691], abs=5e-4)
    other = TaskAnswers(after.correct, after.document + 1, after.likelihood)
    with pytest.raises(ValueError, match="different questions"):
        lm_eval_runner.paired(before, other)


def test_means_of_tasks_count_every_task_alike():
    small, large = scores([1] * 30 + [0] * 10), scores([1] * 100 + [0] * 300)
    found = lm_eval_runner.mean_accuracy([small, large])
    spread = ((0.75 * 0.25 / 40 + 0.25 * 0.75 / 400) / 4) ** 0.5
    assert found["value"] == 0.5 and found["interval"] == pytest.approx(
        [0.5 - 1.96 * spread, 0.5 + 1.96 * spread], abs=0.006
    )
    change = lm_eval_runner.mean_change([small, large], [scores([1] * 20 + [0] * 20), large])
    assert change["value"] == pytest.approx(-0.125) and change["interval"][1] < 0


def test_chance_counts_the_choices():
    likelihood = torch.zeros(2, 4, dtype=torch.float64)
    likelihood[1, 2:] = torch.nan
    assert TaskAnswers(torch.zeros(2, dtype=torch.bool), torch.arange(2), likelihood).chance == (1 / 4 + 1 / 2) / 2
    assert scores([1, 0], width=0).chance is None


def report(
    checkpoint: str | Path, base: str | Path, options: dict[str, object], tasks: object = "local", **given
) -> TaskReport:
    run = Run(make_options({**options, "model": base}).resolved(), RunLog(None))
    found = task_report(resolve_model(str(checkpoint)), resolve_model(str(base)), run, tasks, **{"limit": 3, **given})
    saved = json.loads(found.save(run.results("tasks")).read_text())
    assert json.loads(json.dumps(found.to_json())).items() <= saved.items()
    return found


KINDS = {
    "plain": "expert_drop keep=6",
    "edited": "expert_drop ratio=0.25 budget=global",
    "packed": "quantize method=rtn bits=8 group_size=0 format=packed",
}


@pytest.mark.parametrize("kind", slow_after(2, KINDS))
def test_every_kind_of_checkpoint_runs(kind, reader_folder, options):
    base = reader_folder("mixtral")
    made = moe_compress.compress(KINDS[kind], model=base, eval=False, **options).folder
    found = report(made, base, options)
    assert list(found.tasks) == list(questions.MAKERS)
    for row in found.tasks.values():
        assert row["documents"] == 3 and row["after"]["value"] - row["before"]["value"] == pytest.approx(
            row["delta"]["value"]
        )
    assert f"{made.name} beside {base.name}" in found.markdown() and "average" in found.markdown()
    loaded = moe_compress.load(made, torch.float32)
    again = lm_eval_runner.run_tasks(loaded, load_tokenizer(made, 320), selection.choose("local"), limit=3)
    kept = {
        path.name.split("-")[0]: lm_eval_runner.load_scores(path)
        for path in made.parents[1].glob(f"tasks/{made.name}/*")
    }
    for name, each in again.items():
        assert torch.allclose(each.likelihood, kept[name].likelihood, atol=1e-4)


def test_nobody_is_asked_twice(reader_folder, options, monkeypatch, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(reader_folder("mixtral"), base)
    first = report(base, base, options)
    asked = []
    monkeypatch.setattr(task_evaluation, "_loaded", lambda *_: asked.append(1) or pytest.fail("asked again"))
    assert report(base, base, options) == first and "after" not in first.tasks["local_quiz"] and not asked
    assert "change" not in first.markdown()
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        report(base, base, options, limit=2)
    words = base / "tokenizer_config.json"
    before = words.read_text()
    words.write_text(before.replace("{", '{"another": 1,', 1))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        report(base, base, options)
    words.write_text(before)
    [kept] = Path(str(options["results"])).glob("tasks/*/local_quiz-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match="remove it, and they are asked for anew"):
        report(base, base, options)


ROWS = [{"q": f"two and {word}", "ends": [" two", " four", " six"], "right": 1} for word in ("one", "two", "three")]


def task_file(folder: Path, name: str = "sums", **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "q",
        "doc_to_choice": "ends",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**config, **values}), encoding="utf-8")
    return file


def test_tasks_of_files(tmp_path, reader_folder, options, caplog):
    sums = task_file(tmp_path / "tasks")
    written = {"until": ["\n"], "max_gen_toks": 2}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    task_file(
        tmp_path / "tasks", "said", output_type="generate_until", generation_kwargs=written, metric_list=exact,
        doc_to_choice=None, doc_to_target="{{ends[right]}}",
    )  # fmt: skip
    (tmp_path / "tasks" / "broken.yaml").write_text("a: [", encoding="utf-8")
    base = reader_folder("mixtral")
    found = report(base, base, options, f"{sums},local")
    assert list(found.tasks) == ["sums", *questions.MAKERS] and found.tasks["sums"]["metric"] == "acc"
    assert found.tasks["sums"]["chance"] == pytest.approx(1 / 3)
    both = report(base, base, options, [str(tmp_path / "tasks")], limit=None)
    assert list(both.tasks) == ["said", "sums"] and both.tasks["said"]["chance"] is None
    assert both.tasks["sums"]["before"] == found.tasks["sums"]["before"]
    assert "broken.yaml holds no task" in caplog.text


def test_a_group_is_one_row(tmp_path):
    for name in ("first", "second"):
        task_file(tmp_path, name)
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    [chosen] = selection._named(selection._manager([tmp_path]), "both")
    assert (chosen.name, chosen.metric, len(chosen.parts)) == ("both", "acc", 2)


def test_the_paper_s_tasks_need_the_hub():
    with pytest.raises(
        ValueError, match=r"arc_challenge is on the hub, .*: use tasks=local, or the path of a task file"
    ):
        selection.choose("paper")


def test_the_paper_s_tasks_are_known():
    manager = selection._manager([selection._stock() / folder for folder in selection.PAPER.values()])
    assert set(selection.PAPER) <= set(manager.all_tasks)


def test_unknown_tasks(monkeypatch):
    stock = selection._stock()
    monkeypatch.setattr(selection, "_stock", lambda: stock / "winogrande")
    with pytest.raises(ValueError, match="unknown task 'winograde': did you mean winogrande"):
        selection.choose("winograde")
    with pytest.raises(ValueError, match="unknown task '': did you mean local or paper"):
        selection.choose("local,")


def test_bad_files(tmp_path):
    file = task_file(tmp_path / "one")
    with pytest.raises(ValueError, match="asked for twice"):
        selection.choose([str(file), str(file)])
    with pytest.raises(ValueError, match="no task file or folder"):
        selection.choose(str(tmp_path / "none.yaml"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no task"):
        selection.choose(str(tmp_path / "empty"))
    (tmp_path / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ValueError, match="does not load"):
        selection.choose(str(tmp_path / "broken.yaml"))
    rolling = {"metric_list": [{"metric": "word_perplexity"}], "output_type": "loglikelihood_rolling"}
    with pytest.raises(ValueError, match="rolling says of no document whether it was right"):
        selection.choose(str(task_file(tmp_path / "two", "rolling", **rolling)))
    shutil.rmtree(tmp_path / "one")
    file = task_file(tmp_path / "three", "lost")
    (tmp_path / "three" / "sums.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lost\.yaml does not load: .*sums\.jsonl"):
        selection.choose(str(file))


def test_bad_numbers_and_models(reader_folder, family_folder, options, monkeypatch):
    base = reader_folder("mixtral")
    for name, value in (("limit", 0), ("batch", 0), ("fewshot", -1)):
        with pytest.raises(ValueError, match=f"{name}={value}: a number from"):
            moe_compress.tasks(base, original=base, results=options["results"], **{name: value})
    with pytest.raises(ValueError, match="holds no tokenizer"):
        report(family_folder("mixtral"), base, options)
    monkeypatch.setattr("moe_compress.checkpoints.load.free_memory", lambda _: 1000)
    with pytest.raises(
        ValueError, match=r"has to be whole for tasks: .* as float32 in memory, but cpu has 1000 B free"
    ):
        report(base, base, options, limit=1)


def test_broken_weights_and_too_many_examples_are_refused(reader_folder, options, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(reader_folder("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="likelihoods are not finite on the task local_cloze"):
        report(folder, folder, options)
    with pytest.raises(ValueError, match="fewshot=999: the local tasks have 20 examples"):
        report(folder, folder, options, fewshot=999)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'moe-compress\[tasks\]'"):
        selection.choose("local")


def test_lm_eval_is_imported_where_it_is_used():
    for module in (lm_eval_runner, selection, task_evaluation):
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            assert not ast.unparse(node).startswith(("import lm_eval", "from lm_eval"))


def test_long_prompts_are_told_of(reader_folder, caplog):
    folder = reader_folder("mixtral")
    model = moe_compress.load(folder, torch.float32)
    found = lm_eval_runner.run_tasks(model, load_tokenizer(folder, 320), selection.choose("local"), limit=2)
    assert "prompts lose their beginning" in caplog.text
    assert isinstance(found["local_cloze"].likelihood, Tensor)

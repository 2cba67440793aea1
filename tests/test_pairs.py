"""evaluate.py on models of pairs, of segments and of subwords: metrics by hand, figures a character, bad input."""

import json
import math
import sys

import pytest
import torch

import evaluate
from checkpoint import Checkpoint, save_checkpoint
from evaluation import pairs as pairs_module
from evaluation.pairs import complete_pairs, print_pairs, text_metrics, wilson_interval
from evaluation.settings import QUICK
from evaluation.suite import Evaluation, load_same_corpus, select_checkpoints
from model import MODELS
from trainer import TrainConfig, load_training_corpus
from utils import console
from utils.errors import ArgumentError

PAIRS = [{"prompt": f"say {word}", "completion": word[::-1]} for word in ("abc", "bad", "cab", "dab", "add", "fee")] * 3
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "ngram_rows": 101}


def make_run(folder, **settings):
    """Random models of both kinds on one text under folder/out."""
    for seed, name in enumerate(MODELS):
        config = TrainConfig(name, steps=1, **SIZES, **settings)
        corpus = load_training_corpus(config)
        torch.manual_seed(seed)
        model = MODELS[name](config.model_config(corpus.tokenizer.vocab_size))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        about = {"name": corpus.name, "sha256": corpus.sha256, "val_fraction": 0.2}
        training = {"config": config.to_dict()}
        save_checkpoint(folder / "out" / name / "best.pt", Checkpoint(model, corpus.tokenizer, about, 1, [], training))
    return folder


def write_pairs(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    make_run(folder, segments="pairs", pairs=write_pairs(folder / "train.jsonl", PAIRS))
    write_pairs(folder / "heldout.jsonl", [{"prompt": "say dad", "completion": "dad"}, *PAIRS[:4]])
    return folder


@pytest.fixture(scope="module")
def segment_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segments")
    text = "\n\n".join(f"SPEAKER {i}:\nto be, or not to be {i % 7}" for i in range(60))
    (folder / "text.txt").write_text(text)
    return make_run(folder, segments="speech", data=str(folder / "text.txt"))


@pytest.fixture
def run_evaluate(monkeypatch, capsys):
    """The command in this process: (exit code, standard output, standard error)."""

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        code = 0
        try:
            console.run_program(evaluate.main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


# ------------------------------------------------------------------------------------------------- metrics
def test_wilson_interval_against_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                         (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=6e-5)


def test_metrics_by_hand():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    metrics = text_metrics(["the cat sat on the mat", "a b c d"], ["the cat sat on a mat", "a b c d"])
    assert metrics["exact_match"] == 50
    # n-gram matches of both texts: 5 + 4 of 6 + 4, 3 + 3 of 5 + 3, 2 + 2 of 4 + 2, 1 + 1 of 3 + 1; equal lengths
    assert metrics["bleu"] == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)
    assert metrics["rouge_l"] == pytest.approx(100 * (5 / 6 + 1) / 2)  # "the cat sat on mat": 5 of 6 words
    # chrF of "ab" for "ac": unigrams 1 of 2 on both sides, bigrams 0 of 1; orders above 2 do not exist
    assert text_metrics(["ab"], ["ac"])["chrf"] == pytest.approx(25)
    perfect = text_metrics(["one two three four"], ["one two three four"])
    assert [perfect[name] for name in pairs_module.METRICS] == pytest.approx([100] * 4)
    single = text_metrics(["olleh"], ["olleh"])
    assert single["exact_match"] == 100
    assert single["bleu"] == 0, "BLEU counts 4-grams of words"


def test_a_missing_library_is_a_dash_and_one_line(pair_run, monkeypatch, run_evaluate):
    monkeypatch.setattr(pairs_module, "installed", lambda module: False)
    code, out, err = run_evaluate(pair_run, "out/gpt", "--pairs", "heldout.jsonl")
    assert code == 0
    assert out.splitlines()[2].split()[3:6] == ["-", "-", "-"]
    assert "pip install sacrebleu==2.6.0 rouge-score==0.1.2" in err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------- models of pairs
def test_held_out_pairs_are_scored_with_both_models(pair_run, run_evaluate):
    code, out, err = run_evaluate(pair_run, "--pairs", "heldout.jsonl", "--quick", "--report", "r")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["5", "model", "llada", "gpt"]
    assert "not all held out" not in err
    results = json.loads((pair_run / "r/pairs.json").read_text())
    assert results["pairs"] == 5
    assert results["temperature"] == 0
    for name, m in results["models"].items():
        assert m["chars"] == 15, "the characters of the completions"
        assert m["is_bound"] == (name == "llada")
        assert m["ci95"][0] < m["nats_per_char"] < m["ci95"][1]
        assert m["exact_match_ci95"][0] <= m["exact_match"] <= m["exact_match_ci95"][1]
        assert [example["completion"] for example in m["examples"]] == ["dad", "cba", "dab", "bac", "bad"]


def test_the_likelihood_is_that_of_completions_given_their_prompts(pair_run):
    """GPT by the chain rule, written out."""
    checkpoints = select_checkpoints([pair_run / "out/gpt/best.pt"], "cpu")
    results = pairs_module.score_pairs(checkpoints, str(pair_run / "heldout.jsonl"), QUICK, 0.0, seed=0)
    model, tokenizer = checkpoints["gpt"].model, checkpoints["gpt"].tokenizer
    nats = 0.0
    for pair in ({"prompt": "say dad", "completion": "dad"}, *PAIRS[:4]):
        prompt, completion = (tokenizer.encode(pair[key]).tolist() for key in ("prompt", "completion"))
        row = [2, *prompt, 2, *completion, 3]
        log_p = model(torch.tensor([row])).log_softmax(-1)[0]
        nats -= sum(log_p[i - 1, row[i]].item() for i in range(len(prompt) + 2, len(row)))
    assert results["models"]["gpt"]["nats_per_char"] == pytest.approx(nats / 15, rel=1e-5)


def test_exact_matches_are_found(pair_run, monkeypatch, capsys):
    """With a generator that answers some pairs rightly; the batches keep the order of the pairs."""
    answers = {pair["prompt"]: pair["completion"] for pair in PAIRS[:2]}
    monkeypatch.setattr(pairs_module, "generate_texts", lambda model, tokenizer, prompts, **settings: [
        answers.get(prompt, "?") for prompt in prompts
    ])  # fmt: skip
    monkeypatch.setattr(pairs_module, "scoring_batch_size", lambda model: 2)
    checkpoints = select_checkpoints([pair_run / "out/gpt/best.pt"], "cpu")
    results = pairs_module.score_pairs(checkpoints, str(pair_run / "heldout.jsonl"), QUICK, 0.0, seed=0)
    assert results["models"]["gpt"]["exact_match"] == 40
    print_pairs(results)
    assert capsys.readouterr().out.splitlines()[2].split()[1] == "40.0"


def test_greedy_texts_do_not_depend_on_the_seed(pair_run):
    held_out = [pairs_module.Pair(**pair) for pair in PAIRS[:3]]
    for name, checkpoint in select_checkpoints([pair_run / "out" / name / "best.pt" for name in MODELS], "cpu").items():
        a, b = (complete_pairs(checkpoint.model, checkpoint.tokenizer, held_out, 0.0, seed) for seed in (0, 1))
        assert a == b, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "nowhere.jsonl"], "--pairs nowhere.jsonl: no such file"),
        (["--pairs", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--pairs", "unknown.jsonl"], "unknown.jsonl: unknown character"),
        (["--pairs", "long.jsonl"], "long.jsonl: the pair 'aaaa"),
        (["--pairs", "empty.jsonl"], "empty.jsonl: all completions are empty"),
        (["--pairs", "heldout.jsonl", "--data", "x"], "--data has no effect with --pairs"),
        (["--pairs", "heldout.jsonl", "--compare-estimators"], "--compare-estimators has no effect"),
        (["--pairs", "heldout.jsonl", "--temperature", "-1"], "--temperature"),
        (["--pairs", "heldout.jsonl", "--report", "train.jsonl"], "--report train.jsonl: cannot write there"),
        (["--temperature", "1"], "--temperature needs --pairs"),
        (["--compare-estimators"], "windows of characters"),
    ],
)
def test_bad_input_is_an_error_of_one_line(pair_run, run_evaluate, arguments, words):
    (pair_run / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    write_pairs(pair_run / "unknown.jsonl", [{"prompt": "é", "completion": "b"}])
    write_pairs(pair_run / "long.jsonl", [{"prompt": "a" * 40, "completion": "b"}])
    write_pairs(pair_run / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    code, out, err = run_evaluate(pair_run, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_other_models_are_refused(segment_run, pair_run, run_evaluate):
    code, _, err = run_evaluate(segment_run, "--pairs", str(pair_run / "heldout.jsonl"))
    assert code == 2
    assert "--pairs needs models of pairs" in err


def test_pairs_that_were_trained_on_are_noticed(pair_run, run_evaluate):
    assert "not all held out" in run_evaluate(pair_run, "out/gpt", "--pairs", "train.jsonl")[2]


# ------------------------------------------------------------------------------------------------- the whole evaluation
def evaluation_of(folder, settings=QUICK) -> Evaluation:
    checkpoints = select_checkpoints([folder / "out" / name / "best.pt" for name in MODELS], "cpu")
    return Evaluation(checkpoints, load_same_corpus(next(iter(checkpoints.values())), None), settings, seed=0)


@pytest.mark.parametrize("kind", ["pairs", "speech", "bpe"])
def test_every_stage_is_right_or_left_out_with_a_reason(kind, pair_run, segment_run, tmp_path, run_evaluate, request):
    folder = {"pairs": pair_run, "speech": segment_run}.get(kind)
    if kind == "bpe":
        pytest.importorskip("tokenizers")
        text = "".join(f"{i}: the king is {['dead', 'alive'][i % 2]}, é.\n" for i in range(350))
        (tmp_path / "text.txt").write_text(text)
        folder = make_run(tmp_path, data=str(tmp_path / "text.txt"), tokenizer="bpe", vocab_size=300)
    code, _, err = run_evaluate(folder, "--quick")
    assert code == 0, err
    metrics = json.loads((folder / "out/report/metrics.json").read_text())
    report = (folder / "out/report/report.md").read_text()
    for name, why in metrics["left_out"].items():
        assert f"{name}: left out, {why}" in err
        assert f"Left out ({name}): {why}." in report
        assert name.replace(" ", "_") not in metrics
    for name in ("likelihood", "training text", "samples"):
        assert f"{name}: " in err
    assert metrics["samples"]
    assert "nan" not in report.lower().split()
    evaluation = evaluation_of(folder)
    if kind == "pairs":
        characters = sum(len(pair.completion) for pair in evaluation.val)
    else:
        characters = len(evaluation.tokenizer.decode(evaluation.val.numpy()))
    if kind == "bpe":  # the policies, the curve and the bound are views of the same figure, in nats/char
        bound = metrics["models"]["llada"]["nats_per_char"]
        assert sum(metrics["masking_curve"]) / 32 == pytest.approx(bound, rel=0.05)
        assert metrics["schedules"]["uniform"][-1]["nats_per_char"] == pytest.approx(bound, rel=0.05)
        assert metrics["policies"][-1]["nats_per_char"] == pytest.approx(bound, rel=0.05)
        assert characters < metrics["corpus"]["characters"] == len((folder / "text.txt").read_text())
        assert all(row["is_bound"] for row in metrics["policies"])
    for name, m in metrics["models"].items():
        assert m["is_bound"] == (name == "llada" or kind == "bpe"), "one of many segmentations of a text is a bound"
        assert m["chars"] == characters
        assert m["bits_per_char"] == pytest.approx(m["nats_per_char"] / math.log(2))


def test_models_with_different_rows_or_tokenizers_are_not_compared(segment_run, tmp_path):
    other = make_run(tmp_path, data=str(segment_run / "text.txt"))
    with pytest.raises(ValueError, match="different segments"):
        select_checkpoints([segment_run / "out/llada/best.pt", other / "out/gpt/best.pt"], "cpu")


def test_settings_of_pairs_name_their_flag(segment_run):
    checkpoints = select_checkpoints([segment_run / "out/gpt/best.pt"], "cpu")
    with pytest.raises(ArgumentError, match="pairs needs models of pairs"):
        pairs_module.score_pairs(checkpoints, "x", QUICK, 0.0, 0)

"""Bad input to the real command lines: one line that names the flag or the file, exit code 2, no file changed.

All commands run in this process, on one pair of tiny models.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import evaluate
import generate
import train
from extras import bench
from utils.files import seal

PROGRAMS = {"train": train, "generate": generate, "evaluate": evaluate, "bench": bench}
NAMES = {name: f"{name}.py" for name in PROGRAMS} | {"bench": "(python -m extras.bench|bench.py)"}  # in their messages
HUGE = "9" * 30
WORDS = "x nan inf 1e999 "  # the last one is empty
NUMBERS = [  # program, flags, and values that each of them must refuse besides WORDS
    ("train", "--n-layer --n-head --n-embd --block-size --ngram-rows", f"0 -1 1.5 {HUGE}"),
    ("train", "--batch-size --accumulate --steps --eval-every", "0 -1 1.5"),
    ("train", "--lr --ngram-lr", f"0 -1 {HUGE}"),
    ("train", "--minutes --save-every", "0 -1"),
    ("train", "--lora-rank", "-1 1.5"),
    ("train", "--dropout --ngram-dropout --calibration --sweep-share", f"-1 1 {HUGE}"),
    ("train", "--val-fraction", f"0 -1 1 {HUGE}"),
    ("train", "--short-share", f"-1 1.1 {HUGE}"),
    ("train", "--weight-decay", f"-1 {HUGE}"),
    ("train --tokenizer bpe", "--vocab-size", f"0 -1 260 {HUGE}"),
    ("train", "--seed", f"-1 {2**63} {HUGE} 0.5"),
    ("evaluate", "--seed", f"-1 {2**63} {HUGE} 0.5"),
    ("generate", "--seed", f"-1 {2**63} {HUGE} 0.5"),
    ("generate", "--length --steps --top-p", f"0 -1 {HUGE}"),
    ("generate", "--num-samples --top --beams --top-k --slide --block-length --context-len", "0 -1 1.5"),
    ("generate", "--temperature --cfg-scale --correct --correct-temperature", "-1"),
    ("generate", "--threshold", "-1 1.1"),
    ("generate", "--repetition-penalty", "0 -1"),
    ("generate", "--length-penalty", "-11 11"),
    ("generate --watch", "--pause", f"-1 61 {HUGE}"),
    ("bench sampling", "--windows", "0 -1 1.5"),
]
SIZES = [  # flags that are numbers, but impossible ones; what the line must say
    ("train --n-layer 1001", "--n-layer: must be at most 1000"),
    ("train --model gpt --sweep-share 0.5", "--sweep-share has no effect with model gpt"),
    ("train --n-embd 30 --n-head 4", "--n-embd must be a multiple of 2 * n_head"),
    ("train --n-embd 16777216 --n-head 1", "GB of memory"),
    ("train --block-size 5000", "too few for one window of 5000"),
    ("train --ngram-rows 16777216 --n-embd 1024", "--ngram-rows 16777216 needs at least"),
    (f"train --batch-size {HUGE}", f"--batch-size {HUGE} needs at least"),
    ("train --batch-size 1000000000", "--batch-size 1000000000 needs at least"),
    (f"train --accumulate {HUGE}", "is not a multiple of"),
    ("train --batch-size 6 --accumulate 4", "--batch-size 6 is not a multiple of 4"),
    ("train --val-fraction 1e-300", "too few for one window"),
    ("train --calibration 0.9999", "too few for one window of 16"),
    ("train --lr 1e6 --eval-every 4", "the loss is not finite at step"),
    ("train --steps 1 --minutes 1", "--steps or minutes must be given, and not both"),
    ("train --lora-rank 2", "--lora-rank needs a model to adapt"),
    ("train --vocab-size 300", "--vocab-size has no effect with tokenizer char"),
    ("train --arch vanilla --ngram-rows 7", "--ngram-rows has no effect with arch vanilla"),
    ("train --model bert", "--model: invalid choice: 'bert' (choose from "),
    ("train --optimizer sgd", "--optimizer"),
    ("train --preset phone", "--preset"),
    ("train --segments verse", "--segments"),
    ("train --device quantum", "--device quantum: not available"),
    ("train --device cpu:foo", "--device cpu:foo: not available on this machine; use one of: "),
    ("train --steps 1 --epochs 1", "--epochs has no effect with a number of steps"),
    ("train --pairs pairs.jsonl --data corpus.txt", "--data has no effect with pairs FILE"),
    ("train --export .", "--export . is a folder"),
    ("train --nlayer 3", "did you mean --n-layer?"),
    ("generate --model gpt --beams 1000000000", "--beams 1000000000 needs at least"),
    ("generate --model gpt --num-samples 1000000000", "--num-samples 1000000000 needs at least"),
    (f"generate --model llada --num-samples {HUGE}", f"--num-samples {HUGE} needs at least"),
    ("generate --model gpt --beams 2 --num-samples 3", "--num-samples must be at most 2"),
    ("generate --model gpt --slide 17", "--slide must be in 1..16"),
    ("generate --model llada --slide 17", "--slide must be in 1..16"),
    ("generate --model gpt --context-len 17", "--context-len"),
    ("generate --model llada --steps 3 --block-length 4 --length 16", "--steps must be at least 4"),
    ("generate --model llada --schedule 1,x", "--schedule"),
    ("generate --order left --schedule 1,2 --length 16", "--schedule reveals 3 positions"),
    ("generate --order left --schedule 0,16 --length 16", "--schedule must be counts of at least 1"),
    ("generate --model llada --beams 2", "--beams has no effect with model llada"),
    ("generate --model gpt --order left", "--order has no effect with model gpt"),
    ("generate --model gpt --infill a[MASK]", "--infill has no effect with model gpt"),
    ("generate --infill a[mask]", "one mask is [MASK], five are [MASK*5]"),
    ("generate --infill a[MASK*9-3]", "--infill [MASK*9-3]: the second number must be"),
    ("generate --infill a[MASK*]", "[MASK*] at position 1: one mask is [MASK]"),
    ("generate --infill a[MASK5]", "[MASK5] at position 1: one mask is [MASK]"),
    ("generate --infill a[MASK]\u2603", "unknown character '\u2603' (U+2603) at position 7"),
    ("generate --model llada --infill the", "--infill"),
    ("generate --model llada --infill [MASK*0]", "--infill"),
    ("generate --model gpt --prompt a[MASK]", "--prompt is read literally, [MASK] too: give the whole text"),
    ("generate --prompt a\u20ac", "unknown character '\u20ac' (U+20AC) at position 1"),
    ("generate --race --prompt \u20ac", "LLaDA: unknown character '\u20ac'"),
    ("generate --prompt \udcff", "--prompt: byte 0xFF at position 0 is not valid"),
    ("generate --out nowhere", "no checkpoint under nowhere/"),
    ("generate --out out --checkpoint out/gpt", "--out has no effect with checkpoint out/gpt"),
    ("generate --chat --top 3", "--top does not go with --chat"),
    ("generate --race --infill [MASK]", "--infill does not go with --race"),
    ("generate --infill [MASK] --infill-file -", "--infill-file does not go with --infill"),
    ("generate --chat --watch", "--watch has no effect with mode chat"),
    ("generate --top 3 --html a.html", "--html has no effect with mode top"),
    ("generate --pause 1", "--pause has no effect with watch False"),
    ("generate --race --model gpt", "--model has no effect with mode race"),
    ("generate --race --num-samples 2", "--num-samples has no effect with mode race"),
    ("generate --infill-file one.txt --model gpt", "--infill-file has no effect with model gpt"),
    ("generate --infill [MASK] --length 3", "--length has no effect with mode infill"),
    ("generate --beams 2 --temperature 1", "--temperature has no effect with mode beams"),
    ("generate --length-penalty 2", "--length-penalty has no effect with mode text: it needs mode beams"),
    ("generate --checkpoint out/llada/last.pt --model gpt", "out/llada/last.pt holds a llada model"),
    ("generate --order sweep --schedule cosine", "--schedule does not go with --order sweep"),
    # the first window fits (16 masks), the second does not (8)
    ("generate --infill [MASK*24] --order left --schedule 8,8", "reveals 16 positions, but 8 are"),
    ("generate --gen-length 5", "unrecognized arguments: --gen-length 5; did you mean --length?"),
    ("generate --num_steps 5", "did you mean --steps?"),
    *(
        (f"generate {flag} {path}", f"{flag} {path}: cannot be written")
        for flag in ("--html", "--gif", "--page")
        for path in ("nowhere/a.html", "out")
    ),
    ("generate --order best", "--order"),
    ("generate --top 3 --seed 1", "--seed has no effect with mode top"),
    ("bench budget --model bert", "--model"),
    ("bench speed", "invalid choice: 'speed'"),
    ("evaluate --out nowhere", "no checkpoint under nowhere/"),
    ("evaluate --data other.txt", "is not the text the model was trained on"),
    ("evaluate --data missing.txt", "--data missing.txt: no such file"),
    ("evaluate --report corpus.txt", "corpus.txt"),
    ("evaluate out/gpt out/gpt", "are both gpt"),
    ("evaluate out", "out: no best.pt or last.pt in this folder"),
    ("generate --checkpoint out", "out: no best.pt or last.pt in this folder"),
    ("train --init-from out", "out: no best.pt or last.pt in this folder"),
    ("train --resume out", "out: no last.pt in this folder"),
]
FILES = [  # a program's way to read a file, what is in it, and what the line must say besides its name
    *(
        (f"{way} {name}", name)
        for way in ("generate --checkpoint", "evaluate", "train --resume", "train --init-from")
        for name in ("missing.pt", "empty", "text.pt", "cut.pt", "long.pt", "flipped.pt", "foreign.pt", "other.txt")
    ),
    *((f"train --data {name}", name) for name in ("missing.txt", "empty", "latin1.txt", "half.txt", "out", "cut.pt")),
    ("train --data one.txt", "1 tokens to train on are too few|0 tokens"),
    ("train --data short.txt", "too few for one window of 16"),
    *((f"train --pairs {name}", name) for name in ("missing.txt", "empty", "text.pt", "latin1.txt", "pairs.jsonl")),
    *((f"train --tokenizer {name}", name) for name in ("missing.txt", "empty", "text.pt", "latin1.txt", "x.json")),
    *((f"generate --infill-file {name}", name) for name in ("missing.txt", "empty", "latin1.txt", "out", "other.txt")),
    ("train --out corpus.txt", "--out corpus.txt/llada: cannot write there"),
    ("train --out readonly", "--out readonly/llada: cannot write there"),
    ("train --resume --lr 1", "--lr 1.0: the run in out/llada/last.pt has 0.006, which cannot change"),
    ("train --resume --n-layer 2", "--n-layer 2: the run in out/llada/last.pt has 1, which cannot change"),
    ("train --resume --preset gpu", "--preset gpu: the run in out/llada/last.pt has its own"),
    ("train --resume out/llada/last.pt --model gpt", "--model gpt: the run in out/llada/last.pt has llada"),
    ("train --resume out/gpt --model llada", "--model llada: the run in out/gpt/last.pt has gpt"),
    ("train --resume --data other.txt", "is not the text the model was trained on"),
    ("train --resume --out nowhere", "nowhere/llada: no such checkpoint"),
    ("train --model llada --init-from out/gpt/last.pt", "--model llada: the run in out/gpt/last.pt has gpt"),
    ("train --init-from out/llada/last.pt --n-layer 2", "--n-layer 2: the run in out/llada/last.pt has 1"),
    ("train --init-from out/llada/last.pt --lora-rank 17", "--lora-rank"),
    ("train --init-from out/llada/last.pt --block-size 17", "--block-size must be at most 16"),
]
ROWS = [
    *(
        (f"{program} {flag} {value}", flag)
        for program, flags, values in NUMBERS
        for flag in flags.split()
        for value in f"{values} {WORDS}".split(" ")
    ),
    *SIZES,
    *FILES,
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two texts, a run of each model, and files that are damaged or something else."""
    folder = tmp_path_factory.mktemp("bad_input")
    text = "".join(f"{i}: the king is {['dead', 'alive'][i % 2]}.\n" for i in range(120))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("corpus.txt").write_text(text)
        for model in ("llada", "gpt"):
            patch.setattr(sys, "argv", ["train.py", "--model", model, "--data", "corpus.txt", *TINY, "--steps", "1"])
            train.main()
        whole = Path("out/gpt/last.pt").read_bytes()
        contents = {
            **{"other.txt": text.encode() * 2, "one.txt": b"a", "short.txt": text[:30].encode(), "empty": b""},
            **{"latin1.txt": "caf\u00e9".encode("latin-1") * 99, "half.txt": text.encode() + b"\xe2\x82"},
            **{"text.pt": b"no checkpoint", "cut.pt": whole[:-1], "long.pt": whole + b"\0"},
            **{"flipped.pt": whole[:20000] + bytes([whole[20000] ^ 1]) + whole[20001:]},
            **{"pairs.jsonl": b'{"prompt": "a"}\n', "x.json": b"{}"},
        }
        for name, content in contents.items():
            Path(name).write_bytes(content)
        torch.save({"state_dict": {}}, "foreign.pt")
        seal(Path("foreign.pt"))
        shutil.copy("corpus.txt", "readonly")
    return folder


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def words_of(line: str) -> list[str]:
    """The words of a row; a value that is empty stays one."""
    words = line.split(" ")
    flags, given = [], set(words)
    if words[0] == "train" and not {"--resume", "--init-from"} & given:
        flags += [word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in given for word in pair]
    if words[0] == "train" and not {"--steps", "--minutes"} & given:
        flags += ["--steps", "4"]
    if words[0] == "train" and not {"--data", "--pairs", "--resume"} & given:
        flags += ["--data", "corpus.txt"]
    return [*flags, *words[1:]]


@pytest.mark.parametrize(("line", "named"), ROWS, ids=[line for line, _ in ROWS])
def test_bad_input_gets_one_line(work, monkeypatch, run_main, line, named):
    monkeypatch.chdir(work)
    before, program = contents(work), line.split()[0]
    code, out, err = run_main(PROGRAMS[program].main, *words_of(line))
    assert code == 2
    *notes, error = err.splitlines()
    assert re.match(rf"{NAMES[program]}( \w+)?: error: ", error)  # a benchmark's flags are known by its name alone
    assert any(part in error for part in named.split("|")), error
    assert all(note.startswith(("llada: ", "gpt: ", "out/")) for note in notes), err  # which model it is about
    assert out == ""
    assert contents(work) == before

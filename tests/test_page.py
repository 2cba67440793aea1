"""The page: its network and sampler against PyTorch in Node, and what a reader sees in headless Chromium.

Both programs may be missing; then their tests are skipped, and say so.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from browser import PROGRAM, Browser

from autoregressive import decode
from checkpoint import load_checkpoint
from config import ModelConfig
from generation import page
from generation.history import Frame, History
from generation.page import json_in_html, packed_model, quantized, write_live_page, write_page
from model import MODELS
from sampler import reverse_process
from tokenizer import END_ID, MASK_ID, SPECIAL_TOKENS, START_ID, SimpleTokenizer
from utils.errors import ArgumentError

NODE = shutil.which("node")
HARM = "document.title='harm'"
HOSTILE = f"</script><script>{HARM}</script><!--<img src=x onerror={HARM}>\u2028\u202e\x07&\ud800"
TOKENIZER = SimpleTokenizer("abcdefgh \n" + HOSTILE)
PRETRAINED = [page.SCRIPT.parents[1] / "pretrained" / f"{name}.pt" for name in MODELS]
needs_node = pytest.mark.skipif(NODE is None, reason="Node is not installed: the page's network was not run")
SIZES = [{}, {"ngram_width": 6}, {"n_embd": 32, "n_head": 4, "ngram_base": 300, "ngram_rows": 65521}]


def random_model(name: str, **sizes):
    """A model with no zeros, of sizes that are no multiples of eight, in the rounded weights that a page holds."""
    torch.manual_seed(0)
    small = {"block_size": 21, "n_embd": 20, "n_head": 2, "n_layer": 2, "ngram_rows": 101}
    model = MODELS[name](ModelConfig(vocab_size=TOKENIZER.vocab_size, **small | sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rounded(model)


def checkpoint_of(name: str, **sizes):
    return SimpleNamespace(model=random_model(name, **sizes), tokenizer=TOKENIZER)


def rounded(model):
    state = model.state_dict()
    for key, tensor in state.items():
        q, scales = quantized(tensor.numpy(), 5 if key == page.TABLES else None)
        state[key] = torch.tensor((q.reshape(scales.shape[0], -1, q.shape[1]) * scales).reshape(q.shape))
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------- in Node
def in_node(model, expression: str, wasm: bool = True, tokenizer=TOKENIZER, **values):
    """The value of a JavaScript expression of `P` (page.js), `network`, and these values."""
    description, weights = packed_model(model, tokenizer)
    program = f"""
        const P = require({json.dumps(str(page.SCRIPT))}), input = JSON.parse(require("fs").readFileSync(0, "utf8"));
        P.unpack(input.weights).then((bytes) => {{
          const network = new P.Network(input.description, bytes, {json.dumps(wasm)});
          const finite = (x) => Array.from(x, (v) => (v === -Infinity ? null : v));
          const {{ {", ".join(values) or "none"} }} = input.values;
          console.log(JSON.stringify({expression}));
        }});"""
    data = {"description": description, "weights": base64.b64encode(weights).decode(), "values": values}
    run = subprocess.run([NODE, "-e", program], input=json.dumps(data), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def texts(name: str, T: int) -> list[list[int]]:
    """A full window, a prompt, holes, one position."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, TOKENIZER.vocab_size, (T,), generator=generator)
    if name == "gpt":
        return [[START_ID, *ids[1:].tolist()], [START_ID, *ids[:5].tolist()], [START_ID]]
    holes = ids.masked_fill(torch.rand(T, generator=generator) < 0.5, MASK_ID)
    return [ids.tolist(), ids[:7].tolist() + [MASK_ID] * 6, holes.tolist(), [MASK_ID] * T, [MASK_ID]]


@needs_node
@torch.no_grad()
@pytest.mark.parametrize("wasm", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_pytorch(name, sizes, wasm):
    model, cases = random_model(name, **sizes), texts(name, 21)
    cached = "ids.map((_, t) => network.forward([ids[t]], {start: t}))" if name == "gpt" else "[]"
    code = f"""cases.map((ids) => [finite(network.forward(ids)),
        finite(network.forward(ids, {{at: [...ids.keys()].filter((t) => t % 3 === 0)}})), {cached}.flatMap(finite)])"""
    for ids, (whole, some, one_by_one) in zip(cases, in_node(model, code, wasm, cases=cases), strict=True):
        expected = model(torch.tensor([ids]))[0]
        pieces = expected if name == "gpt" else expected[:0]
        for got, want in ((whole, expected), (some, expected[::3]), (one_by_one, pieces)):
            got = torch.tensor([-torch.inf if x is None else x for x in got]).view(-1, TOKENIZER.vocab_size)
            torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@needs_node
@torch.no_grad()
def test_greedy_texts_equal_the_samplers():
    model, start = random_model("llada"), torch.tensor([[5, MASK_ID, MASK_ID, 9, 4] + [MASK_ID] * 14 + [7, 6]])
    expected, runs = [], []
    for order in ("sweep", "confidence", "drawn_confidence", "left"):
        for steps, correct in ((4, 0), (5, 2), (100, 0)):
            settings = {"steps": steps, "order": order, "temperature": 0, "correct": correct}
            *_, last = reverse_process(
                model, start, MASK_ID, never=(END_ID,), schedule="uniform", correct_temperature=0.0, **settings
            )
            expected.append([last.tokens[0].tolist(), last.nfe])
            runs.append(settings | {"correctTemperature": 0, "seed": 0})
    code = """runs.map((settings) => {
        const text = [...start], frames = [...P.fill(network, start, settings)];
        for (const { written } of frames) for (const [position, id] of written) text[position] = id;
        return [text, frames.length]; })"""
    assert in_node(model, code, start=start[0].tolist(), runs=runs) == expected

    gpt, text = random_model("gpt"), [START_ID, 5, 8]
    while len(text) < 22:
        logits = gpt(torch.tensor([text]))[0, -1]
        logits[END_ID] = -torch.inf
        text.append(int(logits.argmax()))
    code = "[...P.decode(network, [5, 8], 21, {temperature: 0, seed: 0})].map(({ written }) => written[0][1])"
    assert in_node(gpt, code) == text[3:]


@needs_node
def test_draws_follow_the_distribution_and_the_seed():
    code = """[0, 0, 1].map((seed) => {
        const uniform = P.generator(seed), n = new Array(8).fill(0), logits = [9, 9, 9, 9, 0, 1, 2, -Infinity];
        for (let i = 0; i < 20000; i += 1) n[P.draw(logits, 0, 8, 0.5, uniform)] += 1;
        return n; })"""
    same, again, other = in_node(random_model("gpt"), code)
    assert same == again != other
    p = torch.tensor([0.0, 2.0, 4.0]).softmax(0)
    assert [n / 20000 for n in other[4:7]] == pytest.approx(p.tolist(), abs=0.015)
    assert other[:4] + other[7:] == [0] * 5


# ------------------------------------------------------------------------------------------------- the file
def test_a_page_needs_nothing_else_and_admits_one_script(tmp_path):
    data = json_in_html({HOSTILE: [HOSTILE, 0.5, None]})
    assert json.loads(data) == {HOSTILE: [HOSTILE, 0.5, None]}
    assert data.isascii()
    assert not set(data) & set("<>&")
    write_page(tmp_path / "a.html", [example()], "<title>", "seed 0")
    write_live_page(tmp_path / "b.html", [checkpoint_of(name) for name in MODELS], HOSTILE)
    for path in tmp_path.iterdir():
        html = path.read_text("utf-8")
        svg = r"https?:(?!//www\.w3\.org/2000/svg)"  # the name of a namespace
        assert not re.search(svg + r"|\bsrc=(?!x )|\bhref=|url\(|@import|innerHTML|eval\(|\{\{[a-z]", html)
        *_, script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}' 'wasm-unsafe-eval'" in html
        assert "default-src 'none'" in html


def test_models_that_no_page_can_run_are_refused_in_one_line(tmp_path, monkeypatch):
    def problem(checkpoint) -> str:
        with pytest.raises(ArgumentError, match=r"^page [^\n]*$") as caught:
            write_live_page(tmp_path / "page.html", [checkpoint], "")
        assert not (tmp_path / "page.html").exists()
        return str(caught.value)

    def fake(**fields):
        config = ModelConfig(vocab_size=TOKENIZER.vocab_size, **fields)
        return SimpleNamespace(model=SimpleNamespace(config=config, name="gpt", causal=True), tokenizer=TOKENIZER)

    assert "rotary" in problem(fake(arch="vanilla"))
    assert "merge" in problem(fake(lora_rank=2))
    assert "--segments line" in problem(fake(segments="line"))
    subwords = fake()
    subwords.tokenizer = SimpleNamespace(id_to_char=TOKENIZER.id_to_char | {9: "the"})
    assert "subwords" in problem(subwords)
    monkeypatch.setattr(page, "MOST_BYTES", 50_000)
    assert "--ngram-rows" in problem(checkpoint_of("gpt", ngram_rows=1009))


def example() -> History:
    """Three steps and a correction: "Ra<newline>", then the a is drawn anew, as an i."""
    sure = (("\n", 0.9), (" ", 0.05))
    return History("LLaDA", ["R", None, None, None], [
        Frame(1, 0.1, {1: ("a", 0.25)}, {1: (("i", 0.5), ("a", 0.25)), 2: (("e", 0.4),), 3: (("x", 0.3),)}),
        Frame(2, 0.2, {2: (":", 0.7)}, {2: ((":", 0.7),), 3: ((" ", 0.5),)}),
        Frame(3, 0.3, {3: ("\n", 0.9)}, {3: sure}),
        Frame(4, 0.4, {1: ("i", 0.75)}, {1: (("i", 0.75), ("o", 0.125))}),
    ])  # fmt: skip


def test_a_history_is_packed_as_documented():
    packed = page.packed(example())
    token = [*packed["tokens"], None]
    assert [token[i] for i in packed["start"]] == example().start
    nfe, seconds, written, beliefs = json.loads(json.dumps(packed["frames"][0]))
    assert (nfe, seconds) == (1, 0.1)
    assert [[i, token[t], p] for i, t, p in written] == [[1, "a", 0.25]]
    texts = {i: "".join(token[t] for t in pairs[::2]) for i, pairs in beliefs.items()}
    assert texts == {"1": "ia", "2": "e", "3": "x"}


# ------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium is installed: the page was not driven (Debian: apt install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def complaints(browser: Browser) -> list:
    """Exceptions, messages of the browser (a refused script is one) and requests but for the page and its workers."""
    faults = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return faults + [url for url in requests if not url.startswith(("file:", "blob:"))]


def opened(browser: Browser, path, width: int = 1280, fragment: str = "", **options) -> Browser:
    browser.resize(width, 860, **options)
    browser.open(path.as_uri() + fragment)
    return browser


def text_of(browser: Browser, panel: int = 0) -> str:
    return browser.run(f"viewer.panels[{panel}].cells.map((cell) => cell.text ?? '_').join('')")


DETAILS = "[...document.querySelectorAll('#details li')].map((item) => item.textContent).join()"
KINDS = "[...document.querySelectorAll('.mirror span')].slice(0, -1).map((span) => span.className).join()"
STATUS = "document.querySelector('.status').textContent"


def test_a_recording_plays_and_never_shows_the_future(browser, tmp_path):
    write_page(tmp_path / "a.html", [example()], "A title", "the sweep, seed 3")
    opened(browser, tmp_path / "a.html", still=False)
    browser.wait("viewer.panels[0].step === 4 && !viewer.playing")  # by itself
    opened(browser, tmp_path / "a.html")  # motion is to be reduced
    assert browser.run("viewer.playing || viewer.panels[0].step") == 0
    assert browser.run("document.querySelector('h1').textContent + lead.textContent") == "A titlethe sweep, seed 3"
    browser.run("viewer.pin(viewer.panels[0], 3)")
    seen, last = [], "↵90 %,␣5.0 %"
    for _ in range(5):
        seen.append((text_of(browser), browser.run(DETAILS)))
        browser.press("ArrowRight")
    assert seen == [("R___", "x30 %"), ("Ra__", "␣50 %"), ("Ra:_", last), ("Ra:\n", last), ("Ri:\n", last)]
    assert browser.run(KINDS) == "g,w,w,w n pinned"  # nothing marks the last step
    browser.press("ArrowLeft")
    assert browser.run(STATUS).startswith("Step 3 of 4: after one look at the whole text, 1 character written")
    browser.press("Home")
    browser.press(" ")
    browser.wait("!viewer.playing && viewer.panels[0].step === 4")
    assert "4 network evaluations" in browser.run(STATUS)
    opened(browser, tmp_path / "a.html", fragment="#step=2")
    assert browser.run("viewer.panels[0].step") == 2
    browser.run("document.querySelector('textarea').focus()")
    browser.insert("x")  # a recording cannot be edited
    assert text_of(browser) == "Ra:_"
    assert complaints(browser) == []


def test_a_recorded_race_has_a_common_clock(browser, tmp_path):
    frames = [Frame(k + 1, 0.15 * (k + 1), {2 + k: ("x", 0.5)}, {2 + k: (("x", 0.5),)}) for k in range(6)]
    write_page(tmp_path / "a.html", [example(), History("GPT", ["R", ":"], frames)], "race")
    opened(browser, tmp_path / "a.html")
    steps = "viewer.panels.map((panel) => panel.step).join()"
    assert browser.run("viewer.panels.map((panel) => panel.growing).join()") == "false,true"
    states = {}
    for name in ("seconds", "nfe"):
        browser.run(f"axis.value = '{name}'; axis.dispatchEvent(new Event('change')); viewer.go(0)")
        ticks = range(browser.run("viewer.ticks.length"))
        states[name] = [browser.run(f"viewer.go(viewer.ticks[{k}]); {steps}") for k in ticks]
    assert states["seconds"] == ["0,0", "1,0", "1,1", "2,1", "3,2", "4,2", "4,3", "4,4", "4,5", "4,6"]
    assert states["nfe"] == ["0,0", "1,1", "2,2", "3,3", "4,4", "4,5", "4,6"]
    assert complaints(browser) == []


def test_text_is_never_executed_nor_parsed(browser, tmp_path):
    frame = Frame(1, 0.1, {len(HOSTILE): (HOSTILE, 0.5)}, {len(HOSTILE): ((HOSTILE, 0.5),)})
    write_page(tmp_path / "a.html", [History(HOSTILE, [*HOSTILE, None], [frame])], HOSTILE, HOSTILE)
    write_live_page(tmp_path / "b.html", [checkpoint_of("llada", block_size=160)], HOSTILE)
    opened(browser, tmp_path / "a.html").press("End")
    browser.run("viewer.pin(viewer.panels[0], viewer.panels[0].cells.length - 1)")
    assert browser.run("document.querySelectorAll('#details li').length") == 1
    assert complaints(browser) == []
    opened(browser, tmp_path / "b.html").wait("viewer.panels[0].beliefs.size")
    browser.run("viewer.panels[0].edit([]); document.querySelector('textarea').focus()")
    browser.insert(HOSTILE[:-1] + "_")
    browser.press("Enter", ctrl=True)
    browser.wait("!viewer.playing && viewer.panels[0].history?.done")
    assert text_of(browser)[:-1] == HOSTILE[:-1]
    assert browser.run("document.title") != "harm"
    assert browser.run("document.querySelectorAll('script, img').length") == 2
    assert complaints(browser) == []


@torch.no_grad()
def assert_beliefs(browser: Browser, model) -> None:
    """The page's probabilities of the editor's masks, and those of the network in PyTorch."""
    ids = browser.run("viewer.idsOf(viewer.panels[0].cells, viewer.engines[0])")
    logits = model(torch.tensor([ids]))[0]
    logits[:, : len(SPECIAL_TOKENS)] = -torch.inf
    p = logits.softmax(-1)
    for position, pairs in browser.run("[...viewer.panels[0].beliefs]"):
        assert [q for _, q in pairs] == pytest.approx(p[position].topk(8).values.tolist(), abs=1e-3)


def test_the_text_is_edited_masked_filled_and_undone(browser, tmp_path):
    models = [checkpoint_of(name, block_size=40) for name in MODELS]
    write_live_page(tmp_path / "a.html", models, "edit")
    opened(browser, tmp_path / "a.html").wait("viewer.engines.every((engine) => engine.ready)")
    browser.run("correct.value = 0; speed.value = 4; viewer.panels[0].edit([])")
    browser.run("document.querySelector('textarea').focus()")
    for key in "abc_de?":  # ? is no character of this model
        browser.press(key)
    assert text_of(browser) == "abc_de"
    browser.wait("document.getElementById('note').textContent.includes('never seen “?”')")
    browser.run("document.querySelector('textarea').setSelectionRange(1, 3)")
    browser.press("_")
    assert text_of(browser) == "a___de"
    browser.wait("viewer.panels[0].beliefs.size === 3")
    assert_beliefs(browser, models[0].model)
    browser.run("viewer.pin(viewer.panels[0], 1)")
    assert browser.run("document.querySelectorAll('#details button.candidate').length") == 8
    browser.press("Enter", ctrl=True)
    browser.wait("!viewer.playing && viewer.panels[0].history?.done && viewer.panels[0].step === 3")
    full = text_of(browser)
    assert (full[0], full[4:]) == ("a", "de")
    assert "_" not in full
    browser.run("viewer.pin(viewer.panels[0], 2)")
    assert "settled at step 2 of 3" in browser.run("details.textContent")
    other = browser.run("viewer.panels[0].history.frames[1].beliefs.get(2)[3][0]")
    browser.point("#details li:nth-child(4) button", click=True)
    assert text_of(browser) == full[:2] + other + full[3:]
    browser.wait("details.textContent.includes('would believe')")  # which moves the button
    browser.point("#details .again", click=True)
    assert text_of(browser) == full[:2] + "_" + full[3:]
    for _ in range(2):
        browser.press("z", ctrl=True)
    assert text_of(browser) == full
    assert browser.run("viewer.panels[0].step") == 3  # with its steps
    for button, text in (("#undo", "a___de"), ("#redo", full)):
        browser.point(button, click=True)
        assert text_of(browser) == text
    browser.point("#add", click=True)
    assert len(text_of(browser)) == 40
    browser.run("correct.value = 1")
    browser.point("#race", click=True)
    browser.wait("!viewer.playing && viewer.panels.every((panel) => panel.history?.done)")
    assert [len(text_of(browser, panel)) for panel in (0, 1)] == [40, 40]
    assert browser.run("document.querySelectorAll('.panel:not([hidden])').length") == 2
    assert browser.run("viewer.panels[0].history.frames.length") == 40  # 32 steps, a pass of corrections
    assert browser.run("viewer.panels[1].history.frames.length + viewer.panels[1].history.start.length") == 40
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_scrolls_sideways(browser, tmp_path, width):
    history = History("LLaDA", [None] * 60)
    tokens = {i: (["word", " ", "x" * 90, "\n", "日本"][i % 5], 0.5) for i in range(60)}
    history.frames.append(Frame(1, 0.1, tokens, {i: (pair,) for i, pair in tokens.items()}))
    write_page(tmp_path / "a.html", [history, example()], "t" * 200, "s" * 200)
    models = [checkpoint_of(name, block_size=256) for name in MODELS]
    write_live_page(tmp_path / "b.html", models, "t" * 200)
    for name in ("a", "b"):
        opened(browser, tmp_path / f"{name}.html", width, dark=True).press("End")
        assert browser.run("document.documentElement.scrollWidth") <= width
        mirror = browser.run("document.querySelector('.mirror').offsetHeight + 24")
        area = browser.run("document.querySelector('textarea').scrollHeight")
        assert max(mirror, 136) == area  # both layers break lines alike


@pytest.mark.skipif(not all(path.exists() for path in PRETRAINED), reason="there are no pretrained models")
def test_the_pretrained_pair_runs_in_time(browser, tmp_path):
    checkpoints = [load_checkpoint(path) for path in PRETRAINED]
    write_live_page(tmp_path / "a.html", checkpoints, "LLaDA and GPT")
    assert (tmp_path / "a.html").stat().st_size < 16_000_000
    start = time.monotonic()
    opened(browser, tmp_path / "a.html").wait("viewer.engines.every((engine) => engine.ready)")
    assert time.monotonic() - start < 4  # 1 s where nothing else runs
    browser.run("viewer.panels[0].edit(Array.from({ length: 240 }, () => ({ text: null, kind: 'mask' })))")
    start = time.monotonic()
    browser.point("#fill", click=True)
    browser.wait("viewer.panels[0].step > 0")
    assert time.monotonic() - start < 1.5
    browser.wait("viewer.panels[0].history.done")
    assert time.monotonic() - start < 10
    assert browser.run("viewer.panels[0].history.frames.length") == 48  # 16, and four passes of correction
    # At temperature 0 both write what PyTorch writes with the rounded weights.
    llada, gpt = (rounded(checkpoint.model) for checkpoint in checkpoints)
    prompt = checkpoints[0].tokenizer.encode("ROMEO:\n").tolist()
    browser.run("viewer.example(['', 'ROMEO:\\n{200}'])")
    browser.wait("viewer.panels[0].beliefs.size === 200")
    assert_beliefs(browser, llada)
    browser.run("temperature.value = correct.value = 0; document.getElementById('race').click()")
    browser.wait("viewer.panels.every((panel) => panel.history?.done)")
    browser.press("End")
    start, settings = torch.tensor([[START_ID, *prompt, *[MASK_ID] * 200]]), {"temperature": 0.0}
    *_, last = reverse_process(llada, start[:, 1:], MASK_ID, never=(END_ID,), correct=0, **settings)
    assert text_of(browser) == checkpoints[0].tokenizer.decode(last.tokens[0])
    tokens = [int(token) for token, _ in decode(gpt, start[:, : 1 + len(prompt)], max_out_tokens=200, **settings)]
    assert text_of(browser, 1) == "ROMEO:\n" + checkpoints[1].tokenizer.decode(tokens)
    assert complaints(browser) == []

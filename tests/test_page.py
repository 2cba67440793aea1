"""The history of a text (generation/history.py), the page that plays it, driven in a real browser, and the GIF."""

import base64
import hashlib
import json
import re

import pytest
import torch
from browser import PROGRAM, Browser

from autoregressive import decode
from generation.animation import write_gif
from generation.history import Cell, Frame, History, Status, record_decoding, record_filling
from generation.infilling import fill_masks, parse_template, text_sampling
from generation.page import json_in_html, write_page
from generation.text import prompt_ids
from model import MODELS, ModelConfig
from tokenizer import MASK_ID, SimpleTokenizer
from utils.counter import EvaluationCounter

HARM = "document.title='harm'"
HOSTILE = f"</script><script>{HARM}</script><!--<img src=x onerror={HARM}>\u2028\u202e\x07&\ud800"
TOKENIZER = SimpleTokenizer("abcdefgh \n" + HOSTILE)


def random_model(name: str):
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENIZER.vocab_size, "n_embd": 16, "n_head": 2, "n_layer": 1, "ngram_rows": 101}
    model = MODELS[name](ModelConfig(block_size=16, **sizes)).eval()
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def filled(template: str, **settings) -> History:
    ids = parse_template(template, TOKENIZER)
    states = fill_masks(random_model("llada"), [ids], text_sampling(**settings))
    *_, history = record_filling(states, ids, TOKENIZER)
    return history


def decoded(prompt: str, max_out_tokens: int) -> History:
    model = random_model("gpt")
    ids = prompt_ids(model, TOKENIZER, prompt)
    columns = decode(model, [ids], max_out_tokens=max_out_tokens)
    *_, history = record_decoding(columns, model, ids, TOKENIZER)
    return history


def tokens_of(cells: list[Cell]) -> list[str | None]:
    return [cell.token for cell in cells]


def texts_of(ids) -> list[str | None]:
    return [None if i == MASK_ID else TOKENIZER.id_to_char[i] for i in ids]


# ------------------------------------------------------------------------------------------------- history
REMASKING = {"order": "random", "schedule": "ancestral", "remask": "rescale", "eta": 0.5, "steps": 12}


@pytest.mark.parametrize("settings", [{}, {"order": "confidence", "threshold": 0.3}, REMASKING], ids=str)
def test_replaying_the_frames_gives_every_state_over_several_windows(settings):
    model, ids = random_model("llada"), parse_template("ab[MASK*30] gh[MASK*9]", TOKENIZER)
    expected, nfe = [texts_of(ids.tolist())], []

    def states():
        for state in fill_masks(model, [ids, ids], text_sampling(**settings)):
            expected.append(texts_of(state.texts[1].tolist()))
            nfe.append(state.nfe)
            yield state

    live = []
    for history in record_filling(states(), ids, TOKENIZER, row=1):
        live.append((tokens_of(history.cells), history.step))
    assert [tokens_of(history.cells_at(step)) for step in range(history.step + 1)] == expected
    assert live == [(text, i) for i, text in enumerate(expected)]
    assert [frame.nfe for frame in history.frames] == nfe
    assert sum(len(frame.changes) for frame in history.frames) < 39 * history.step  # differences alone
    for step in range(1, history.step + 1):
        for before, cell, after in zip(expected[step - 1], history.cells_at(step), expected[step], strict=True):
            assert (cell.step == step) == (before != after)
    statuses = {cell.status(step) for step in range(history.step + 1) for cell in history.cells_at(step)}
    assert statuses == set(Status) - (set() if settings is REMASKING else {Status.REMASKED})


@torch.no_grad()
def test_candidates_are_the_networks_probabilities_when_the_token_was_written():
    llada, gpt = random_model("llada"), random_model("gpt")
    for history in (filled("ab[MASK*12]", steps=3), decoded("ab", 9)):
        for step in range(1, history.step + 1):
            before = [MASK_ID if c.token is None else TOKENIZER.char_to_id[c.token] for c in history.cells_at(step - 1)]
            for position, cell in history.frames[step - 1].changes.items():
                if history.label == "GPT":
                    logits = gpt(torch.tensor([[2, *before]]))[0, -1]
                else:
                    logits = llada(torch.tensor([before]))[0, position]
                    logits[3] = -torch.inf  # [END], which a template never asks for
                p = logits.double().softmax(-1)
                assert cell.confidence == pytest.approx(float(p[TOKENIZER.char_to_id[cell.token]]), abs=1e-6)
                assert [q for _, q in cell.candidates] == pytest.approx(p.topk(5).values.tolist(), abs=1e-6)
                assert [t for t, _ in cell.candidates] == [TOKENIZER.id_to_char[i] for i in p.topk(5).indices.tolist()]


def test_decoding_is_recorded_a_token_a_step_and_leaves_no_hook():
    model = random_model("gpt")
    ids = prompt_ids(model, TOKENIZER, "ab")
    columns = [int(column[0]) for column in decode(model, [ids], max_out_tokens=25)]  # beyond the context
    with EvaluationCounter(model) as counter:
        recorded = record_decoding(decode(model, [ids], max_out_tokens=25), model, ids, TOKENIZER)
        steps = [(history.step, len(history.cells), history.nfe) for history in recorded]
    assert steps == [(k, 2 + k, k) for k in range(len(columns) + 1)]
    assert counter.nfe == len(columns)
    assert not model._forward_hooks
    history = decoded("ab", 25)
    assert tokens_of(history.cells) == ["a", "b", *texts_of(columns)]
    assert all(a.seconds <= b.seconds for a, b in zip(history.frames, history.frames[1:], strict=False))


def test_texts_of_several_lengths_are_refused():
    ids = [parse_template(f"[MASK*{n}]", TOKENIZER) for n in (40, 3)]
    with pytest.raises(ValueError, match="texts of one length"):
        list(record_filling(fill_masks(random_model("llada"), ids), ids[0], TOKENIZER))


# ------------------------------------------------------------------------------------------------- the file
def test_data_in_the_page_is_ascii_json_without_markup():
    data = {HOSTILE: [HOSTILE, 0.5, None]}
    text = json_in_html(data)
    assert json.loads(text) == data
    assert text.isascii()
    assert not set(text) & set("<>&")


def unpacked(data: dict) -> History:
    """The inverse of `page.packed`, as the page's script reads it."""
    token = [*data["tokens"], None]  # -1 is the last
    history = History(data["label"], [token[i] for i in data["start"]])
    for step, (nfe, seconds, changes) in enumerate(data["frames"], start=1):
        cells = {}
        for position, *written in changes:
            i, confidence, pairs = written or (-1, 0.0, [])
            candidates = tuple((token[a], p) for a, p in zip(pairs[::2], pairs[1::2], strict=True))
            cells[position] = Cell(token[i], step, confidence, candidates)
        history.add(Frame(cells, nfe, seconds))
    return history


def test_a_page_holds_the_whole_history_and_needs_nothing_else(tmp_path):
    histories = [filled("ab</script>[MASK*30]", **REMASKING), decoded("ab", 30)]
    write_page(tmp_path / "page.html", histories, "<title>")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import|innerHTML|eval\(", html.replace("// ", ""))
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert json.loads(data)["title"] == "<title>"
    for history, read in zip(histories, map(unpacked, json.loads(data)["histories"]), strict=True):
        assert (read.label, read.start) == (history.label, history.start)
        for step in range(history.step + 1):
            assert tokens_of(read.cells_at(step)) == tokens_of(history.cells_at(step))
        for cell, other in zip(read.cells, history.cells, strict=True):
            assert (cell.step, cell.confidence) == (other.step, pytest.approx(other.confidence, abs=1e-4))
            assert [t for t, _ in cell.candidates] == [t for t, _ in other.candidates]


def test_pages_of_long_texts_stay_small(tmp_path):
    write_page(tmp_path / "page.html", [filled("[MASK*1000]"), decoded("a", 300)], "long")
    assert (tmp_path / "page.html").stat().st_size < 250_000


# ------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium is installed: the page was not driven (Debian: apt install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def example() -> History:
    """Four steps: two characters are written, one of them is masked again and written anew."""
    history = History("LLaDA", ["R", ":", None, None])
    history.add(Frame({2: Cell("a", 1, 0.25, (("i", 0.5), ("a", 0.25)))}, 1, 0.1))
    history.add(Frame({3: Cell("\n", 2, 0.9, (("\n", 0.9), (" ", 0.05)))}, 2, 0.2))
    history.add(Frame({2: Cell(None, 3)}, 2, 0.2))
    history.add(Frame({2: Cell("i", 4, 0.75, (("i", 0.75), ("o", 0.125)))}, 3, 0.3))
    return history


KINDS = "[...document.querySelectorAll('.text .cell')].map((cell) => cell.classList[1]).join(' ')"
STEP, PLAY = "Number(slider.value)", "document.getElementById('play').textContent"
FIRST = "given given masked masked"
LAST = "given given written settled"


def opened(browser: Browser, tmp_path, histories: list[History], title: str = "A title", fragment: str = "") -> Browser:
    write_page(tmp_path / "page.html", histories, title)
    browser.open((tmp_path / "page.html").as_uri() + fragment)
    return browser


def complaints(browser: Browser) -> list:
    """Exceptions, messages of the browser (a refused script is one) and requests but for the page itself."""
    faults = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return faults + [url for url in requests if not url.startswith("file:")]


def test_the_page_plays_steps_and_jumps(browser, tmp_path):
    browser.resize(1280, 800, still=False)
    opened(browser, tmp_path, [example()])
    browser.wait(f"{STEP} === 4 && {PLAY} === 'Play'")  # it plays by itself, to the end
    assert browser.run(KINDS) == LAST
    browser.resize(1280, 800)
    opened(browser, tmp_path, [example()])
    assert [browser.run(STEP), browser.run(KINDS)] == [0, FIRST]  # unless motion is to be reduced
    browser.point("#play", click=True)
    assert browser.run(PLAY) == "Pause"
    browser.wait(f"{STEP} > 0")
    browser.point("#play", click=True)
    assert browser.run(PLAY) == "Play"
    browser.run("slider.value = 3; slider.dispatchEvent(new Event('input'))")
    assert browser.run(KINDS) == "given given remasked settled"
    assert browser.run("document.querySelector('.status').textContent") == "step 3 of 4 · 2 network evaluations"
    assert browser.run("document.querySelector('.time').textContent") == "0.20 s"
    assert browser.run("slider.getAttribute('aria-valuetext')") == "step 3 of 4"
    states = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        browser.run("document.activeElement.blur()")
        browser.press(key)
        states.append(browser.run(STEP))
    assert states == [0, 1, 2, 1, 4]
    browser.press(" ")  # at the end, space plays from the start
    browser.wait(f"{PLAY} === 'Pause' && {STEP} < 4")
    assert browser.run("document.title") == "A title"
    assert complaints(browser) == []


def test_a_character_shows_its_candidates_and_when_it_settled(browser, tmp_path):
    browser.resize(1280, 800)
    opened(browser, tmp_path, [example()], fragment="#step=2")
    assert browser.run(STEP) == 2
    events = "a (25.0 %) written at step 1 · masked again at step 3 · i (75.0 %) settled at step 4"
    browser.point(".cell:nth-child(3)")
    assert browser.run("details.querySelector('p').textContent") == f"LLaDA, position 3: settled · {events}"
    candidates = "[...details.querySelectorAll('li')].map((item) => item.textContent).join()"
    assert browser.run(candidates) == "i50.0 %,a25.0 %"
    assert browser.run("details.querySelector('.chosen').textContent") == "a25.0 %"
    browser.press("End")  # the step may change below the mouse
    assert browser.run("details.querySelector('p').textContent") == f"LLaDA, position 3: written · {events}"
    assert browser.run(candidates) == "i75.0 %,o12.5 %"
    browser.point("h1")  # a mouse that stays on a character may be reported once more
    browser.run("document.querySelector('.text .cell').focus()")
    assert browser.run("details.textContent") == "LLaDA, position 1: given"
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.run("details.querySelector('li').textContent") == "⏎90.0 %"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "⏎, settled"
    assert browser.run(STEP) == 4  # arrows in the text move between characters
    browser.resize(390, 844)
    browser.tap(".text .cell:nth-child(3)")
    browser.wait("details.textContent.startsWith('LLaDA, position 3')")


def test_a_race_has_a_common_clock(browser, tmp_path):
    browser.resize(1280, 800)
    slow = History("GPT", ["R", ":"])
    for k in range(6):
        slow.add(Frame({2 + k: Cell("x", k + 1, 0.5)}, k + 1, round(0.15 * (k + 1), 2)))
    opened(browser, tmp_path, [example(), slow])
    states = {}
    for axis in ("seconds", "nfe"):
        browser.run(f"axis_ = document.getElementById('axis'); axis_.value = '{axis}';"
                    "axis_.dispatchEvent(new Event('change'))")  # fmt: skip
        states[axis] = [
            browser.run(f"go({tick}); histories.map((history) => history.step).join()")
            for tick in range(browser.run("Number(slider.max)") + 1)
        ]
    assert states["seconds"] == ["0,0", "1,0", "1,1", "3,1", "4,2", "4,3", "4,4", "4,5", "4,6"]
    assert states["nfe"] == ["0,0", "1,1", "3,2", "4,3", "4,4", "4,5", "4,6"]
    boxes = browser.run("[...document.querySelectorAll('.panel')].map((panel) => panel.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1]  # side by side


def test_text_is_never_executed_nor_parsed(browser, tmp_path):
    browser.resize(1280, 800)
    history = History(HOSTILE, [*HOSTILE, None])
    history.add(Frame({len(HOSTILE): Cell(HOSTILE, 1, 0.5, ((HOSTILE, 0.5),))}, 1, 0.1))
    opened(browser, tmp_path, [history], title=HOSTILE)
    browser.press("End")
    browser.point(".text .word:last-child .cell:last-child")
    assert browser.run("details.querySelectorAll('li').length") == 1
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.title") != "harm"
    assert browser.run("document.querySelectorAll('.text .cell').length") == len(HOSTILE) + 1
    assert browser.run("document.querySelector('.text').textContent").startswith("</script><script>document")
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_scrolls_sideways_and_nothing_moves(browser, tmp_path, width):
    history = History("LLaDA", [None] * 60)
    history.add(Frame({i: Cell(["word", " ", "x" * 90, "\n", "日本"][i % 5], 1, 0.5) for i in range(60)}, 1, 0.1))
    browser.resize(width, 700, dark=True)
    opened(browser, tmp_path, [history, example()], title="t" * 200)
    places = "[...document.querySelectorAll('.cell')].map((c) => [c.offsetLeft, c.offsetTop, c.offsetWidth]).join()"
    before = browser.run(places)
    browser.press("End")
    assert browser.run(STEP) > 0
    assert browser.run(places) == before
    assert browser.run("document.documentElement.scrollWidth") <= width


# ------------------------------------------------------------------------------------------------- animation
def test_the_gif_shows_every_step_and_is_small(tmp_path):
    from PIL import Image

    write_gif(tmp_path / "one.gif", [filled("ab</script>[MASK*230]", steps=16)])
    write_gif(tmp_path / "race.gif", [filled("ab[MASK*200]", steps=16), decoded("ab", 200)])
    for name, frames in (("one.gif", None), ("race.gif", 20)):
        image = Image.open(tmp_path / name)
        assert image.width == 800
        assert frames is None or image.n_frames > frames
        assert image.info["loop"] == 0
        assert (tmp_path / name).stat().st_size < 1_000_000
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
        assert durations[-1] == 3000
        assert 7_000 < sum(durations) < 12_000
        assert min(durations) >= 50  # browsers slow down what is faster


def test_the_gif_draws_the_states_of_the_history(tmp_path):
    from PIL import Image

    from generation.animation import BACKGROUND, MASK, Painter

    history = example()
    painter = Painter([history])
    jumped = Painter([history]).paint([4])
    images = [painter.paint([step]) for step in range(5)]
    assert images[-1].tobytes() == jumped.tobytes()  # drawing the differences draws the whole
    panel = painter.panels[0]
    left, top = panel.left + round(2 * painter.advance), painter.top
    middles = [image.getpixel((left + 1, top + painter.line // 2)) for image in images]
    assert [middle == MASK for middle in middles] == [True, False, False, False, False]
    write_gif(tmp_path / "empty.gif", [History("LLaDA", ["a"])])  # nothing was to be written
    assert Image.open(tmp_path / "empty.gif").convert("RGB").getpixel((0, 0)) == BACKGROUND

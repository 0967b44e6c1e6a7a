"""The listening test beyond its notebooks: odd inputs, what the page gives away, the page played in Node,
the command."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import commands
import pytest
import torch
from make_run import TEXTS, hum, make_run

from dlpo_nb.audio import read_audio, rms_db, write_audio
from dlpo_nb.core import UserError, append_jsonl, read_jsonl
from dlpo_nb.listen import Listening, Pairs, Plan, judge_differences, listen, main, make_pairs
from dlpo_nb.listening_page import listening_page, write_listening_page
from dlpo_nb.preferences import (
    PAPER,
    Vote,
    agreement,
    against_judge,
    counts,
    design_effect,
    preference,
    preference_text,
    sign_test_power,
    sign_tests,
    votes_needed,
)
from dlpo_nb.systems import Clip
from dlpo_nb.trials import (
    CHOICES,
    Session,
    find_pairs,
    listener_name,
    read_test,
    read_votes,
    trials_for,
    unblinded,
    write_test,
)

NAMES = ["a base of ours", "tuned by dlpo"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(folder, test) of eight pairs whose second system is 12 dB quieter and less noisy."
    pairs = [
        (f"{TEXTS[i % 4]} {i}", Clip(hum(i, 0.03), 22050), Clip(hum(i, 0.003) / 4, 22050)) for i in range(8)
    ]
    folder = tmp_path_factory.mktemp("made")
    test = write_test(folder, NAMES, pairs)
    write_listening_page(folder)
    return folder, test


@pytest.fixture
def folder(made, tmp_path):
    "A copy of that test without votes."
    return Path(shutil.copytree(made[0], tmp_path / "test"))


def choose(session, outcome):
    "Hear both and vote: 1 for the second system, -1 for the first, 0 for a tie."
    places, trial = session.test.places(), session.trial
    for side in "AB":
        session.play(side)
    sides = {2 * places[getattr(trial, side)][1] - 1: side for side in "AB"}
    session.vote(sides.get(outcome, "tie"))


def test_votes_come_back_as_they_were_meant(folder):
    meant = {}
    for name in ("Ada", "Ben"):
        session = Session(folder, name)
        for number in range(8):
            outcome = (1, 0, -1)[(number + len(meant)) % 3]
            meant[name, session.trial.text] = outcome
            choose(session, outcome)
        assert session.trial is None and session.done == 8
    test = read_test(folder)
    votes = unblinded(test, read_votes(test, [folder / "votes.jsonl"]))
    assert {(v.listener, test.pairs[v.text][0]): v.outcome for v in votes} == meant
    assert all((vote.side in "AB") if vote.outcome else vote.side == "" for vote in votes)


def test_every_vote_is_on_disk_at_once_and_resumes(folder):
    session, heard = Session(folder, "Ada"), []
    for number in range(8):
        heard.append(session.trial)
        session.play("A")
        choose(session, 1)
        rows = read_jsonl(folder / "votes.jsonl")
        assert len(rows) == number + 1 and rows[-1]["trial"] == number + 1
        assert rows[-1]["plays"] == {"A": 2, "B": 1} and rows[-1]["seconds"] >= 0
        session = Session(folder, " Ada  ")  # as after a restart
    assert session.trial is None and heard == trials_for(session.test, "Ada")
    with pytest.raises(UserError, match="not a vote"):
        session.vote("A")


def test_half_a_line_of_a_killed_process_is_no_vote(folder):
    choose(Session(folder, "Ada"), 1)
    with open(folder / "votes.jsonl", "a") as file:
        file.write('{"test": "')
    session = Session(folder, "Ada")
    assert session.done == 1
    choose(session, 0)
    assert len(read_jsonl(folder / "votes.jsonl")) == 2


def test_orders_differ_by_listener_and_by_seed(made, tmp_path):
    _, test = made
    orders = {tuple(trials_for(test, name)) for name in ("Ada", "Ben", "Cem")}
    assert len(orders) == 3
    assert all(sorted(t.text for t in order) == sorted(text for text, *_ in test.pairs) for order in orders)
    again = write_test(
        tmp_path, NAMES, [(t, Clip(hum(1, 0.1), 22050), Clip(hum(2, 0.1), 22050)) for t in TEXTS], seed=5
    )
    same = write_test(
        tmp_path, NAMES, [(t, Clip(hum(1, 0.1), 22050), Clip(hum(2, 0.1), 22050)) for t in TEXTS], seed=5
    )
    assert again == same == read_test(tmp_path)
    clips = [clip for _, *both in again.pairs for clip in both]
    assert len(set(clips)) == len(clips), "equal recordings must not share a name"


def test_loudness_is_matched_and_never_clips(made, tmp_path):
    folder, test = made
    levels = [rms_db(read_audio(folder / "clips" / f"{clip}.mp3", None)) for clip in test.places()]
    assert max(levels) - min(levels) < 0.3  # MP3 moves a level by a tenth of a dB
    spiky = torch.zeros(22050)
    spiky[::2205] = 0.5  # peaks 20 dB above the rest
    test = write_test(tmp_path, NAMES, [("x", Clip(spiky, 22050), Clip(hum(0, 0.01), 16000))])
    assert test.level < -26
    for clip in test.places():
        assert read_audio(tmp_path / "clips" / f"{clip}.mp3", None).abs().max() <= 1


def refused(rows, folder, name="bad.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_votes(read_test(folder), [path])
    assert name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_and_foreign_votes_are_one_sentence(folder):
    session = Session(folder, "Ada")
    choose(session, 1)
    choose(session, 1)
    one, two = read_jsonl(folder / "votes.jsonl")
    assert "line 1 belongs to another" in refused([one | {"test": "0"}], folder)
    assert "two clips of a pair" in refused([one | {"A": one["B"]}], folder)
    assert "two clips of a pair" in refused([one, two | {"A": one["A"]}], folder)
    assert "two clips of a pair" in refused([one | {"A": ["x"]}], folder)
    assert "choice" in refused([one | {"choice": "C"}], folder)
    assert "voted on this pair before" in refused([one, one | {"choice": "tie"}], folder)
    assert "is not a vote" in refused([["A"]], folder) and "is not a vote" in refused([{}], folder)
    (folder / "bad.jsonl").write_text("PK\x03\x04 zip\n")
    with pytest.raises(UserError, match="bad.jsonl"):
        Session(folder, "Ada", folder / "bad.jsonl")
    paths = [folder / "votes.jsonl"] * 2  # the same file twice is harmless
    assert len(read_votes(session.test, paths)) == 2


@pytest.mark.parametrize("name", ["", "  \n", "x" * 61, "a\x00b"])
def test_names_of_listeners(name):
    with pytest.raises(UserError, match="name"):
        listener_name(name)


def test_a_broken_key_is_one_sentence(folder):
    for content in ("{", "[]", "{}", '{"pairs": [1], "systems": ["a", "b"], "test": "x"}'):
        (folder / "key.json").write_text(content)
        with pytest.raises(UserError, match="key.json"):
            read_test(folder)


# the page ------------------------------------------------------------------------------------------------


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="test">(.*?)</script>', page)[1])


def test_the_page_tells_nothing_and_loads_nothing(made):
    folder, test = made
    page, secret = listening_page(folder), test.places()
    for word in [*NAMES, "key.json", str(folder), "dlpo-seed"]:
        assert word not in page
    code = page.replace(re.search(r'id="test">(.*?)</script>', page)[1], "")
    assert not re.search(r"https?:|//\w|\bsrc=|@import|fetch|XMLHttp|innerHTML|insertAdjacent|eval\(", code)
    data = data_of(page)
    assert set(data) == {"test", "question", "pairs", "sounds"} and "seed" not in data
    assert data["pairs"] == sorted(data["pairs"]) and all(low < high for low, high, _ in data["pairs"])
    assert list(data["sounds"]) == sorted(secret)


def test_texts_are_never_html(tmp_path):
    evil = ['</script><script>alert("x")</script>', "<img src=x onerror=alert(1)>", "<!-- &amp; \u2028 'q'"]
    write_test(
        tmp_path, NAMES, [(t, Clip(hum(0, 0.1), 22050), Clip(hum(1, 0.1), 22050)) for t in evil], "<b>?</b>"
    )
    page = listening_page(tmp_path)
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page and "<b>?" not in page
    assert sorted(text for *_, text in data_of(page)["pairs"]) == sorted(evil)
    with contextlib.redirect_stdout(None):
        widget = listen(tmp_path, "Ada")
    assert "<script" not in widget.text.value + widget.main[2].value
    assert "<img" not in widget.text.value and "<b>?" not in widget.main[2].value


# as little of a browser as the page needs: elements by id, listeners, an <audio> that begins at once
BROWSER = """
const store = {};
const localStorage = {getItem: key => key in store ? store[key] : null,
  setItem: (key, value) => { if (full) throw new Error("full"); store[key] = String(value); }};
let full = false, saved = null;
const parts = {}, keys = [];
function element(id) {
  const on = {};
  return {id, on, hidden: false, textContent: "", value: "", className: "", src: "",
    classList: {add() {}, remove() {}, toggle() {}},
    addEventListener: (kind, act) => { on[kind] = act; },
    click() { if (on.click) on.click({preventDefault() {}}); },
    play: () => Promise.resolve(), pause() {}, append() {}, remove() {}};
}
const document = {getElementById: id => parts[id] ||= element(id), createElement: () => element("link"),
  body: element("body"), addEventListener: (kind, act) => keys.push(act)};
const window = globalThis;
class Blob { constructor(content) { saved = content.join(""); } }
const URL = {createObjectURL: () => "blob:"};
parts.test = element("test");
parts.test.textContent = DATA;
const press = key => keys.forEach(act => act({key, preventDefault() {}}));
const rest = () => new Promise(done => setImmediate(done));
"""
PLAY = """
const asked = [];
async function enter(name) { part("name").value = name; part("form").on.submit({preventDefault() {}}); }
(async () => {
  await enter("  Ada   Ünal ");
  press("ArrowLeft"); asked.push(part("hint").textContent);
  for (const key of ["a", "b", "a"]) { press(key); await rest(); }
  press("ArrowRight");
  part("playA").click(); await rest(); part("playB").click(); await rest();
  part("votetie").click();
  await enter("Ada Ünal");  // the page was opened again
  asked.push(part("count").textContent);
  full = true;
  press("a"); await rest(); press("B"); await rest(); press("ArrowLeft");
  asked.push(part("hint").textContent);
  full = false;
  while (!part("trial").hidden) { press("a"); await rest(); press("b"); await rest(); press("ArrowDown"); }
  part("save").click();
  asked.push(part("done").hidden, part("back").hidden, part("text").textContent);
  asked.push(part("rows").value === saved);
  console.log(JSON.stringify({asked, saved, stored: store}));
})();
"""


def test_the_page_in_node(made, tmp_path):
    """Names, keys and buttons, resuming, a full store, the file that is saved: read by `read_votes`, in the
    order of `trials_for`."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node is installed here to run the page's script")
    folder, test = made
    page = listening_page(folder)
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    program = BROWSER.replace("DATA", json.dumps(data)) + script.replace('"use strict";', "") + PLAY
    done = subprocess.run([node, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    first, count, full, *end = said["asked"]
    assert first == "Listen to both first." and count == "Pair 3 of 8" and "does not keep" in full
    assert end == [False, False, "", True]
    (tmp_path / "votes.jsonl").write_text(said["saved"], encoding="utf-8")
    rows = read_votes(test, [tmp_path / "votes.jsonl"])
    assert {row["listener"] for row in rows} == {"Ada Ünal"}
    assert [row["choice"] for row in rows] == ["B", "tie", "A"] + ["tie"] * 5
    assert rows[0]["plays"] == {"A": 2, "B": 1} and [row["trial"] for row in rows] == list(range(1, 9))
    assert [(row["A"], row["B"]) for row in rows] == [(t.A, t.B) for t in trials_for(test, "Ada Ünal")]
    assert set(said["stored"]) == {f"dlpo_nb {test.test}", f"dlpo_nb {test.test} Ada Ünal"}
    assert set(rows[0]) == set(row_of_a_session(shutil.copytree(folder, tmp_path / "copy")))


def row_of_a_session(folder):
    choose(Session(folder, "Ben"), 1)
    return read_jsonl(folder / "votes.jsonl")[0]


# in a notebook -------------------------------------------------------------------------------------------


def test_the_widget_votes_without_a_browser(folder):
    widget = Listening(folder)
    widget.begin.click()
    assert "name" in widget.hint.value and widget.session is None
    widget.name.value = "Eva"
    widget.begin.click()
    for number in range(8):
        assert widget.status.value == f"Pair {number + 1} of 8"
        widget.vote["A"].click()
        assert "both" in widget.hint.value
        widget.players.buttons["A"].click()
        (sound,) = widget.players.stage.children
        clip = folder / "clips" / f"{widget.session.trial.A}.mp3"
        assert bytes(sound.value) == clip.read_bytes() and sound.autoplay and not sound.loop
        widget.players.buttons["A"].click()
        widget.players.buttons["B"].click()
        assert "2 ×" in widget.players.buttons["A"].description and not widget.hint.value
        widget.vote[CHOICES[number % 3]].click()
    assert "Thank you! 8 votes" in widget.status.value and widget.children == (widget.status,)
    rows = read_jsonl(folder / "votes.jsonl")
    assert [row["choice"] for row in rows] == [CHOICES[i % 3] for i in range(8)]
    assert rows[0]["plays"] == {"A": 2, "B": 1}
    assert "Thank you" in Listening(folder, "Eva").status.value


def test_the_widget_says_what_is_wrong_with_the_votes(folder):
    (folder / "votes.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="votes.jsonl"):
        Listening(folder, "Eva")
    widget = Listening(folder)
    widget.name.value = "Eva"
    widget.begin.click()
    assert "votes.jsonl" in widget.hint.value
    (folder / "votes.jsonl").unlink()
    widget.begin.click()
    shutil.rmtree(folder / "clips")
    widget.players.buttons["A"].click()
    assert "cannot read" in widget.hint.value


# what is compared ----------------------------------------------------------------------------------------


def test_pairs_of_a_run_two_runs_and_folders(tmp_path):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1)
    names, pairs, notes = find_pairs([one])
    assert names == ["base", "one"] and [text for text, *_ in pairs] == TEXTS and not notes
    base = read_audio(one / "samples" / "base_000.wav", None)
    assert torch.equal(pairs[0][1].audio, base) and not torch.equal(pairs[0][2].audio, base)
    names, both, _ = find_pairs([one, two], 2)
    assert names == ["one", "two"] and len(both) == 2
    assert torch.equal(both[1][1].audio, pairs[1][2].audio)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for i in (0, 2):
        write_audio(theirs / f"{i}.wav", hum(i, 0.1))
    (theirs / "texts.txt").write_text(f"2|{TEXTS[2]}\n0|{TEXTS[0]}\n")
    names, found, notes = find_pairs([one, theirs])
    assert [text for text, *_ in found] == [TEXTS[0], TEXTS[2]] and len(notes) == 2
    assert "no recording" in notes[0] and TEXTS[1] in notes[0]
    mute = tmp_path / "mute"
    mute.mkdir()
    for i in range(2):
        write_audio(mute / f"{i}.wav", hum(i, 0.1))
    assert len(find_pairs([mute, theirs])[1]) == 2, "the other folder says what is said"


def test_what_cannot_be_compared(tmp_path):
    run = make_run(tmp_path / "run")
    stopped = make_run(tmp_path / "stopped", finished=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, match in (
        ([], "name one run"),
        ([run, run / ".", run], "name one run"),
        ([run, run / "."], "named twice"),
        ([tmp_path / "nowhere"], "not a run or a folder"),
        ([run, tmp_path / "nowhere"], "not a run or a folder"),
        ([run, run / "checkpoints" / "tuned.safetensors"], "let a model speak first"),
        ([empty], "one folder of recordings"),
        ([empty, run / "checkpoints"], "what .* says is not known"),
        ([run, stopped], "holds no recordings: the run has not been evaluated"),
        ([run, empty], "no recordings"),
    ):
        with pytest.raises(UserError, match=match):
            find_pairs(given)
    with pytest.raises(UserError, match="at least one pair"):
        find_pairs([run], 0)


def test_another_test_is_not_overwritten(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    page = make_pairs(Pairs((run,), tmp_path / "out"))
    before = page.read_bytes()
    make_pairs(Pairs((run,), tmp_path / "out"))
    assert page.read_bytes() == before
    with pytest.raises(UserError, match="another listening test"):
        make_pairs(Pairs((run,), tmp_path / "out", seed=1))
    assert "for you alone" in capsys.readouterr().out


# what votes say ------------------------------------------------------------------------------------------


def votes_of(outcomes):
    "Votes of {listener: outcomes by text}."
    return [
        Vote(name, text, outcome, "A" if outcome else "")
        for name, row in outcomes.items()
        for text, outcome in enumerate(row)
    ]


def test_the_papers_shares():
    assert counts(PAPER) == {1: 147, 0: 42, -1: 31}
    assert [round(100 * share) for share, _, _ in preference(PAPER, "votes").values()] == [67, 19, 14]
    assert sign_tests(PAPER)["vote"][2] < 1e-15


def test_unanimous_votes_are_not_certain():
    share, low, high = preference(votes_of({"Ada": [1, 1, 1, 1]}))[1]
    assert share == high == 1 and low == pytest.approx(0.025 ** (1 / 4), abs=1e-6)  # Clopper & Pearson


def test_intervals_know_listeners():
    votes = votes_of({f"{i}": [1 if i % 2 else -1] * 20 for i in range(10)})  # half love it, half hate it
    widths = {
        by: high - low
        for by in ("votes", "text", "listener", "both")
        for _, low, high in [preference(votes, by)[1]]
    }
    assert widths["listener"] > 3 * widths["votes"] and widths["both"] > 3 * widths["votes"]
    assert design_effect(votes) == pytest.approx(20, rel=0.1)  # 200 votes are worth ten
    assert sign_tests(votes)["listener"] == (5, 5, 1.0)


def test_agreement_of_all_and_of_none():
    assert agreement(votes_of({"a": [1, -1, 1, 0], "b": [1, -1, 1, 0]})) == (1.0, 1.0)
    same, alpha = agreement(votes_of({"a": [1, -1] * 5, "b": [-1, 1] * 5}))
    assert same == 0 and alpha < 0
    assert all(value != value for value in agreement(votes_of({"a": [1, 0]})))


def test_planning_is_exact():
    for win, lose in ((0.67, 0.14), (0.5, 0.3)):
        n = votes_needed(win, lose)
        decided = round(n * (win + lose))
        assert sign_test_power(decided, win / (win + lose)) >= 0.79
        assert sign_test_power(decided // 2, win / (win + lose)) < 0.8
        assert votes_needed(win, lose, design=2) in (2 * n - 1, 2 * n)
    assert votes_needed(1.0, 0.0) == 6  # 2 / 2^6 is the first p below 0.05
    assert votes_needed(0.3, 0.5) == votes_needed(0.5, 0.3)
    for wrong in ((0.5, 0.5), (0.8, 0.3), (-0.1, 0.3), (0.0, 0.0), (0.4001, 0.4)):
        with pytest.raises(UserError):
            votes_needed(*wrong)
    for option in (dict(power=1), dict(level=0), dict(design=0.5)):
        with pytest.raises(UserError):
            votes_needed(0.5, 0.3, **option)


def test_judges_beside_votes(tmp_path, made):
    votes = votes_of({"a": [1, 1, 0, -1, -1], "b": [1, 0, 0, 0, -1]})
    judged = against_judge(votes, {text: -text for text in range(5)})
    assert judged["rho"] > 0.9 and judged["n"] == 5
    assert against_judge(votes, {text: text for text in range(5)})["rho"] < -0.9
    assert against_judge(votes, {0: 1.0})["rho"] != against_judge(votes, {0: 1.0})["rho"]  # nan
    run = make_run(tmp_path / "run")
    names, pairs, _ = find_pairs([run])
    test = write_test(tmp_path / "out", names, pairs)
    differences = judge_differences(run / "evaluation.csv", test)
    assert set(differences) == {"dnsmos", "nisqa"} and set(differences["dnsmos"]) == {0, 1, 2, 3}
    (tmp_path / "other.csv").write_text("system,index,text,dnsmos\nx,0,Rain.,3\n")
    with pytest.raises(UserError, match="has scores of x"):
        judge_differences(tmp_path / "other.csv", test)


def test_lines_fit_and_no_votes_are_refused():
    votes = votes_of({"a name that is longer than its column is": [1, 0, -1] * 5, "b": [1] * 15})
    text = preference_text(
        votes, ("gradtts-small-base", "dlpo-seed0"), {"distillmos": dict(enumerate(range(15)))}
    )
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(UserError, match="no votes"):
        preference_text([], NAMES)


# the command ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    run = make_run(tmp_path / "run")
    done = commands.run("listen", "pairs", run, "--out", tmp_path / "out", "--pairs", "3")
    assert done.returncode == 0 and "3 pairs of base and run" in done.stdout, done.stderr
    session = Session(tmp_path / "out", "Ada")
    while session.trial:
        choose(session, 1)
    votes = tmp_path / "out" / "votes.jsonl"
    done = commands.run(
        "listen", "results", votes, "--scores", run / "evaluation.csv", "--figure", tmp_path / "f.png"
    )
    assert done.returncode == 0 and "run 100 %" in done.stdout and "dnsmos" in done.stdout, done.stderr
    assert (tmp_path / "f.png").stat().st_size > 10_000
    (tmp_path / "cut.jsonl").write_text(votes.read_text().rstrip())
    done = commands.run("listen", "results", tmp_path / "cut.jsonl", "--test", tmp_path / "out")
    assert done.returncode == 0 and "2 votes" in done.stdout and "cut.jsonl: the last line" in done.stdout
    append_jsonl(votes, {"a": 1})
    done = commands.run("listen", "results", votes)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (
        commands.run("listen", "plan", "--win", "0.67", "--lose", "0.14", "--design", "1").stdout
        == "25 votes\n"
    )


def test_commands_in_process(tmp_path, capsys):
    for argv in (["results"], ["results", str(tmp_path / "none.jsonl")], ["pairs"]):
        with pytest.raises(UserError):
            main(argv)
    main(["plan", "--win", "0.5", "--lose", "0.3"])
    assert capsys.readouterr().out == f"{votes_needed(0.5, 0.3, design=Plan.design)} votes\n"

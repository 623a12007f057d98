"""The page of a study: it needs no network, is the same bytes for the same trials, and says what it cannot draw."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from scforget.search import Choice
from scforget.sweeps import plots, studies
from studying import SPACE, judge, toy

HEADINGS = [
    "Pareto front: distance to the retrained models against cost",
    *(f"{what} {name}" for name in studies.OBJECTIVES
      for what in ("History of", "Settings and", "All settings together,", "Importance for")),
]  # fmt: skip


class Loads(HTMLParser):
    """What a page fetches, and its headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self._tag == "h2":
            self.headings.append(data)
            self._tag = ""


def study(trials: int) -> Study:
    made = toy(InMemoryStorage())
    studies.run(made, studies.Objective(SPACE, judge, trials), trials)
    return made


@pytest.fixture(scope="module")
def page() -> str:
    return plots.page(study(9), "tiny/part/ssd")


def test_page_has_every_picture(page):
    found = Loads(page)
    assert found.headings == HEADINGS
    assert len(HEADINGS) == 9
    assert page.count("Plotly.newPlot(") == 9
    assert "Nothing to draw yet" not in page
    for key in SPACE:
        assert key in page


def test_page_needs_no_network_and_holds_its_script_once(page):
    assert Loads(page).fetched == []
    assert not re.search(r"<(script|link|img|iframe)[^>]*https?:", page)
    assert page.count("plotly.js v") == 1
    assert len(page) > 1e6


def test_page_is_the_same_bytes_for_the_same_trials(page):
    """Made by another process, at another time, after failures: nothing of that is in it."""
    again = study(9)
    assert plots.page(again, "tiny/part/ssd") == plots.page(again, "tiny/part/ssd") == page
    holey = toy(InMemoryStorage())
    holey.add_trial(create_trial(state=TrialState.FAIL))
    for trial in again.trials:
        trial.user_attrs["worker"] = ["another machine", 1, 0.0]
        holey.add_trial(trial)
        holey.add_trial(create_trial(state=TrialState.FAIL))
    assert len(studies.finished(holey)) == 9
    holey.tell(holey.ask().number, state=TrialState.FAIL)
    assert plots.page(holey, "tiny/part/ssd") == page
    assert "another machine" not in page
    assert "worker" not in re.sub(r"<script>/\*.*?</script>", "", page.split("Plotly.newPlot", 1)[1], flags=re.S)


def test_page_of_another_study_is_another(page):
    assert plots.page(study(8), "tiny/part/ssd") != page
    assert plots.page(study(9), "tiny/part/ssd", 8) == plots.page(study(8), "tiny/part/ssd")


@pytest.mark.parametrize("trials", [0, 1])
def test_page_of_a_study_too_short_says_so(trials):
    made = study(trials)
    found = plots.page(made, "short")
    assert Loads(found).headings == HEADINGS
    assert found.count(f"<p>Nothing to draw yet: {trials} finished trials.</p>") == 9
    assert "Plotly" not in found


def test_page_of_trials_that_diverged_says_so():
    made = toy(InMemoryStorage())
    studies.run(made, studies.Objective(SPACE, lambda *_: "NaN", 3), 3)
    assert plots.page(made, "diverged").count("Nothing to draw yet: 0 finished trials") == 9


def test_page_of_trials_that_are_all_alike_has_what_can_be_drawn():
    """One value of one setting, and of an objective: importance cannot be told."""
    made = toy(InMemoryStorage(), first=None)
    same = {"mode": Choice("a")}
    found = {"distance": 1.0, "cost": 0.5, "elbo_loss": 0.0, "marker_r_loss": 0.0}
    studies.run(made, studies.Objective(same, lambda *_: found, 3), 3)
    shown = plots.page(made, "alike")
    assert Loads(shown).headings == HEADINGS
    assert "Plotly.newPlot(" in shown


def test_page_escapes_its_title():
    assert "<b>&" not in plots.page(study(0), "<b>&")
    assert "&lt;b&gt;&amp;" in plots.page(study(0), "<b>&")

"""A report in headless Chromium: what it shows, what pointing and keys do, and that it fetches
nothing.
"""

import json

import pytest
from run_on_disk import RIGHT, WRONG, group, rising, write_evaluation, write_run

import report_run
from benchmarks.screenshots import NARROW, WIDE, browser, set_scheme, why_no_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
]

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
GROUPS = {  # number -> rows
    0: [(RIGHT, 20.0), (WRONG, 10.0), (RIGHT, 20.0), ([*WRONG[:3], " ", "=7\n", *WRONG[4:]], 10.0)],
    1: [([*RIGHT[:3], EVIL, *RIGHT[4:]], 20.0), (WRONG, 1.5)],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with hostile text in a completion, a prompt, a reference and its name."""
    lines = [
        line
        for step in (1, 2)
        for number, rows in GROUPS.items()
        for line in group(rows, step=step, number=number)
    ]
    for line in lines:
        if line["group"] == 1:
            line |= {
                "prompt": [{"role": EVIL, "content": EVIL}],
                "answer": EVIL,
                "kept": line["row"] == 0,
            }
    run = write_run(
        tmp_path_factory.mktemp("report") / "run", lines, rising(30), recipe={"run_name": EVIL}
    )
    write_evaluation(run / "evaluation" / "a<b>.jsonl", [[True]])
    assert report_run.main([str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def chromium():
    with browser() as driver:
        yield driver


@pytest.fixture
def page(chromium, run):
    """The report, opened anew in light colours and with empty logs."""
    set_scheme(chromium, dark=False)
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get((run / "report.html").as_uri())
    choose(chromium, "#group", "prompt 1")
    return chromium


def find(page, selector):
    return page.find_elements("css selector", selector)


def choose(page, select: str, text: str) -> None:
    from selenium.webdriver.support.select import Select

    options = Select(find(page, select)[0])
    options.select_by_visible_text(
        next(option.text for option in options.options if text in option.text)
    )


def shown_tokens(page) -> list[list[str]]:
    """The text of every token by completion, in the order of the page."""
    return page.execute_script(
        """
        return [...document.querySelectorAll('.tokens')].map(
          row => [...row.querySelectorAll('.token')].map(token => token.textContent))"""
    )


def press(page, *keys) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def current(page) -> tuple[int, int]:
    """Row and position of the focused token."""
    return tuple(
        page.execute_script(
            "const d = document.activeElement.dataset; return [Number(d.row), Number(d.position)]"
        )
    )


def test_the_page_has_no_console_errors_and_requests_nothing(page):
    for dark in (False, True):
        set_scheme(page, dark=dark)
        for number in ("prompt 1", "prompt 2"):
            choose(page, "#group", number)
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requested = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert {url.partition(":")[0] for url in requested} <= {"file", "data"}
    assert [url for url in requested if url.startswith("file:")] == [page.current_url]


def test_a_request_is_forbidden_and_shows_in_the_console(page):
    """So the test above can fail."""
    page.execute_script(
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)"
    )
    assert "Content Security Policy" in " ".join(
        entry["message"] for entry in page.get_log("browser")
    )


def test_completions_are_shown_token_by_token_better_beside_worse(page):
    assert [heading.text for heading in find(page, ".sides h3")] == [
        "Better than the group (2)",
        "Worse than the group (2)",
    ]
    tokens = shown_tokens(page)
    assert tokens[0] == [token.replace("\n", "⏎") for token in RIGHT]
    assert tokens[3] == [
        token.replace("\n", "⏎") for token in [*WRONG[:3], "·", "=7\n", *WRONG[4:]]
    ]
    assert (
        find(page, ".tokens")[0].text
        == "<reasoning>⏎\n2+2=4⏎\n</reasoning>⏎\n<answer>4</answer><end>"
    )
    better, worse = (side.rect for side in find(page, ".sides > div"))
    assert better["y"] == worse["y"] and better["x"] + better["width"] <= worse["x"]
    assert "advantage +5.00" in find(page, ".about")[0].text
    assert "reward 20.00" in find(page, ".about")[0].text
    assert (
        "What is 2+2?" in find(page, "#prompt")[0].text
        and "<answer>4</answer>" in find(page, "#prompt")[0].text
    )


def test_colours_and_lines_show_weights_and_runs(page, run):
    lines = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()][:4]
    tokens = page.execute_script(
        """
        return [...document.querySelectorAll('.tokens .token')].map(
          token => [token.dataset.row, token.dataset.position, token.className])"""
    )
    names = {0.0: "protected", 1.0: "", 2.0: "amplified"}
    for row, position, classes in tokens:
        line, position = lines[int(row)], int(position)
        expected = {
            "token",
            names[line["weights"][position]],
            "prefix" if position < line["prefix"] else "",
            "suffix" if position >= len(line["ids"]) - line["suffix"] else "",
        } - {""}
        assert set(classes.split()) == expected
    assert len(tokens) == sum(len(line["ids"]) for line in lines)


def test_a_filtered_completion_is_marked(page):
    choose(page, "#group", "prompt 2")
    kept, filtered = find(page, ".completion")
    assert "kept ✓" in kept.text and "filtered" not in kept.get_attribute("class")
    assert "filtered ✗, no gradient" in filtered.text
    assert "filtered" in filtered.get_attribute("class")


def test_pointing_at_a_token_shows_its_entropy_its_weight_and_why_it_is_in_conflict(page):
    from selenium.webdriver import ActionChains

    assert "entropy" not in find(page, "#inspector")[0].text
    ActionChains(page).move_to_element(find(page, '[data-row="1"][data-position="2"]')[0]).perform()
    inspector = find(page, "#inspector")[0].text
    assert (
        "2+2 entropy 0.003 nats · weight 0, protected · position 3 from the start, 9 from the end"
        " · prefix run" in inspector
    )
    assert (
        "2 better completions have the same token at this position from the start, so it is"
        " protected here" in inspector
    )
    assert "the same token in: #1+, #3+, #4−." in inspector


def test_pointing_highlights_the_same_token_at_the_same_position(page):
    from selenium.webdriver import ActionChains

    def marked(name):
        cells = find(page, f"#completions .{name}")
        return {
            (cell.get_attribute("data-row"), cell.get_attribute("data-position")) for cell in cells
        }

    # the last token, aligned at the end
    ActionChains(page).move_to_element(
        find(page, '[data-row="0"][data-position="10"]')[0]
    ).perform()
    assert marked("same-opposite") == {("1", "10"), ("3", "11")}
    assert marked("same-side") == {("2", "10")}
    # =4, which no worse completion has
    ActionChains(page).move_to_element(find(page, '[data-row="0"][data-position="3"]')[0]).perform()
    assert marked("same-opposite") == set()
    assert "no worse completion has this token at this position" in find(page, "#inspector")[0].text


def test_a_token_after_a_run_says_that_the_run_ends_before_it(page):
    from selenium.webdriver import ActionChains

    ActionChains(page).move_to_element(find(page, '[data-row="0"][data-position="5"]')[0]).perform()
    assert "but the run of conflict tokens ends before it" in find(page, "#inspector")[0].text


def test_tab_and_the_arrow_keys_move_between_tokens(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.getElementById('group').focus()")
    press(page, Keys.TAB)  # the summary of the prompt
    press(page, Keys.TAB)
    assert current(page) == (0, 0)
    walked = []
    for key in (
        Keys.ARROW_RIGHT,
        Keys.ARROW_RIGHT,
        Keys.ARROW_DOWN,
        Keys.ARROW_LEFT,
        Keys.END,
        Keys.ARROW_UP,
        Keys.HOME,
        Keys.ARROW_LEFT,
    ):
        press(page, key)
        walked.append(current(page))
    assert walked == [(0, 1), (0, 2), (2, 2), (2, 1), (2, 10), (0, 10), (0, 0), (0, 0)]
    assert "<reasoning> entropy 0.001 nats" in find(page, "#inspector")[0].text
    press(page, Keys.END)
    press(page, Keys.SHIFT, Keys.TAB)
    press(page, Keys.NULL)
    page.execute_script("document.querySelector('#question summary').focus()")
    press(page, Keys.TAB)
    assert current(page) == (0, 10), "Tab returns to the token that was focused last"


def test_every_token_and_control_has_a_name_for_screen_readers(page):
    labels = [cell.get_attribute("aria-label") for cell in find(page, "[role=gridcell]")]
    assert labels[0] == "<reasoning>, weight 2, entropy 0.001 nats" and all(labels)
    assert page.execute_script(
        "return [...document.querySelectorAll('select')].every(s => s.labels.length === 1)"
    )
    assert page.execute_script(
        "return [...document.querySelectorAll('figure')].every(f => f.getAttribute('aria-label'))"
    )
    assert find(page, "[aria-live=polite]")


def test_script_tags_of_a_model_stay_text(page):
    choose(page, "#group", "prompt 2")
    assert EVIL in shown_tokens(page)[0]
    assert find(page, "#prompt")[0].text.count(EVIL) == 3
    assert find(page, "h1")[0].text == EVIL
    assert page.execute_script("return window.hacked") is None
    assert not find(page, "img") and len(find(page, "script")) == 2


def test_invisible_characters_are_shown_as_escapes(chromium, tmp_path):
    characters = ["\u202eabc", "\u200b", "a\x00", "\ttab", "", "a\n\nb\n"]
    run = write_run(tmp_path / "run", group([([*RIGHT[:3], *characters], 20.0), (WRONG, 1.0)]))
    assert report_run.main([str(run)]) == 0
    chromium.get((run / "report.html").as_uri())
    assert shown_tokens(chromium)[0][3:] == [
        "\\u202eabc",
        "\\u200b",
        "a\\u0000",
        "⇥tab",
        "∅",
        "a⏎\n⏎\nb⏎",
    ]


def test_another_step_can_be_chosen(page):
    choose(page, "#step", "2 (")
    assert find(page, "#step option:checked")[0].text.startswith("2 (last")
    assert len(find(page, ".completion")) == 2


def test_the_theme_follows_the_system_and_the_button(page):
    def background():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = background()
    set_scheme(page, dark=True)
    dark = background()
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 29)")
    find(page, "#theme")[0].click()
    assert background() == light
    assert find(page, "#theme")[0].get_attribute("aria-pressed") == "false"


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d");
const style = getComputedStyle(document.documentElement);
const rgb = (name) => {
  canvas.fillStyle = style.getPropertyValue(name).trim();
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
};
const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const share = [.2126, .7152, .0722];
const luminance = (name) => rgb(name).map(linear).reduce((sum, v, i) => sum + v * share[i], 0);
return arguments[0].map((pair) => {
  const [light, dark] = pair.map(luminance).sort((x, y) => y - x);
  return (light + .05) / (dark + .05);
});
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast_in_light_and_dark(page, dark):
    set_scheme(page, dark=dark)
    text = [
        [ink, ground] for ink in ("--ink", "--faint", "--link") for ground in ("--page", "--card")
    ]
    text += [
        ["--ink", "--protected"],
        ["--ink", "--amplified"],
        ["--yes", "--card"],
        ["--no", "--card"],
        ["--careful", "--card"],
    ]
    lines = [[f"--series-{i}", "--card"] for i in range(2)] + [
        ["--protected-line", "--page"],
        ["--amplified-line", "--page"],
    ]
    assert min(page.execute_script(CONTRAST, text)) >= 4.5
    assert min(page.execute_script(CONTRAST, lines)) >= 3


def test_on_a_narrow_screen_worse_completions_are_below_better_ones(run):
    with browser(NARROW) as page:
        page.get((run / "report.html").as_uri())
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        better, worse = (side.rect for side in find(page, ".sides > div"))
        assert better["x"] == worse["x"] and better["y"] + better["height"] <= worse["y"]
    assert NARROW[0] < WIDE[0]


def test_long_words_and_labels_do_not_make_the_page_wider(chromium, tmp_path):
    layers = [f"layer_{i}_with_a_long_name" for i in range(30)]
    runs = [
        write_run(
            tmp_path / name,
            group(GROUPS[0]),
            rising(30),
            recipe={"model": {"target_modules": modules}},
        )
        for name, modules in (("a", layers), ("b", layers[:20]))
    ]
    (runs[0] / "versions.json").write_text(
        json.dumps({"commit": "c" * 80, "platform": "Linux-" + "x" * 80})
    )
    assert (
        report_run.main([*map(str, runs), "--out", str(tmp_path / "both")])
        == report_run.main([str(runs[0])])
        == 0
    )
    chromium.get((tmp_path / "both" / "report.html").as_uri())
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    with browser(NARROW) as narrow:
        narrow.get((runs[0] / "report.html").as_uri())
        assert narrow.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_two_configurations_have_a_legend_and_a_choice_of_run(chromium, tmp_path):
    runs = [
        write_run(tmp_path / name, group(GROUPS[0], weight=weight), rising(3), recipe=recipe)
        for name, weight, recipe in (
            ("a", 2.0, {}),
            ("b", None, {"trainer": {"class_path": "custom_trainer.original.UnslothGRPOTrainer"}}),
        )
    ]
    assert report_run.main([*map(str, runs), "--out", str(tmp_path / "both")]) == 0
    chromium.get((tmp_path / "both" / "report.html").as_uri())
    assert [item.text for item in find(chromium, "#curves .legend li")][:2] == [
        "UnslothGTPOTrainer",
        "UnslothGRPOTrainer",
    ]
    assert not find(chromium, "#would-be")[0].is_displayed()
    choose(chromium, "#run", "UnslothGRPOTrainer")
    assert find(chromium, "#would-be")[0].is_displayed()
    assert len(find(chromium, "#completions .protected")) == 10

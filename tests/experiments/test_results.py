"""The committed results: complete, described, and quoted as the tables say."""

import atexit
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import layout
import pandas as pd
import pytest
import quotes
import studies
from jinja2.exceptions import UndefinedError

from bptt_study.report import csv_tables
from bptt_study.runner import stories
from bptt_study.validation import SettingError

CHECKOUT = Path(__file__).parents[2]


def committed() -> Path:
    """results/ and the pages as committed: `make study` writes new ones, with other seconds, over them."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    git = ["git", "-C", CHECKOUT, "archive", "HEAD", "results", "docs", "README.md", "README.md.j2"]
    try:
        archive = subprocess.run(git, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no checkout: an unpacked source archive
        return CHECKOUT
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        # before Python 3.11.4 there are no filters, since 3.12 it warns of none
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


RESULTS = committed() / "results"
STUDIES = sorted(f.parent.name for f in RESULTS.glob("*/table.csv.gz"))


TEMPLATES = {
    str(file.relative_to(RESULTS.parent)): file for file in quotes.templates(RESULTS.parent)
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_page_is_what_its_template_renders_with_the_numbers_of_now(name):
    page = TEMPLATES[name].with_suffix("").read_text(encoding="utf-8")
    assert page == quotes.render(TEMPLATES[name], RESULTS), "`make quotes` renders it"


def test_every_study_has_a_template_that_quotes():
    quoting = {n for n, file in TEMPLATES.items() if "table(" in file.read_text(encoding="utf-8")}
    assert quoting >= {"README.md.j2", "results/README.md.j2"}
    assert quoting >= {f"results/{name}/README.md.j2" for name in STUDIES}
    assert "<!--table" not in (RESULTS.parent / "README.md").read_text(encoding="utf-8")


TELLS_ALL = ("compare_strategies", "gradient_norms")  # a panel for each setting that varies
TELLS = {("online_descents", "learning_rate")}  # a row for each


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("setting", ["learning_rate", "seeds"])
def test_a_study_shows_its_own_runs_and_refuses_those_of_one_more_setting(name, setting):
    """They would be drawn over each other, under the caption of one of them."""
    rows, check = csv_tables.read_rows(RESULTS / name), stories.shipped(name).check
    check(rows)
    more = rows.assign(run=rows["run"] + "x", **{setting: 2 * rows[setting]})
    if name in TELLS_ALL or (name, setting) in TELLS:
        check(pd.concat([rows, more]))
    else:
        with pytest.raises(SettingError, match=f"`{setting}` must be the same in all runs of one"):
            check(pd.concat([rows, more]))


def test_a_page_names_the_partner_that_the_study_found(tmp_path):
    """Which variance is nearest depends on the processor: training multiplies last bits."""
    shutil.copytree(RESULTS / "book_verdict", tmp_path / "book_verdict")
    file = tmp_path / "book_verdict" / "comparisons.csv"
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (at,) = (
        i
        for i, row in enumerate(rows)
        if row.startswith("bias alone,char_lm,all,validation_loss,randomized_uncompensated 4,")
    )
    fields = rows[at].split(",")
    fields[5] = "randomized 16"
    file.write_text("".join([*rows[:at], ",".join(fields), *rows[at + 1 :]]), encoding="utf-8")
    page = quotes.render(TEMPLATES["results/book_verdict/README.md.j2"], tmp_path)
    assert "nearest, randomized 16." in " ".join(page.split())


@pytest.fixture
def checkout(tmp_path):
    """A study s with a table t."""
    (tmp_path / "results" / "s").mkdir(parents=True)
    table = "a,b,x,x_low,x_high\n1,,0.126,0,1234.5\n2,u,5,4,6\n2,v,7,6,8\n"
    (tmp_path / "results" / "s" / "t.csv").write_text(table)
    return tmp_path


def test_paragraphs_are_filled_and_the_rest_stays(checkout):
    word = "word " * 30
    kept = ["# " + word, "```python\na = 1\n\nb = 2\n```", f"| {word}|\n|---|", "    make\n    it"]
    (checkout / "README.md.j2").write_text(
        "\n\n".join([*kept, f"{word}\n{word}", f"- {word}\n- b\n  c"])
    )
    quotes.main(checkout)
    text = (checkout / "README.md").read_text()
    assert all(block.strip() in text for block in kept)
    *paragraph, item, rest, last = text.splitlines()[-6:]
    assert max(map(len, paragraph)) <= quotes.WIDTH
    assert item.startswith("- word") and rest.startswith("  word") and last == "- b c"


def test_a_template_counts_loops_and_takes_medians(checkout):
    (checkout / "README.md.j2").write_text(
        '{% set t = table("s/t", a=2) %}{% for row in t %}{{ row.b }}{{ row.x | digits(0) }} {% endfor %}'
        '{{ t.over_seeds("x").x | power }} {{ 2.4e-12 | power }}'
    )
    quotes.main(checkout)
    assert (checkout / "README.md").read_text().splitlines()[-1] == "u5 v7 6·10⁰ 2·10⁻¹²"


def test_a_template_looks_numbers_up(checkout):
    (checkout / "README.md.j2").write_text(
        '{% set t = table("s/t", a=2) %}\n'
        '{{ t(b="v").x | digits(1) }} of {{ t | length }}; {{ table("s/t", b=None).interval("x", 2) }}\n'
    )
    assert quotes.main(checkout) == [checkout / "README.md"]
    text = (checkout / "README.md").read_text()
    assert text.splitlines()[-1] == "7.0 of 2; 0.13 [0.00, 1,234.50]"
    assert quotes.main(checkout) == [], "nothing has changed"
    table = checkout / "results" / "s" / "t.csv"
    table.write_text(table.read_text().replace("0.126", "0.25"))
    assert quotes.main(checkout) == [checkout / "README.md"]
    assert "0.25 [0.00" in (checkout / "README.md").read_text()


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ('table("s/t", a=2).x', "s/t a=2 selects 2 rows"),
        ('table("s/t", a=1)(b="u").x', "s/t a=1 b=u selects 0 rows"),
        ('table("s/t", a=1).y', "no attribute 'y'"),
        ('table("s/u").x', "not enough values"),
    ],
)
def test_a_number_that_is_not_there_is_an_error(checkout, expression, error):
    (checkout / "README.md.j2").write_text(f"{{{{ {expression} }}}}")
    with pytest.raises((ValueError, UndefinedError), match=error):
        quotes.main(checkout)
    assert not (checkout / "README.md").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_every_file_is_described_and_every_described_file_is_there(name):
    readme = (RESULTS / name / "README.md").read_text(encoding="utf-8")
    assert f"experiment={name}" in readme
    for file in (RESULTS / name).iterdir():
        stem = file.stem.removesuffix(".csv")
        assert f"`{stem}." in readme or file.name.startswith("README.md"), file.name
    for file in re.findall(r"`(\w[\w.]*\.(?:csv|gz|png|json))`", readme):
        assert (RESULTS / name / file).is_file(), file


def test_every_study_is_in_the_index():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    described = sorted(f.parent.name for f in RESULTS.glob("*/README.md"))
    assert sorted(re.findall(r"\]\((\w+)/README\.md\)", index)) == described
    assert set(STUDIES) <= set(described)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_figures_can_be_drawn_from_the_committed_tables(name, tmp_path, kept):
    for table in (RESULTS / name).glob("*.csv*"):
        shutil.copy(table, tmp_path)
    drawn = {file.name for file in studies.draw(name, tmp_path)}
    assert drawn == {f.name for f in (RESULTS / name).glob("*.png")}
    covered = [layout.covered(figure) for figure in kept.values()]
    if name != "bias_variance":  # whose numbers stand on the lines that they belong to
        assert covered == [[]] * len(kept)


def test_a_tuning_names_the_runs_that_got_its_choices():
    folder = RESULTS / "book_verdict"
    tuning, rows = (csv_tables.read_table(folder / f) for f in ("tuning.csv", "table.csv.gz"))
    got = rows.drop_duplicates("run").set_index("run")["learning_rate"]
    chosen = tuning[tuning["chosen"]].set_index("candidate_for")["learning_rate"]
    assert set(tuning["candidate_for"]) == set(chosen.index) <= set(got.index)
    pd.testing.assert_series_equal(chosen, got[chosen.index], check_names=False)


def test_the_headline_is_what_it_must_be():
    """Full, fixed and randomized on text and digits, 5 seeds and more, learned and finished."""
    table = csv_tables.read_table(RESULTS / "compare_strategies" / "summary.csv")
    for task in ("char_lm", "digits"):
        part = table[table["task"] == task]
        assert {"full", "fixed", "randomized"} <= set(part["strategy"])
        assert (part["n"] >= 5).all()
        assert part["learned"].all()
    text = table[table["task"] == "char_lm"]
    assert (text["validation_loss_high"] < text["bigram_loss"]).any()
    digits = table[(table["task"] == "digits") & (table["strategy"] == "full")]
    assert (digits["accuracy_low"] > 0.8).all()


def test_the_results_stay_small_and_every_seed_is_compressed():
    """Under 8 MB; git shows a reviewer no table per seed, and no picture twice."""
    folders = [
        RESULTS,
        *(RESULTS / name for name in (*STUDIES, "bench")),
    ]  # not those that git ignores
    sizes = {f: f.stat().st_size for folder in folders for f in folder.iterdir() if f.is_file()}
    assert sum(sizes.values()) < 8e6
    assert {file.suffix for file in sizes} <= {
        ".csv",
        ".gz",
        ".png",
        ".json",
        ".md",
        ".j2",
        ".yaml",
    }
    for name in STUDIES:
        assert (RESULTS / name / "provenance.json").is_file()
        for file in (RESULTS / name).glob("*.csv"):
            assert not {"run", "seed", "update"} <= set(csv_tables.read_table(file)), file


def test_git_ignores_a_study_of_ones_own_and_none_of_ours():
    git = ["git", "-C", CHECKOUT, "check-ignore", "--no-index"]
    folders = [f"results/{name}/table.csv.gz" for name in (*STUDIES, "mine")]
    done = subprocess.run([*git, *folders], capture_output=True, text=True, check=False)
    if done.returncode == 128:
        pytest.skip("no checkout")
    assert done.stdout.split() == ["results/mine/table.csv.gz"]


def test_the_rank_correlation_without_adaptive_truncation_is_the_one_on_the_page():
    """By pandas, from the committed table; the control: with it, the correlation of the study."""
    folder = RESULTS / "alignment"
    page = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    table = csv_tables.read_table(folder / "learning.csv").query("strategy != 'full'")
    found = csv_tables.read_table(folder / "correlation.csv").set_index("task")
    said = {}
    for task, part in table.groupby("task"):
        ranks = part.set_index("strategy")[["cosine", "validation_loss"]]
        assert ranks.rank().corr().iloc[0, 1] == pytest.approx(found.loc[task, "rho"], rel=1e-6)
        assert len(part) == found.loc[task, "estimators"] == 20
        said[task] = f"{ranks.drop('adaptive').rank().corr().iloc[0, 1]:.2f}"
    assert f"Over the other 19, ρ is {said['add']} on add and {said['copy']} on copy." in page


def test_the_statement_on_less_arithmetic_than_full():
    table = csv_tables.read_table(RESULTS / "estimator_errors" / "estimators.csv")
    table = table[table["over"] == "draws"]
    for _, part in table.groupby(["task", "moment"]):
        assert set(part[part["relative_arithmetic"] < 1]["estimator"]) == {"pp_prop"}
    last = table[(table["task"] == "copy") & (table["moment"] == "end")].set_index("estimator")
    assert last.loc["pp_prop", "relative_bias2_low"] > 0.95, "as if its estimate were 0"


def test_the_statement_on_the_least_error_with_fewer_numbers_than_full():
    table = csv_tables.read_table(RESULTS / "estimator_errors" / "frontiers.csv")
    few = table[(table["cost"] == "numbers") & (table["relative_cost"] < 1)]
    assert set(few["estimator"]) == {"fixed", "sliding"}, "windows"
    assert few.groupby(["task", "moment"]).ngroups == 6


def test_the_statements_on_kept_perturbations_hold_at_every_number_of_unrolls():
    table = csv_tables.read_table(RESULTS / "perturbation_noise" / "noise.csv")
    table = table[table["estimator"] == "pes"]
    assert (table.loc[table["unrolls"] == 1, "ratio"] == 1).all()
    of = {key: part.set_index("unrolls") for key, part in
          table[table["unrolls"] > 1].groupby(["corpus", "moment"])}  # fmt: skip
    for moment in ("start", "end"):
        assert (of["random_letters", moment]["ratio_low"] > 1).all()
        assert of["random_letters", moment].loc[200, "ratio"] > 40, "by far"
        assert (of["one_letter", moment]["ratio_high"] < 1).all()
    assert of["one_letter", "start"].loc[20:, "ratio"].between(0.5, 0.53).all(), "about half"
    trained = of["stdlib_docs", "end"]
    assert (trained["ratio"] > 1).all()
    assert (trained.index[trained["ratio_low"] < 1] == [2]).all()
    start = of["stdlib_docs", "start"]
    assert (start.loc[:10, "ratio_high"] < 1).all() and (start.loc[40:, "ratio_low"] > 1).all()

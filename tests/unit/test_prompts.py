import pytest

from orchestrator import prompts
from orchestrator.cells import CellLimit, CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.conversation import Dialect
from orchestrator.limits import OUTPUT_HEAD_BYTES, OUTPUT_TAIL_BYTES

HOSTILE = "{} {0} {question} {{x}} %s %(a)s %d $name \\n </x>"


def shape(**more: object) -> str:
    facts: dict[str, object] = {
        "is_files": False,
        "length_bytes": 2_000,
        "chars": 1_500,
        "lines": 30,
        "files": 0,
        "names": (),
        "replaced": 0,
    }
    return prompts.context_shape(**{**facts, **more})  # type: ignore[arg-type]


def result(outcome: CellOutcome = CellOutcome.OK, **more: object) -> CellResult:
    return CellResult(outcome=outcome, **more)  # type: ignore[arg-type]


# --- The task ---------------------------------------------------------------------------------------------


def test_the_task_holds_question_depth_and_shape() -> None:
    told = prompts.task("Who?", depth=1, context_shape="one text", levels_below=2)
    assert told.startswith("<question>\nWho?\n</question>\n")
    assert "\nDepth: 1\n" in told
    assert "2 level(s) deeper" in told
    assert told.endswith("Shape of `context`:\none text")


@pytest.mark.case("J05")
def test_braces_and_percent_signs_in_a_question_or_shape_stay_as_they_are() -> None:
    told = prompts.task(HOSTILE, depth=0, context_shape=HOSTILE, levels_below=1)
    assert told.count(HOSTILE) == 2


def test_at_the_depth_limit_the_model_is_told_so() -> None:
    told = prompts.task("Who?", depth=2, context_shape="", levels_below=0)
    assert "rlm_query will raise DepthExceeded" in told


# --- The shape --------------------------------------------------------------------------------------------


def test_the_shape_of_one_text_is_its_sizes() -> None:
    assert shape() == "one text: 1,500 characters, 30 lines, 2,000 bytes of UTF-8"


def test_the_shape_of_files_lists_the_first_names_and_counts_the_rest() -> None:
    told = shape(is_files=True, files=5, names=[("a.py", 1_000), ("b.py", 20)])
    assert told.splitlines() == [
        "a mapping of 5 files: 1,500 characters, 30 lines, 2,000 bytes of UTF-8 in all",
        "- a.py (1,000 bytes)",
        "- b.py (20 bytes)",
        "- ... and 3 more",
    ]


def test_no_rest_is_counted_when_all_files_are_named() -> None:
    assert "more" not in shape(is_files=True, files=1, names=[("a.py", 1)])


@pytest.mark.case("J05")
def test_braces_and_percent_signs_in_file_names_stay_as_they_are() -> None:
    assert f"- {HOSTILE} (7 bytes)" in shape(is_files=True, files=1, names=[(HOSTILE, 7)])


def test_replaced_bytes_are_named() -> None:
    assert shape(replaced=1_234).endswith("1,234 sequences that were not UTF-8 stand as U+FFFD.")


# --- The report -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["", "\n", "\n\n"])
def test_a_cell_that_showed_nothing_is_reported_as_such(output: str) -> None:
    assert prompts.cell_report(result(output_head=output)) == "[no output]"


def test_output_and_traceback_follow_each_other() -> None:
    told = prompts.cell_report(result(CellOutcome.ERROR, output_head="1\n", traceback="ValueError: x\n"))
    assert told == "1\nValueError: x"


@pytest.mark.case("J05")
def test_braces_and_percent_signs_in_output_and_names_stay_as_they_are() -> None:
    told = prompts.cell_report(
        result(CellOutcome.KILLED, output_head=HOSTILE, traceback=HOSTILE, lost_variables=(HOSTILE,))
    )
    assert told.count(HOSTILE) == 3


def test_every_outcome_but_the_ordinary_ones_has_a_sentence_of_its_own() -> None:
    told = {
        outcome: prompts.cell_report(result(outcome, output_head="x", status=9)) for outcome in CellOutcome
    }
    assert told.pop(CellOutcome.OK) == told.pop(CellOutcome.ERROR) == "x"
    sentences = {report.removeprefix("x\n") for report in told.values()}
    assert len(sentences) == len(told)
    assert all(sentence.startswith("[") and sentence.endswith("]") for sentence in sentences)


@pytest.mark.parametrize("outcome", CellOutcome)
def test_a_lost_namespace_is_always_told_and_a_kept_one_never_called_lost(outcome: CellOutcome) -> None:
    told = prompts.cell_report(result(outcome, output_head="x"))
    assert ("LOST" in told) is not outcome.namespace_kept


def test_the_names_that_are_gone_are_listed() -> None:
    told = prompts.cell_report(result(CellOutcome.OUT_OF_MEMORY, lost_variables=("rows", "users")))
    assert "these names are gone: rows, users." in told


@pytest.mark.parametrize(
    ("outcome", "words"), [(CellOutcome.EXITED, "exit code 3"), (CellOutcome.SIGNALLED, "signal 3")]
)
def test_an_exit_code_and_a_signal_are_told_apart(outcome: CellOutcome, words: str) -> None:
    assert words in prompts.cell_report(result(outcome, status=3))


@pytest.mark.parametrize("resource", Resource)
def test_a_limit_that_was_run_into_is_named_with_its_size_where_it_is_known(resource: Resource) -> None:
    told = prompts.cell_report(result(output_head="x", used_up=(UsedUp(resource, 64 << 20),)))
    said = told.removeprefix("x\n")
    assert said.startswith("[")
    assert "64 MiB." in said or "67,108,864 at most." in said
    assert prompts.used_up(UsedUp(resource, 0)).endswith(".")
    assert "0" not in prompts.used_up(UsedUp(resource, 0))


def test_every_limit_of_the_clock_and_every_loss_is_told_apart() -> None:
    passed = {prompts.cell_report(result(CellOutcome.INTERRUPTED, passed=limit)) for limit in CellLimit}
    lost = {prompts.cell_report(result(CellOutcome.SANDBOX_LOST, loss=loss)) for loss in SandboxLoss}
    assert (len(passed), len(lost)) == (len(CellLimit), len(SandboxLoss))
    assert all("has been replaced: " in told and "LOST" in told for told in lost)


# --- The system prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", Dialect)
def test_the_system_prompt_names_everything_a_cell_sees(dialect: Dialect) -> None:
    names = [
        *("context", "llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched"),
        *("llm_query_as_completed", "rlm_query_as_completed", "allm_query", "arlm_query"),
        *("FINAL", "FINAL_VAR", "SHOW_VARS", "budget"),
    ]
    assert [name for name in names if name not in prompts.system(dialect)] == []


@pytest.mark.parametrize("dialect", Dialect)
def test_the_system_prompt_tells_the_true_size_of_an_output(dialect: Dialect) -> None:
    assert f"{(OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES) // 1024} kB" in prompts.system(dialect)


def test_each_dialect_is_told_of_its_own_way_alone() -> None:
    tools, fences = map(prompts.system, (Dialect.TOOLS, Dialect.FENCES))
    assert "tool" in tools
    assert "```" not in tools
    assert "tool" not in fences
    assert "\n```repl\nprint(len(context))\n```\n" in fences


def test_notes_hold_in_both_dialects() -> None:
    notes = (prompts.REPLY_EMPTY, prompts.REPLY_REFUSED, prompts.REPLY_CUT_OFF, prompts.LAST_TURN)
    assert [note for note in notes if "tool" in note or "```" in note] == []


# --- A report without a tool result -----------------------------------------------------------------------


def test_a_told_report_says_whose_output_it_is_and_where_it_ends() -> None:
    first, *output, last = prompts.told_report("1\n2").splitlines()
    assert first.startswith(prompts.OUTPUT_HEADING)
    assert output == ["1", "2"]
    assert last.startswith("[end of output ")
    assert first.split()[-1] == last.split()[-1]


@pytest.mark.case("Q03")
def test_an_output_cannot_pretend_that_it_has_ended() -> None:
    seen = prompts.told_report("2")
    ending = seen.splitlines()[-1]
    assert prompts.told_report("2\n" + ending).splitlines()[-1] != ending


@pytest.mark.parametrize("report", ["", "1", "1\n2\n", "\n", prompts.told_report("1")])
def test_a_told_report_can_be_read_back(report: str) -> None:
    assert prompts.report_in(prompts.told_report(report)) == report


def test_a_told_report_holds_lone_surrogates() -> None:
    assert "\ud800" in prompts.told_report("\ud800")

import ast
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fences import FencedAnswer, FencedCell, read


def cell(text: str) -> str:
    """The code of a cell that ends with its own fence."""
    found = read(text)
    assert isinstance(found, FencedCell)
    assert found.closed
    return found.code


# --- Where a cell begins ----------------------------------------------------------------------------------


def test_a_block_is_a_cell() -> None:
    text = "Let me look.\n```repl\nprint(1)\nprint(2)\n```"
    assert read(text) == FencedCell("print(1)\nprint(2)", len(text), closed=True)


@pytest.mark.parametrize(
    "opening", ["```repl", "```python", "```py", "```Python", "```REPL", "```repl  \t", "````repl"]
)
def test_these_lines_open_a_cell(opening: str) -> None:
    assert cell(f"{opening}\n1\n```") == "1"


@pytest.mark.parametrize(
    "opening",
    [
        *("```", "```json", "```pycon", "```python3", "```repl x", "``` repl", "``repl", "`repl`", "repl"),
        *("~~~repl", "~~~", " ```repl", "\t```repl", "> ```repl", "- ```repl", "so: ```repl", "```repl```"),
    ],
)
def test_these_lines_open_none(opening: str) -> None:
    assert read(f"{opening}\n1\n```") is None


def test_the_first_block_is_the_cell_even_behind_blocks_of_other_languages() -> None:
    assert cell("```json\n{}\n```\n~~~\n~~~\n```py\n1\n```\n```repl\n2\n```") == "1"


def test_a_cell_may_be_empty() -> None:
    assert cell("```repl\n```") == ""
    assert cell("```repl\n\n```") == ""


def test_windows_line_ends_are_line_ends() -> None:
    assert (
        cell("Look.\r\n```repl\r\nx = '''\r\n```\r\n'''\r\nx\r\n```\r\nmore") == "x = '''\r\n```\r\n'''\r\nx"
    )


# --- Where it ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behind",
    [
        "",
        "\n",
        "\nOutput:\n42\n",
        "\n```repl\nprint(2)\n```",
        "\nFINAL(42)",
        "output\n42\n```",
        "\n[output of your cell 0]\n42",
    ],
)
def test_what_follows_the_cell_does_not_count(behind: str) -> None:
    text = "```repl\nprint(1)\n```"
    assert read(text + behind) == FencedCell("print(1)", len(text), closed=True)


FENCES_THAT_END_NOTHING = [
    "x = '''\n```\n'''",
    'x = """\n```repl\nprint(1)\n```\n"""',
    'x = f"""\n```{y}\n{"a"}\n"""',
    "x = r'\\''; y = '''\n```\n'''",
    "x = '''it\\'''s\n```\n'''",
    "x = 'a\\\n```\\\nb'",
    "x = 'a\\\\'; y = '''\n```'''",
    "# it's \"\"\" fine\nx = '''\n```'''",
    "x = \"it's\"  # isn't it '''\ny = '''\n```'''",
    "x = '# no comment'; y = '''\n```'''",
    "x = ''; y = ''''\n```'''",
    "x = '''a''' '''\n```\n'''",
    'x = "\'\'\'"; y = """\n```"""',
    "print('```')\n  # ```\nx = 1  # ```",
    "x = b'''\n```'''\nX = Rb\"\"\"\n```\"\"\"",
]


@pytest.mark.parametrize("code", FENCES_THAT_END_NOTHING)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_fence_inside_a_string_does_not_end_the_cell(code: str, line_end: str) -> None:
    ast.parse(code)
    code = code.replace("\n", line_end)
    text = line_end.join(["Here.", "```repl", code, "```"])
    assert read(text + line_end + "'''more") == FencedCell(code, len(text), closed=True)


@pytest.mark.parametrize("code", ["x = 'it", 'x = "it', "it's", "(", "'' '", "\\'", "'a\rb"])
def test_a_slip_of_the_pen_does_not_hide_the_fence(code: str) -> None:
    assert cell(f"```repl\n{code}\n```\nmore") == code


def test_an_indented_fence_does_not_end_the_cell() -> None:
    assert cell("```repl\nif 1:\n    ```\n```") == "if 1:\n    ```"


def test_a_cell_without_a_closing_fence_goes_on_to_the_end() -> None:
    assert read("Look.\n```repl\nprint(1)\n") == FencedCell("print(1)\n", 23, closed=False)


def test_a_string_that_never_ends_hides_no_fence_for_good() -> None:
    text = "```repl\nx = '''\n```"
    assert read(text + "\nOutput: 42\n```") == FencedCell("x = '''", len(text), closed=False)


@pytest.mark.parametrize("text", ["```repl", "```repl\n", "Look.\n```python\n \n\t"])
def test_an_opening_fence_alone_is_no_cell(text: str) -> None:
    assert read(text) is None


# --- Answers in prose -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("FINAL(42)", "42"),
        ("I know it.\n  FINAL( 42 )\nGood bye.", "42"),
        ("FINAL(f(x) and (g(y)))", "f(x) and (g(y))"),
        ("FINAL(two\nlines)", "two\nlines"),
        ("FINAL(it's 5 o'clock)", "it's 5 o'clock"),
        ('FINAL("42")', "42"),
        ("FINAL('a) b')", "a) b"),
        ('FINAL("""a\n"b")\n""" )', 'a\n"b")'),
        (r'FINAL("a\n\"b\" \d")', 'a\n"b" \\d'),
        (r"FINAL('\x4')", r"'\x4'"),
        ("FINAL('tis so)", "'tis so"),
        ('FINAL("a" and "b")', '"a" and "b"'),
        ("FINAL(été 😀 (ü))", "été 😀 (ü)"),
        ("FINAL(1)\nFINAL(2)", "1"),
        ("```json\n{}\n```\nFINAL(42)", "42"),
        ("```\n~~~\nFINAL(1)\n```\nFINAL(42)", "42"),
    ],
)
def test_final_at_the_beginning_of_a_line_is_the_answer(text: str, answer: str) -> None:
    found = read(text)
    assert isinstance(found, FencedAnswer)
    assert (found.text, found.closed) == (answer, True)
    assert text[: found.end].rstrip(" \n").endswith(")")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("FINAL_VAR(rows)", "FINAL_VAR('rows')"),
        ("Done.\nFINAL_VAR( 'rows' )\n\nOutput: 42", "FINAL_VAR('rows')"),
        ("FINAL_VAR(`rows`)", "FINAL_VAR('rows')"),
        ('FINAL_VAR(d["x"])', "FINAL_VAR('d[\"x\"]')"),
        ("FINAL_VAR('); import os; ('])", 'FINAL_VAR("\'")'),
    ],
)
def test_final_var_becomes_a_cell_that_fetches_the_variable(text: str, code: str) -> None:
    found = read(text)
    assert isinstance(found, FencedCell)
    assert (found.code, found.closed) == (code, True)


@given(st.text())
def test_whatever_stands_in_final_var_is_only_ever_a_name(name: str) -> None:
    found = read(f"FINAL_VAR({name}")
    if found is not None:
        assert isinstance(found, FencedCell)
        (statement,) = ast.parse(found.code).body
        assert isinstance(statement, ast.Expr)
        assert isinstance(statement.value, ast.Call)
        assert [type(argument) for argument in statement.value.args] == [ast.Constant]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "42",
            "The answer is FINAL(42)",
            "final(42)",
            "FINAL (42)",
            "FINAL",
            "FINALLY(42)",
            "- FINAL(42)",
        ),
        *("FINAL()", "FINAL( \n)", "FINAL('')", "FINAL_VAR()", "FINAL(", "FINAL_VAR(\n"),
        *("```\nFINAL(42)\n```", "~~~\nFINAL(42)\n```\nFINAL(43)\n~~~", "```json\nFINAL(42)"),
    ],
)
def test_everything_else_is_prose(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize("plan", ["FINAL(42)\n", "FINAL_VAR(x)\n"])
def test_a_reply_with_a_cell_gives_no_answer_beside_it(plan: str) -> None:
    assert cell(plan + "```repl\nprint(1)\n```\n" + plan) == "print(1)"


def test_an_answer_without_its_parenthesis_goes_on_to_the_end() -> None:
    assert read("FINAL(see (b) and") == FencedAnswer("see (b) and", 17, closed=False)


# --- Any text ---------------------------------------------------------------------------------------------


@st.composite
def statements(draw: st.DrawFn) -> str:
    quote = draw(st.sampled_from(["'", '"', "'''", '"""']))
    prefix = draw(st.sampled_from(["", "f", "r", "b"]))
    one_line = ["```", "```repl", "#", "x", " ", "'", '"', "\\\\", "\\\n", "\\\n```", "é"]
    pieces = [*one_line, "\n```", "\n```repl\n"] if len(quote) == 3 else one_line
    text = "".join(draw(st.lists(st.sampled_from(pieces), max_size=8))).replace(quote[0], "\\" + quote[0])
    if prefix == "b":
        text = text.replace("é", "e")
    comment = draw(st.sampled_from(["", "  # it's", '  # """', "  # ```"]))
    return f"x = {prefix}{quote}{text}{quote}{comment}"


@given(st.lists(statements(), max_size=5).map("\n".join), st.text(alphabet="'\"`#\\\n x"))
def test_any_python_with_strings_and_comments_is_read_whole(code: str, behind: str) -> None:
    ast.parse(code)
    text = f"```repl\n{code}\n```"
    assert read(f"{text}\n{behind}") == FencedCell(code, len(text), closed=True)


anything = st.lists(
    st.sampled_from(
        [
            *(
                "```",
                "```repl\n",
                "\n```\n",
                "```json\n",
                "~~~",
                "\n",
                "\r\n",
                "'",
                '"',
                "'''",
                '"""',
                "\\",
                "#",
            ),
            *("FINAL(", "\nFINAL(", "\nFINAL_VAR(", "(", ")", "x", " ", "\ud800", "\0"),
        ]
    ),
    max_size=30,
).map("".join)


@given(anything)
def test_what_was_cut_off_made_no_difference(text: str) -> None:
    found = read(text)
    if found is not None:
        assert 0 < found.end <= len(text)
        assert read(text[: found.end]) == found


# --- J04: a megabyte of anything --------------------------------------------------------------------------

_MB = 1_000_000
ATTACKS = {
    "backticks": "`" * _MB,
    "lines of backticks": "```\n" * (_MB // 4),
    "blocks in other blocks": "```json\n~~~\n" * (_MB // 12),
    "openings": "```repl x\n" * (_MB // 10),
    "openings with spaces": "```repl" + " " * _MB + "x",
    "a cell that never ends": "```repl\n" + "x = 'y'  # z\n" * (_MB // 13),
    "a string that never ends": "```repl\n'''" + "\n```x'" * (_MB // 6),
    "quotes": "```repl\n" + "'" * _MB,
    "odd quotes": "```repl\n" + "''' '" * (_MB // 5),
    "backslashes": "```repl\n'" + "\\" * _MB,
    "comments": "```repl\n" + "#\n" * (_MB // 2),
    "empty lines": "```repl\n" + "\r\n" * (_MB // 2),
    "FINAL( in one line": "FINAL(" * 100_000,
    "FINAL( on many": "FINAL(\n" * 100_000,
    "FINAL_VAR(": "FINAL_VAR(" * 100_000,
    "parentheses": "FINAL(" + "(" * (_MB // 2) + ")" * (_MB // 2),
    "pairs of parentheses": "FINAL(" + "()" * (_MB // 2),
    "a string in FINAL": "FINAL('''" + "''x" * (_MB // 3),
    "escapes in FINAL": "FINAL('" + "\\x41" * (_MB // 4) + "')",
    "spaces in FINAL": "FINAL('a'" + " " * _MB + "x",
    "indentation": ("\t" * 1_000 + "x\n") * (_MB // 1_002),
}


@pytest.mark.case("J04")
@pytest.mark.parametrize("attack", ATTACKS)
def test_j04_a_megabyte_is_read_in_linear_time(attack: str) -> None:
    started_s = time.process_time()
    read(ATTACKS[attack])
    # Measured: under 0.1 s each. Anything quadratic takes minutes.
    assert time.process_time() - started_s < 0.5

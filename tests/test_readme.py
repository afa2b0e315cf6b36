"""Runs the Python snippets of the README, in order, in one namespace per section, and those of each page in docs/."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets() -> list[tuple[str, str]]:
    sections = re.split(r"^## ", README, flags=re.MULTILINE)
    found = []
    for section in sections:
        code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        if code:
            found.append((section.splitlines()[0].strip("# "), "\n".join(code)))
    return found


def test_there_are_snippets() -> None:
    assert len(snippets()) >= 2
    assert [page.name for page in PAGES if not page_code(page)] == []


PAGES = sorted((ROOT / "docs").glob("*.md"))


def page_code(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(page_code(page), page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("title", "code"), snippets(), ids=[title for title, _ in snippets()])
def test_snippet_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, {title}", "exec"), {"__name__": "__main__"})


def test_the_commands_of_the_first_screen_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", README, flags=re.MULTILINE))
    assert {"run", "test"} <= named
    assert named <= targets

"""What is committed names no package registry and no path of one machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = re.compile(
    r"pypi[.]org|pythonhosted[.]org|registry[.](npmjs|yarnpkg)|crates[.]io|deb[.]debian[.]org"
    r"|anaconda[.]org|download[.]pytorch[.]org"
    r"|(?<![\w.~])/(root|work)/"
)


def tracked() -> list[Path]:
    """The files git has or would add; without git (an unpacked archive), all not hidden."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [
        path
        for path in ROOT.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
    ]


def offences(text: str) -> list[str]:
    return [line for line in text.splitlines() if ELSEWHERE.search(line)]


@pytest.mark.parametrize(
    "text",
    [
        "--index-url https://" + "pypi" + ".org/simple",
        "https://files." + "pythonhosted" + ".org/packages/a.whl",
        "cd /" + "root/.cache",
        'path = "/' + 'work/x"',
    ],
)
def test_an_address_or_a_machine_path_is_found(text: str) -> None:
    assert offences(f"fine\n{text}\n") == [text]


def test_ordinary_text_is_left_alone() -> None:
    assert not offences("s3://bucket/" + "work/run and ~/" + "work/x, pypiorg, the root/ folder")


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    found = []
    for path in tracked():
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data:
                text = data.decode("utf-8", errors="replace")
                found += [f"{path.relative_to(ROOT)}: {line[:120]}" for line in offences(text)]
    assert not found, "\n".join(found)

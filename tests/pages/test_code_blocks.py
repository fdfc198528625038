"""Every code block of README, CONTRIBUTING and docs runs when it is copied into a fresh process.

Commands that would train for minutes are run to their end on less: of `contextlab run` the recipe is resolved, others
get fewer prompts. The runs and checkpoints that the pages speak of are made beforehand, as small as can be, under the
same names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages.blocks import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LESS = {
    "run": ["--check"],
    "sweep": ["--check"],
    "check": ["--examples", "2"],
    "claims run": ["--check"],
    "evaluate": ["--set", "evaluate.prompts=4", "--jobs", "1"],
    "advise": ["--prompts", "2", "--task", "text", "--at", "64"],
    "compress": ["--prompts", "2", "--decoded", "4"],
    "shrink": ["--prompts", "2"],
    "learners": ["--prompts", "4"],
    "similarity": ["--prompts", "8"],
    "cost": ["--lengths", "64"],
    "generate": ["--tokens", "4"],
}
SMALL = {
    "demo": [
        "models={transformer: {preset: transformer, options: {position: none}}}",
        "tasks.regression.train.steps=2",
        "tasks.recall.train.steps=2",
        "evaluate.prompts=8",
    ],
    "byte-lm-quick": [
        "models.transformer.spec.depth=2",
        "tasks.text.options.length=32",
        "train.steps=3",
        "train.batch=2",
        "evaluate.prompts=4",
    ],
}
# Of the demo's run, which does for them.
COPIES = {"runs/three-seeds", "runs/two-mixers", "runs/demo-1", "runs/mad-800", "runs/mad-1600"}
RUNS = {"runs/demo": "demo", "runs/byte-lm": "byte-lm-quick"}
LLAMA = """
import transformers
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
transformers.LlamaForCausalLM(config).save_pretrained({folder!r})
"""


class Stage:
    """A folder in which blocks run, with what they stand on, and the process that their processes are forks of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worked: set[tuple[str, ...]] = set()
        self.imported: set[str] = set()  # commands that have shown that they import what they need
        (folder / "examples").symlink_to(ROOT / "examples")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fresh.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, **request) -> dict:
        self.process.stdin.write(json.dumps({"cwd": str(self.folder), "seconds": 120, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def works(self, **request) -> None:
        answer = self.run(**request)
        assert answer["status"] == 0, f"{request}\n{answer['output'][-3000:]}"

    def provide(self, names: set[str]) -> None:
        """Make the runs and checkpoints that a block names, where they are not there yet."""
        for name in names | {"/".join(name.split("/")[:2]) for name in names if name.startswith("runs/")}:
            path = self.folder / name
            if path.exists():
                continue
            if name.startswith("path/"):
                pytest.importorskip("transformers", minversion="5")
                self.works(code=LLAMA.format(folder=str(path)))
            elif name in COPIES:
                self.provide({"runs/demo"})
                shutil.copytree(self.folder / "runs" / "demo", path)
            elif name in RUNS:
                changes = [word for change in SMALL[RUNS[name]] for word in ("--set", change)]
                self.works(argv=["contextlab", "run", RUNS[name], "--jobs", "1", "--out", name, *changes])


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("pages"))
    yield made
    made.process.stdin.close()
    made.process.wait()
    made.process.stdout.close()


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w./-])(?:runs|path)/[\w./-]*\w", text))


def alike(words: list[str], less: list[str]) -> tuple[str, ...]:
    """A command but for where it writes, what is given in less, and which copy of a run it reads."""
    other = {"--out", *less} - {"--set"}
    told = [word for word, before in zip(words, ["", *words], strict=False) if not {word, before} & other]
    return tuple("runs/demo" if word in COPIES else word for word in told)


def run_command(stage: Stage, block: Block, words: list[str]) -> None:
    program, *arguments = words
    if program in block.excused:
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), f"make {arguments[0]}"
        elif program == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), arguments[0]
        return
    assert program == "contextlab", f"{block.page}:{block.line}: {words}; run it, or say in the page why not"
    into = None
    if len(words) > 2 and words[-2] == ">":
        words, into = words[:-2], words[-1]
    new = arguments[0] in ("run", "sweep") and "--out" in words and words[words.index("--out") + 1]
    stage.provide(named(" ".join(words)) - {new})
    less = LESS.get(arguments[0], []) or LESS.get(" ".join(arguments[:2]), [])
    if arguments[0] == "inspect" and not {"--sites", "--probe"} & set(arguments):
        less = ["--probe", "heads"]  # in the place of all probes
    if alike(words, less) not in stage.worked:  # pages repeat themselves
        warm = arguments[0] in stage.imported
        stage.works(argv=[*words, *less], into=into, resolve_only="--check" not in words, warm=warm)
        stage.worked.add(alike(words, less))
        stage.imported.add(arguments[0])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_in_a_fresh_process(page, stage):
    for block in blocks(page):
        if block.language == "bash":
            for words in block.commands:
                run_command(stage, block, words)
        else:
            if "transformers" in block.code:
                pytest.importorskip("transformers", minversion="5")
            stage.provide(named(block.code))
            stage.works(code=block.code)


def test_a_block_that_fails_is_noticed(stage, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport contextlab\ncontextlab.nothing\n```\n\n```bash\ncontextlab show mixer delta_nett\n```\n"
    )
    python, bash = blocks(page)
    assert "AttributeError" in stage.run(code=python.code)["output"]
    assert stage.run(argv=bash.commands[0])["status"] == 2
    with pytest.raises(AssertionError, match="did you mean"):
        run_command(stage, bash, bash.commands[0])


def test_what_a_page_excuses(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it needs a GPU -->\n```bash\nnvidia-smi\n```\n"
        "<!-- not run (make, pip): they install -->\n```bash\nmake demo  # minutes\ncontextlab list \\\n  mixers\n```\n"
        "<!-- run with 2 for 200 -->\n\n```python\nsteps = 200\n```\n```text\nnot code\n```\n"
    )
    bash, python = blocks(page)
    assert bash.excused == ("make", "pip")
    assert bash.commands == [["make", "demo"], ["contextlab", "list", "mixers"]]
    assert python.code == "steps = 2\n"
    page.write_text("<!-- run with 2 for 300 -->\n```python\nsteps = 200\n```\n")
    with pytest.raises(ValueError, match="nothing to replace"):
        blocks(page)

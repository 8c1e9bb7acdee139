"""`omnicompile train`: what is refused before anything is started, and a run from the command line."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
import runs

from omnicompile.plan import Mesh


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A recipe for one process, one for two, and a data file that exists."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"text": "the small red one"}) + "\n")
    one = runs.write_recipe(tmp_path / "one.yaml", Mesh())
    two = runs.write_recipe(tmp_path / "two.yaml", Mesh(dp_shard=2))
    other = tmp_path / "other.yaml"
    other.write_text(one.read_text().replace("gpu: h100,", "gpu: h1000,"))
    names = {"one": one, "two": two, "other": other, "data": data, "out": tmp_path / "out", "here": tmp_path}
    return {name: str(path) for name, path in names.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{one}", "--data", "{data}"), "--out is needed"),
        (("{one}", "--data", "{here}/none.jsonl", "--out", "{out}"), "none.jsonl does not exist"),
        (("{here}/none.yaml", "--data", "{data}", "--out", "{out}"), "recipe"),
        (("{one}", "--data", "{data}", "--out", "{data}"), "is a file"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--set", "step=3"), "did you mean steps?"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--steps", "0"), "steps must be at least 1"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--train", "{data}"), "train.jsonl"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--weights", "some/name"), "not downloaded"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--resume", "yes"), "auto, never, or the folder"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--profile", "0"), "--profile must be at least 1"),
        (("{one}", "--data", "{data}", "--out", "{out}", "--set", "evaluation.data=x.jsonl"), "x.jsonl does not exist"),
        (("{two}", "--data", "{data}", "--out", "{out}", "--nproc", "3"), "for 2 processes, and --nproc 3 makes 3"),
        (("{two}", "--data", "{data}", "--out", "{out}", "--nnodes", "2"), "needs --rdzv-endpoint"),
        (("{two}", "--data", "{data}", "--out", "{out}", "--nnodes", "3", "--rdzv-endpoint", "a:1"), "share evenly"),
        (("{one}", "--data", "{here}", "--out", "{out}"), "no folder that `datasets` saved"),
        (("{other}", "--data", "{data}", "--out", "{out}"), "unknown GPU 'h1000'"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_2(
    run: Callable[..., Any], files: dict[str, str], arguments: tuple[str, ...], said: str
) -> None:
    outcome = run("train", *(part.format(**files) for part in arguments), "--device", "cpu")
    assert outcome.code == 2, outcome
    assert said in outcome.err and outcome.err.count("\n") == 1 and outcome.err.startswith("error: ")


def test_wandb_is_asked_for_without_the_package(
    run: Callable[..., Any], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import omnicompile.train.run as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else object())
    outcome = run("train", files["one"], "--data", files["data"], "--out", files["out"], "--wandb", "mine")
    assert outcome.code == 2 and "pip install wandb" in outcome.err


def test_help_teaches_with_examples(run: Callable[..., Any]) -> None:
    outcome = run("train", "--help")
    assert outcome.code == 0
    for part in ("--dry-run", "--rdzv-endpoint node-0:29500", "train.yaml", "schedule:", "SIGTERM", "slurm_train.sh"):
        assert part in outcome.out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"), 60)


@pytest.mark.slow
def test_a_run_on_one_process_says_what_it_does_and_goes_on(
    run: Callable[..., Any], files: dict[str, str], data: Path, tmp_path: Path
) -> None:
    common = ("--data", str(data), "--out", files["out"], "--device", "cpu", "--json", "--tensorboard")
    more = (
        "--set", "log_samples=true", "--set", f"evaluation={{data: {data.parent}/eval.jsonl, every: 2, steps: 1}}",
    )  # fmt: skip
    first = run("train", files["one"], *common, *more, "--steps", "3", "--profile", "2")
    assert first.code == 0, first.err
    events = [json.loads(line) for line in first.out.splitlines()]
    assert [e["event"] for e in events] == [
        "start", "step", "profile", "step", "evaluation", "step", "evaluation", "checkpoint", "end",
    ]  # fmt: skip
    out = Path(files["out"])
    assert (out / "profile" / "step-2.json").exists() and list((out / "tensorboard").iterdir())
    exported = tmp_path / "model"
    second = run("train", files["one"], *common, *more, "--steps", "5", "--export", str(exported))
    assert second.code == 0, second.err
    events = [json.loads(line) for line in second.out.splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [4, 5]
    assert [e["event"] for e in events][1] == "resumed" and (exported / "config.json").exists()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    keys = [tuple(key) for line in lines for key in line["samples"]]
    assert len(set(keys)) == len(keys)
    never = run("train", files["one"], *common, "--steps", "9", "--resume", "never")
    assert never.code == 2 and "has a checkpoint of step 5" in never.err
    other = tmp_path / "other.py"
    text = (runs.EXAMPLE / "tiny_vl.py").read_text()
    other.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    foreign = run("train", files["one"], "--model", str(other), *common, "--steps", "9")
    assert foreign.code == 2 and "is of another model: the model has no model.language_model.layers.1" in foreign.err
    for folder in (out / "checkpoints").glob("step-*"):
        next(folder.glob("*.distcp")).write_bytes(b"torn")
    for resume in ("auto", str(out)):
        torn = run("train", files["one"], *common, "--steps", "9", "--resume", resume)
        assert torn.code == 2 and "is damaged" in torn.err and torn.err.count("\n") == 1, torn


LONG = {"messages": [{"role": "user", "content": "the " * 300}, {"role": "assistant", "content": "red"}]}
TEXT = {"text": "the small red one"}


def _with_bad_line(data: Path, folder: Path, line: Any, **options: str) -> Path:
    """A data file with a line more in the middle of the samples of `data`; image: broken, in place of a line."""
    folder.mkdir()
    (folder / "images").symlink_to(data.parent / "images")
    lines = (data.parent / "train.jsonl").read_text().splitlines()
    if line == "image":
        (folder / "broken.png").write_bytes(b"broken")
        record = next(found for text in lines if len((found := json.loads(text))["images"]) == 1)
        line = {**record, "images": ["broken.png"]}
    lines.insert(20, line if isinstance(line, str) else json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join([] if line == "empty" else lines))
    more = "".join(f"{name}: {value}\n" for name, value in options.items())
    (folder / "data.yaml").write_text(data.read_text() + more)
    return folder / "data.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("image", "broken.png cannot be read"),
        ("{nonsense", "the line is no JSON"),
        ("empty", "is empty: there are no samples"),
        (TEXT, "mixed schema, this sample has no `messages`"),
        ({"question": "what"}, "has either `messages` or `text`, this one has only question"),
        ({"messages": LONG["messages"][:1]}, "no turn of the assistant"),
        (LONG, "over the budget: 307 tokens beside its images (at most 110)"),
    ],
)
def test_bad_data_ends_a_run_with_one_line_that_names_the_sample(
    run: Callable[..., Any], files: dict[str, str], data: Path, tmp_path: Path, line: Any, said: str
) -> None:
    given = _with_bad_line(data, tmp_path / "bad", line)
    outcome = run("train", files["one"], "--data", str(given), "--out", files["out"], "--device", "cpu", "--json")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome
    assert outcome.err.count("train.jsonl") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "policy", "left"), [("image", {"bad": "skip"}, "1 bad"), (LONG, {"over_long": "skip"}, "1 over-long"),
                                 (LONG, {"over_long": "split"}, "")],
)  # fmt: skip
def test_policies_leave_out_what_they_say(
    run: Callable[..., Any], files: dict[str, str], data: Path, tmp_path: Path, line: Any, policy: dict[str, str],
    left: str,
) -> None:  # fmt: skip
    given = _with_bad_line(data, tmp_path / "bad", line, **policy)
    out = Path(files["out"])
    options = ("--set", "log_samples=true", "--set", "epochs=1", "--device", "cpu", "--json")
    outcome = run("train", files["one"], "--data", str(given), "--out", str(out), *options)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out.splitlines()[-1])["text"].endswith(f"samples left out: {left}" if left else "")
    samples = [tuple(key) for text in (out / "samples.jsonl").open() for key in json.loads(text)["samples"]]
    numbers = {number for _, number, _ in samples}
    assert len(samples) == len(set(samples)) and len(numbers) == (60 if left else 61)
    assert (max(part for _, _, part in samples) > 0) == (not left)


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_and_the_checkpoint_before_stays(
    run: Callable[..., Any], files: dict[str, str], data: Path
) -> None:
    """By the limit on the size of a file, which the writes of a checkpoint meet as they would a full disk."""
    common = ("--data", str(data), "--out", files["out"], "--device", "cpu", "--json")
    assert run("train", files["one"], *common, "--steps", "1").code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
        outcome = run("train", files["one"], *common, "--steps", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert "step 2 could not be saved to" in outcome.err and "File too large" in outcome.err
    assert [path.name for path in (Path(files["out"]) / "checkpoints").iterdir()] == ["step-00000001"]
    assert run("train", files["one"], *common, "--steps", "2").code == 0


@pytest.mark.slow
def test_one_process_executes_its_recipe(
    run: Callable[..., Any], files: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """Recomputing and a chunked loss head give the losses of the plain model, and go on from its checkpoint."""
    text = Path(files["one"]).read_text()
    assert text.count("recompute: none") == 2 and "loss_head: full" in text
    lean = tmp_path / "lean.yaml"
    lean.write_text(text.replace("recompute: none", "recompute: full").replace("loss_head: full", "loss_head: chunked"))

    def losses(recipe: str, out: str, steps: int) -> list[float]:
        options = ("--data", str(data), "--out", str(tmp_path / out), "--device", "cpu", "--json")
        outcome = run("train", recipe, *options, "--steps", str(steps))
        assert outcome.code == 0, outcome.err
        events = [json.loads(line) for line in outcome.out.splitlines()]
        return [event["loss"] for event in events if event["event"] == "step"]

    plain = losses(files["one"], "plain", 2)
    assert losses(str(lean), "lean", 4) == pytest.approx([*plain, *losses(str(lean), "plain", 4)], abs=1e-5)


@pytest.mark.slow
def test_a_dry_run_trains_nothing(run: Callable[..., Any], files: dict[str, str], data: Path) -> None:
    outcome = run("train", files["two"], "--data", str(data), "--dry-run", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    for part in ("nothing was trained", "127 K parameters", "60 samples", "of tokens", "by the cost model"):
        assert part in outcome.out
    assert not Path(files["out"]).exists()
    view = json.loads(run("train", files["two"], "--data", str(data), "--dry-run", "--json", "--device", "cpu").out)
    assert view["budget"]["tokens"] == runs.TOKENS and 0.5 < view["fill"]["tokens"] <= 1

"""Recipes save and load equal, and every way to write one wrong is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnicompile.cluster import Cluster
from omnicompile.errors import InputError, RecipeError
from omnicompile.plan import BlockPlan, Layout, LossHead, Mesh, Overlap, Plan, Prediction, Sharding, Stack
from omnicompile.recipe import check_pins, dumps, load_machine, load_pins, load_recipe, loads, parse_pins, save_recipe
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SIZE = st.floats(min_value=0, allow_nan=False)
DEGREE = st.sampled_from([1, 2, 3, 8])
TABLE = st.dictionaries(TEXT, SIZE, max_size=3)
BLOCK = st.builds(
    BlockPlan,
    sharding=st.sampled_from(Sharding),
    layout=st.sampled_from(Layout),
    sp=DEGREE,
    ep=DEGREE,
    recompute=st.sampled_from(Recompute),
    offload=st.booleans(),
    reshard=st.booleans(),
    frozen=st.booleans(),
)
WORKLOAD = st.builds(
    Workload,
    seq_len=st.integers(1, 2**30),
    images=st.none() | st.integers(0, 99),
    image_size=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    audio_seconds=st.none() | st.floats(0, 1e6),
    global_batch=st.none() | st.integers(1, 9999),
    freeze=st.lists(TEXT, max_size=2).map(tuple),
)
PREDICTION = st.builds(
    Prediction,
    step_seconds=SIZE,
    tokens_per_second_per_gpu=SIZE,
    mfu=SIZE,
    mfu_paper=SIZE,
    memory=TABLE,
    memory_capacity=SIZE,
    time=TABLE,
    block_memory=TABLE,
    block_time=TABLE,
)
STACK = st.builds(
    Stack,
    pipeline_chunks=st.integers(1, 9),
    gemm_dtype=TEXT,
    compiled=st.booleans(),
    recompute_share=st.floats(0, 1),
)

OVERLAP = st.builds(
    Overlap,
    exchanges=st.booleans(),
    head_groups=st.integers(1, 8),
    expert_chunks=st.integers(1, 8),
    prefetch=st.integers(1, 4),
    replica_sums=st.booleans(),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    degrees = {name: draw(DEGREE) for name in ("dp_replicate", "dp_shard", "sp", "ep", "tp", "cp", "pp")}
    mesh = Mesh(**degrees)
    return Plan(
        model=draw(TEXT),
        cluster=Cluster(mesh.world, draw(TEXT), mesh.world, draw(st.none() | st.floats(0, 100))),
        workload=draw(WORKLOAD),
        mesh=mesh,
        blocks=draw(st.dictionaries(TEXT, BLOCK, max_size=3)),
        micro_batch=draw(st.integers(1, 64)),
        accumulation=draw(st.integers(1, 64)),
        loss_head=draw(st.sampled_from(LossHead)),
        offload_optimizer=draw(st.booleans()),
        param_dtype=draw(TEXT),
        reduce_dtype=draw(TEXT),
        prediction=draw(st.none() | PREDICTION),
        notes=draw(st.lists(TEXT, max_size=2).map(tuple)),
        stack=draw(STACK),
        overlap=draw(OVERLAP),
    )


def small_plan() -> Plan:
    return Plan(
        model="model.py",
        cluster=Cluster(8, price_per_gpu_hour=2.5),
        workload=Workload(seq_len=4096, freeze=("vision",)),
        mesh=Mesh(dp_shard=4, sp=2),
        blocks={
            "vision": BlockPlan(sharding=Sharding.REPLICATE, layout=Layout.IMAGES, sp=2, frozen=True),
            "text": BlockPlan(layout=Layout.SEQUENCE, sp=2, recompute=Recompute.FULL),
        },
        prediction=Prediction(1.0, 2.0, 0.4, 0.5, {"parameters": 1e9}, 8e10, {"compute": 1e-5}),
        notes=("limited by memory",),
    )


@settings(max_examples=100, deadline=None)
@given(plans())
def test_every_plan_survives_the_recipe(plan: Plan) -> None:
    assert loads(dumps(plan)) == plan


def test_save_and_load_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    small_plan().save(path)
    assert load_recipe(path) == small_plan()
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_one_line_per_block_and_a_changed_choice_is_one_changed_line() -> None:
    before = dumps(small_plan()).splitlines()
    after = dumps(small_plan()).replace("layout: images", "layout: replicated").splitlines()
    assert sum(a != b for a, b in zip(before, after)) == 1
    assert any(line.startswith("  vision: {sharding: replicate, layout: images, sp: 2,") for line in before)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot write the recipe to"):
        save_recipe(small_plan(), tmp_path / "missing" / "recipe.yaml")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RecipeError, match="cannot write"):
        save_recipe(small_plan(), tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


WRONG = [
    ("model:", "modle:", r"r\.yaml:2: modle: unknown key 'modle' \(did you mean model\?\)"),
    ("seq_len:", "seqlen:", r"workload\.seqlen: unknown key 'seqlen' \(did you mean seq_len\?\)"),
    ("sharding: replicate", "shard: replicate", r"r\.yaml:9: blocks\.vision\.shard: unknown key 'shard'"),
    ("micro_batch: 1", "micro_batches: 1", r"step\.micro_batches: .*did you mean micro_batch"),
    ("dp_shard: 4", "dp_shard: four", r"mesh\.dp_shard: must be a whole number, got 'four'"),
    ("dp_shard: 4", "dp_shard: 2", r"mesh: degrees multiply to 4 ranks, but the cluster has 8 GPUs"),
    ("dp_shard: 4", "dp_shard: -4", r"mesh\.dp_shard: must be at least 1"),
    ("micro_batch: 1", "micro_batch: 0", r"step\.micro_batch: must be at least 1"),
    ("layout: images", "layout: image", r"must be one of batch, replicated, sequence, images, got 'image'"),
    ("frozen: true", "frozen: 1", r"blocks\.vision\.frozen: must be true or false, got 1"),
    ("freeze: [vision]", "freeze: vision", r"workload\.freeze: must be a list, got 'vision'"),
    ("[896, 896]", "[896]", r"workload\.image_size: must have 2 entries, got 1"),
    ("gpus: 8, ", "", r"cluster: key 'gpus' is missing"),
    ("gpus: 8, ", "gpus: -8, ", r"cluster: --gpus must be at least 1, got -8"),
    ("mesh: {dp_replicate: 1, ", "mesh: {dp_replicate: 1, dp_replicate: 1, ", r":6: key 'dp_replicate' is given twice"),
    ("omnicompile_recipe: 1", "omnicompile_recipe: 2", r"schema version 2, and this OmniCompile reads version 1"),
    ("omnicompile_recipe: 1", "", r"not a recipe: the line 'omnicompile_recipe: 1' is missing"),
    ("model: model.py", "model: 'model.py", r"r\.yaml:\d+: malformed YAML"),
    ("model: model.py", "model: {a: [}", r"r\.yaml:2: malformed YAML"),
    ("model: model.py", "model: [a]", r"model: must be text, got a list"),
    ("model: model.py", "{a: b}: c", r"a key must be text"),
    ("model: model.py", "model: \x00", r"malformed YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    text = dumps(small_plan())
    assert old in text
    with pytest.raises(RecipeError, match=message):
        loads(text.replace(old, new, 1), "r.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_recipe(text: str) -> None:
    with pytest.raises(RecipeError, match="the recipe is empty"):
        loads(text)


def test_a_torn_recipe_is_never_a_plan() -> None:
    text = dumps(small_plan())
    for end in range(0, len(text), 11):
        try:
            plan = loads(text[:end])
        except RecipeError:
            continue
        # What a cut can leave whole is everything but predictions and notes.
        assert (plan.mesh, plan.blocks) == (small_plan().mesh, small_plan().blocks)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "b")


def test_pins_are_any_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "pins.yaml"
    path.write_text(
        "omnicompile_recipe: 1\ncluster: {gpus: 64}\nmesh: {sp: 4}\n"
        "blocks:\n  vision: {layout: images, offload: true}\nstep: {loss_head: chunked}\n"
    )
    assert load_pins(path) == {
        "mesh.sp": "4",
        "vision.layout": "images",
        "vision.offload": "true",
        "step.loss_head": "chunked",
    }
    assert load_machine(path) == ({"gpus": 64}, {})
    with pytest.raises(RecipeError, match=r"not a whole recipe.*--recipe"):
        load_recipe(path)


def test_a_whole_recipe_pins_every_choice(tmp_path: Path) -> None:
    small_plan().save(tmp_path / "r.yaml")
    pins = load_pins(tmp_path / "r.yaml")
    assert (pins["mesh.dp_shard"], pins["vision.frozen"], pins["step.micro_batch"]) == ("4", "true", "1")
    assert load_machine(tmp_path / "r.yaml")[1]["freeze"] == ("vision",)


def test_wrong_pins_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pins.yaml"
    path.write_text("omnicompile_recipe: 1\nmesh: {spp: 4}\n")
    with pytest.raises(RecipeError, match=r"pins\.yaml:2: mesh\.spp: unknown key 'spp' \(did you mean sp\?\)"):
        load_pins(path)
    path.write_text("omnicompile_recipe: 1\noverlap: {expert_chunks: 0}\n")
    with pytest.raises(RecipeError, match=r"pins\.yaml:2: overlap\.expert_chunks: must be at least 1, got 0"):
        load_pins(path)


def test_pins_of_the_command_line() -> None:
    assert parse_pins(["vision.sp=1", "sp=4", "micro_batch=2", "text.offload=True"]) == {
        "vision.sp": "1",
        "mesh.sp": "4",
        "step.micro_batch": "2",
        "text.offload": "true",
    }


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("vision.sp", "write it as block.choice=value"),
        ("=1", "write it as block.choice=value"),
        ("vision.spp=1", r"vision has no choice 'spp' \(did you mean sp\?\)"),
        ("mesh.sp=many", "must be a whole number, got 'many'"),
        ("text.recompute=some", "must be one of none, selective, except_attention, full, got 'some'"),
        ("text.recompute={", "while parsing|expected"),
    ],
)
def test_wrong_pins_of_the_command_line(pin: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_pins([pin])


def test_pins_given_in_code_are_checked_alike() -> None:
    with pytest.raises(InputError, match="has no choice 'layot'"):
        check_pins({"vision.layot": "images"})


def test_another_stack_is_a_section_of_its_own(tmp_path: Path, sample_plans: list[Plan]) -> None:
    plan = sample_plans[0]
    assert "stack:" not in dumps(plan)
    foreign = replace(plan, stack=Stack(gemm_dtype="float8", pipeline_chunks=4))
    text = dumps(foreign)
    assert "stack: {pipeline_chunks: 4, gemm_dtype: float8}" in text
    assert loads(text) == foreign
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load_pins(path)["stack.gemm_dtype"] == "float8"


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ("{pipeline_chunks: 0}", "must be at least 1"),
        ("{recompute_share: 2}", "must be between 0 and 1"),
        ("{gemm_type: float8}", "did you mean gemm_dtype?"),
    ],
)
def test_a_wrong_stack_is_refused(sample_plans: list[Plan], stack: str, words: str) -> None:
    plan = sample_plans[0]
    with pytest.raises(RecipeError, match=re.escape(words)):
        loads(dumps(plan) + f"stack: {stack}\n")

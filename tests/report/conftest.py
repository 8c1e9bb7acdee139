"""The page of a planned model, with its curves."""

from __future__ import annotations

import pytest

from omnicompile.cluster import Cluster
from omnicompile.planner.api import plan_program
from omnicompile.planner.picture import picture_of
from omnicompile.planner.sweep import sweep
from omnicompile.report.html.page import Page
from omnicompile.workload import Workload
from tests.planner import synthetic


@pytest.fixture(scope="session")
def page() -> Page:
    program = synthetic.vision_language_7b()
    cluster, workload = Cluster(8, price_per_gpu_hour=2.5), Workload(program.sample.seq_len)
    result = plan_program(program, cluster, workload, {}, 3, name="models/vision_language.py")
    return Page(
        plans=result.plans,
        reasons=result.lost_because,
        program=program,
        picture=picture_of(result.plans[0], program),
        curves=sweep(result.plans[0], program, {}),
        command="omnicompile plan models/vision_language.py --gpus 8 --html page.html",
        made="Made by a test",
        searched="3 plans considered",
    )

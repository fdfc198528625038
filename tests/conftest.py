"""What every test shares: Hypothesis profiles, one thread a worker, seeds."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Generator
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same cases each time, so that a failure is of the change at hand; `--hypothesis-profile=thorough` looks for more.
settings.register_profile(
    "suite", deadline=None, max_examples=7, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("thorough", settings.get_profile("suite"), max_examples=200, derandomize=False)
settings.load_profile("suite")

# A shell's background job ignores SIGINT, and what it starts inherits that: tests of interrupts could not interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A hundred processes that tests start import the same modules: compiled once, they take half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Small tensors: a second thread costs more than it gives, and under xdist the workers share the cores.
torch.set_num_threads(1)


# `torch.manual_seed` also notes a seed and a stack trace for a GPU that may be used later: seconds, over all tests.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays to the end: to look through it for garbage, again and again, takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    SEED(0)


# `make quick`: in a minute or so, tests of every file, and every law on one component of each family.
QUICK = {
    *(
        "attention",
        "sliding_window",
        "topk_attention",
        "linear_attention",
        "gated_delta_net",
        "mamba2",
        "lstm",
        "titans",
    ),
    *("transformer_xl", "hyena", "fnet", "parallel", "transformer", "mambaformer"),
    *("linear_regression", "boolean_function", "associative_recall", "markov_chain", "group_word", "bandit", "needle"),
    *("h2o", "quantize", "quest", "kvzip"),
}
MANY = 40  # a test with more cases than this goes over a registry: its cases are chosen by name
SHARE = 5  # else one test in so many, in its first case
SLOW = {  # more than two seconds, measured with --durations=0
    *("test_blocks_run_in_a_fresh_process", "test_importing_contextlab_is_enough_to_name_every_module"),
    *("test_run_report_and_resume", "test_a_model_of_several_tasks_is_measured_on_each", "test_cost_figures"),
    *("test_every_recipe_that_ships_is_a_valid_experiment", "test_compress_measures_prints_and_writes"),
    *("test_an_interrupted_run_resumes_to_the_same_results", "test_the_axis_can_be_switched"),
    *("test_training_reaches_its_ratio_and_keeps_the_loss", "test_fits_of_a_direction_are_nearly_the_posterior"),
    *("test_runs_trainings_checkpoints_and_saved_models_are_found", "test_gradients_go_through_the_solution"),
    *("test_a_million_tokens_leave_memory_flat", "test_filters_come_close_to_the_exact_posterior"),
    *("test_several_runs_keep_their_names", "test_the_default_folder_takes_the_next_free_number"),
    *("test_the_divergence_is_that_of_reading_by_hand", "test_a_model_that_lacks_memory_is_one_failed_job"),
    "test_workers_give_the_bits_of_one_process_load_its_plugins_and_may_die",
    *("test_gates_alone_leave_the_model_and_its_gradients_as_they_are", "test_workers_give_what_one_process_gives"),
    *("test_a_strangers_mixer_is_tested_by_pytest", "test_a_strangers_mixer_is_checked_by_the_command_line"),
    *("test_the_table_sorts_and_filters", "test_everything_listed_can_be_shown", "test_records_are_plain_json"),
    *("test_the_example_mixer_keeps_the_split_law_and_joins_the_demo", "test_a_window_is_the_same_in_pieces"),
    *(
        "test_policies_that_watch_or_learn_are_prepared_on_the_prompts",
        "test_a_lawful_mixer_keeps_all_laws_of_causal_ones",
    ),
    *("test_a_run_without_finished_models_still_has_a_report", "test_without_a_policy_it_is_the_plain_model"),
    *(
        "test_many_models_that_fall_short_are_told_in_groups",
        "test_decision_tasks_are_played_online_and_their_regret_is_drawn",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `pytest -m quick` runs. Chosen by name, so that a new test moves no other in or out."""
    files: dict[Path, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if (name := getattr(item, "originalname", item.name)) not in SLOW:
            files.setdefault(item.path, {}).setdefault(name, []).append(item)
    for functions in files.values():
        draws = {name: crc32(name.encode()) for name in functions}
        least = min(draws.values())
        for name, cases in functions.items():
            chosen = _of_each_family(cases) if len(cases) > MANY else []
            if not chosen and draws[name] in (least, draws[name] // SHARE * SHARE):
                chosen = cases[:1]
            for case in chosen:
                case.add_marker("quick")


def _of_each_family(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The first case of each component in QUICK and each law; ids read "NAME[OPTIONS]: LAW" or "NAME-..."."""
    first: dict[tuple[str, str], pytest.Item] = {}
    for case in cases:
        component = re.match(r"\w+\[(\w+)", case.name)
        if component is not None and component[1] in QUICK:
            first.setdefault((component[1], case.name.rpartition(": ")[2] if ": " in case.name else ""), case)
    return list(first.values())

"""Parameters of which the fast tests take a few; the others run in `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """The values, those that are not fast marked as slow; a tuple is several arguments.

    Raises:
        AssertionError: None of them is fast, so nothing would run in `make test`.
    """
    values = list(values)
    assert any(is_fast(value) for value in values)
    return [
        value
        if is_fast(value)
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


# Tests whose parameters are alike: `make test` takes every nth of them, and `make test-all` the others.
EVERY_NTH = {
    "tests/assembly/test_features.py::*": 4,
    "tests/assembly/test_frame_times.py::*": 2,
    "tests/assembly/test_grid.py::test_every_cell_fits_or_is_refused_in_words": 12,
    "tests/assembly/test_parts.py::*": 4,
    "tests/assembly/test_refusals.py::*": 4,
    "tests/assembly/test_resolving.py::*": 2,
    "tests/benchmarks/test_gpu_run.py::*": 2,
    "tests/data/decoding/test_matrix.py::*": 3,
    "tests/data/decoding/test_sampling.py::*": 4,
    "tests/data/decoding/test_timeline.py::*": 2,
    "tests/data/decoding/test_video.py::*": 2,
    "tests/data/features/test_sharing.py::*": 3,
    "tests/data/loading/test_clip_dataset.py::*": 2,
    "tests/data/loading/test_isolation.py::*": 4,
    "tests/demo/test_prepare.py::*": 3,
    "tests/devices/test_devices.py::*": 5,
    "tests/measuring/test_as_a_run.py::*": 2,
    "tests/measuring/test_measure.py::*": 3,
    "tests/metrics/test_parity.py::*": 3,
    "tests/metrics/test_tokenizers.py::*": 3,
    "tests/metrics/test_tokenizers_many.py::*": 4,
    "tests/models/decoding/test_engine.py::*": 3,
    "tests/models/decoding/test_graphs.py::*": 4,
    "tests/models/encoders/test_any_tower.py::*": 3,
    "tests/models/encoders/test_build.py::*": 4,
    "tests/models/llm/test_inspection.py::*": 4,
    "tests/models/test_generation.py::*": 3,
    "tests/models/test_hub.py::*": 3,
    "tests/models/test_known.py::*": 4,
    "tests/models/test_padding.py::*": 8,
    "tests/models/test_variable_frames.py::*": 4,
    "tests/planning/test_make_plan.py::test_the_targets_are_met": 2,
    "tests/planning/test_plan_by_id.py::*": 5,
    "tests/planning/test_plan_sweep.py::*": 4,
    "tests/planning/test_stages.py::*": 3,
    "tests/reporting/report/test_run_page_browser.py::*": 2,
    "tests/spectrum/test_measure_encoder.py::*": 4,
    "tests/sweeping/test_claims.py::*": 2,
    "tests/sweeping/test_pages.py::*": 2,
    "tests/sweeping/test_sweep.py::*": 6,
    "tests/test_compose.py::*": 2,
    "tests/test_compose.py::test_a_mistake_is_one_sentence_with_the_key_and_the_mend": 8,
    "tests/test_compose.py::test_a_part_is_called_what_its_checkpoint_is": 3,
    "tests/test_compose.py::test_every_experiment_is_the_combination_of_the_tables": 3,
    "tests/test_compose.py::test_every_file_composes": 6,
    "tests/test_compose.py::test_every_run_of_a_study_composes_and_differs": 10,
    "tests/test_config_hash.py::*": 4,
    "tests/test_config_saved.py::*": 8,
    "tests/test_config_unread.py::*": 4,
    "tests/test_own_components.py::*": 2,
    "tests/test_docs.py::test_a_command_composes": 10,
    "tests/test_docs.py::test_a_command_prints_what_is_shown": 3,
    "tests/test_libraries.py::*": 3,
    "tests/test_overrides.py::*": 3,
    "tests/test_overrides.py::test_a_key_of_another_program_names_one_of_ours": 8,
    "tests/test_programs.py::test_a_wrong_configuration": 9,
    "tests/test_programs.py::test_output_that_is_no_longer_read_ends_a_command_quietly": 3,
    "tests/test_settings.py::*": 2,
    "tests/test_settings.py::test_a_setting_is_read_or_refused": 16,
    "tests/test_startup.py::*": 3,
    "tests/training/checkpoints/test_export_whole.py::*": 2,
    "tests/training/test_debug.py::*": 3,
    "tests/training/test_encoder_tuning.py::*": 2,
    "tests/training/test_experiments.py::*": 3,
    "tests/training/test_faults.py::*": 2,
    "tests/training/test_fitting.py::*": 2,
    "tests/training/test_kill_points.py::*": 2,
    "tests/training/test_module.py::*": 2,
    "tests/training/test_profiling.py::*": 3,
    "tests/training/test_real_path.py::*": 2,
}


def is_left_out(name: str, number: int) -> bool:
    """Whether `make test` leaves out the parameters of a test with this number, counted from 0.

    Args:
        name: Of the test, such as "tests/test_compose.py::test_every_file_composes".
        number: Of its parameters.
    """
    step = EVERY_NTH.get(name) or EVERY_NTH.get(f"{name.partition('::')[0]}::*") or 1
    return number % step != 0

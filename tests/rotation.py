"""Which part of a product of tests runs by default, and which is left to ``--thorough``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def rotated(first: Collection[Any], second: Collection[Any], rounds: int = 2) -> list[Any]:
    """All pairs, for ``parametrize``: by default each value meets at least ``rounds`` of the others.

    In round 0 both lists are walked in step, the shorter one over and over. In each later round the first list is one
    further ahead, and one more each time that it has been walked through, so that no two values always come together.
    The other pairs are marked ``thorough``.
    """
    ones, others = list(first), list(second)
    chosen = {
        ((index + round_ * (1 + index // len(ones))) % len(ones), index % len(others))
        for round_ in range(rounds)
        for index in range(max(len(ones), len(others)))
    }
    return [
        pytest.param(one, other, marks=() if (i, j) in chosen else pytest.mark.thorough)
        for i, one in enumerate(ones)
        for j, other in enumerate(others)
    ]


KEPT: dict[str, int | tuple[str, ...]] = {
    # Start-up of real processes: each launcher once in bootstrap, training under plain python and torchrun.
    "launch/test_same_everywhere.py::test_two_ranks_under": 0,
    "launch/test_same_everywhere.py::test_two_hosts": 0,
    "launch/test_hosts.py::test_a_killed_worker_starts_again_from_the_last_checkpoint": 0,
    "launch/test_hosts.py::test_a_lost_host_ends_the_other_which_goes_on_alone": 0,
    "launch/test_train.py::test_a_signal_to_one_rank_saves_on_all_and_prints_the_command_that_goes_on": 0,
    "launch/test_train.py::test_a_batch_that_does_not_divide_is_refused_on_every_rank": 0,
    "deepspeed/test_launch.py::test_a_run_begins_under_deepspeeds_launcher_and_ends_in_one_process": 0,
    "bootstrap/test_launchers.py::test_deepspeed": 0,
    "bootstrap/test_launchers.py::test_mpirun_passes_over_a_port_that_is_taken": ("open_mpi",),
    "bootstrap/test_launchers.py::test_mpi_of_the_script_stays_up": 0,
    "bootstrap/test_launchers.py::test_traceback_of_a_failing_rank_survives": 0,
    "bootstrap/test_launchers.py::test_exit_code_of_a_failing_rank_survives": ("mpich",),
    "bootstrap/test_launchers.py::test_open_mpi_with_the_library_of_mpich": 0,
    "bootstrap/test_launchers.py::test_mpich_with_the_library_of_open_mpi": 0,
    "bootstrap/test_launchers.py::test_variables_set_by_hand": 0,
    "bootstrap/test_launchers.py::test_srun_passes_over_a_port_that_is_taken": 0,
    "bootstrap/test_launchers.py::test_failed_slurm_job_is_queued_again_and_keeps_its_exit_code": 0,
    "launch/test_optimizers.py::test_two_ranks_have_the_losses_of_one_process": 0,
    # One process: each switch in one of several ways.
    "test_soundness.py::test_copies_that_arrive_late_change_nothing": 0,
    "test_accelerator.py::test_a_step_stays_on_the_device": 10,
    # Triton's interpreter takes a second for what takes a microsecond elsewhere.
    "kernels/test_triton.py::test_every_layout_gives_the_run_of_one_process": 16,
    "kernels/test_captured.py::test_a_captured_run_is_the_run_bit_for_bit": ("single-default", "fsdp_2-default"),
    "test_work.py::test_sizes_do_not_change_a_run": 5,
    "test_budgets.py::test_nothing_that_a_captured_graph_reads_moves_from_step_to_step": 8,
    "test_accelerator.py::test_small_tensors_of_a_shape_are_computed_as_one": 2,
    "test_reference.py::test_a_run_is_the_references": 12,
    "test_reference.py::test_training_is_the_references": 2,
    "test_interruptions.py::test_every_point_of_a_step_on_one_process": 48,
    "test_interruptions.py::test_every_point_of_a_step_on_two_ranks": ("default",),
    "test_interruptions.py::test_an_error_on_one_rank_in_the_middle_of_a_step_is_all_ranks": ("cautious",),
    "torch_suite/test_compilers.py::test_compiled_programs_step_as_others": 3,
    "torch_suite/test_steps.py::test_forloop_goes_right_direction": 3,
    "test_backward.py::test_fully_shard": 5,
    "kernels/test_choice.py::test_processes_that_compile_at_once_all_have_a_library": 0,
    "test_step_cost.py::test_a_step_beside_fused_adamw": ("gpt2-fp32", "gpt2-bf16", "lora-fp32", "tiny-fp32"),
    "test_step_cost.py::test_a_step_of_the_eager_kernels": ("lora",),
    "test_step_cost.py::test_the_reference_is_slower_by_far": ("lora",),
    # Ranks: every layout and every stage stays, with fewer switches.
    "test_layouts.py::test_every_shape_in_every_role": 8,
    "test_layouts.py::test_bf16_weights_and_their_rounding_do_not_depend_on_the_layout": 7,
    "test_layouts.py::test_d_over_a_hundred_steps": 0,
    "test_checkpoints.py::test_tensor_parallelism_too": 8,
    "test_checkpoints.py::test_a_run_of_the_reference_moves_in": 6,
    "test_state.py::test_a_run_goes_on_in_another_layout": 4,
    "test_state.py::test_the_step_that_creates_state_changes_nothing": 6,
    "test_state.py::test_resume_is_bit_exact": 2,
    "test_dry_run.py::test_every_number_is_that_of_a_real_run": 3,
    "test_nonfinite.py::test_every_rank_of_every_layout": 2,
    "deepspeed/test_launch.py::test_stage_3_has_the_losses_and_the_picture_of_one_process": 0,
    "test_fsdp.py::test_a_script_trains_the_same_on_one_device_and_sharded": 2,
    "test_wrapper.py::test_every_layout_gives_the_run_of_one_process": 2,
    "checkpoints/test_kept.py::test_a_checkpoint_of_a_release_loads_bit_for_bit": 2,
    "test_clipping.py::test_every_layout_gives_what_torch_gives_on_one_process": 2,
    "harness/test_layouts.py::test_shards_make_up_the_whole": 2,
    "test_budgets.py::test_a_step_never_waits_for_the_device": 2,
    "test_budgets.py::test_reductions_of_a_step": 2,
    "test_observers.py::test_every_rank_of_every_layout_is_told_the_same": 2,
    "deepspeed/test_evaluation.py::test_the_model_computes_with_the_average": 2,
    "test_moving.py::test_averaging_goes_off_and_on_alike_on_every_layout": 2,
    "test_layouts.py::test_parameters_without_gradients": 3,
    "test_tensor_parallel.py::test_real_tensor_parallelism": 2,
    "test_teams.py::test_parameters_that_thaw_in_mid_run": 3,
    "test_one_rank_alone.py::test_the_step_is_nobodys_and_all_know_why": 2,
    "deepspeed/test_carrying.py::test_portable_checkpoints_between_stages": 2,
    "test_moving_d.py::test_d_is_what_its_sums_say": 2,
    "test_family.py::test_every_layout_gives_the_run_of_one_process": 2,
    "test_nonfinite.py::test_every_switch": 2,
    "test_scaler.py::test_two_micro_batches_are_one_batch": 2,
    "test_soundness.py::test_the_edge_of_fp32_is_in_the_same_place_in_every_layout": 3,
    "harness/test_pool.py::test_nothing_is_left_however_the_tests_end": 2,
    "test_dry_run.py::test_the_command_line_starts_no_rank": 0,
    "test_fsdp.py::test_replicas_stay_identical_for_fifty_steps_of_stochastic_rounding": 0,
    "deepspeed/test_stages.py::test_d_over_many_steps": 2,
    "deepspeed/test_stages.py::test_every_switch": 14,
    "deepspeed/test_stages.py::test_every_stage": 3,
    "deepspeed/test_stages.py::test_settings_of_zero": 3,
    "deepspeed/test_checkpoints.py::test_the_same_ranks_resume_bit_for_bit": 3,
    "deepspeed/test_checkpoints.py::test_experts_resume_bit_for_bit": 0,
    "deepspeed/test_carrying.py::test_universal_checkpoints": 0,
    "deepspeed/test_carrying.py::test_from_deepspeed_to_fsdp_and_one_device": 12,
    "deepspeed/test_carrying.py::test_from_fsdp_and_one_device_to_deepspeed": 12,
    "deepspeed/test_training.py::test_a_step_that_is_not_finite_changes_nothing_anywhere": 2,
    "deepspeed/test_trainers.py::test_accelerates_optimizer_switches_what_the_model_computes": 0,
    "deepspeed/test_trainers.py::test_trainer_evaluates_the_average": 0,
    "deepspeed/test_dry_run.py::test_every_number_is_that_of_a_real_engine": 9,
}
"""Of tests that take long: which of their cases the default keeps, by a part of their names, or every so-manyth (0 for
none). The others run with ``--thorough``."""

QUICK = (
    "algorithm/",
    "sharding/",
    "test_rotation.py",
    "test_house.py",
    "harness/test_models.py",
    "harness/test_counting.py",
    "test_arguments.py",
    "checkpoints/test_strangers.py",
    "bootstrap/test_environment.py",
    "test_loading.py",
    "test_reference.py::test_each_step",
    "test_family.py::test_each_step",
    "test_budgets.py",
    "test_layouts.py::test_every_layout_gives_the_run_of_one_process",
)
"""What runs with ``--quick``: the pure rooms, one step of each switch, and each layout once."""

QUICK_CASES: dict[str, int] = {
    "test_arguments.py": 4, "test_budgets.py": 8, "test_layouts.py": 6, "test_reference.py": 4, "sharding/": 2,
}  # fmt: skip
"""Of long ones among these: every so-manyth case."""


def left_out(names: Sequence[str]) -> set[str]:
    """Of the node ids of all tests those that the default leaves to ``--thorough`` by ``KEPT``.

    Raises:
        ValueError: an entry of the table stands for no test.
    """
    out: set[str] = set()
    for test, kept in KEPT.items():
        cases = [name for name in names if name.partition("[")[0] == f"tests/{test}"]
        if isinstance(kept, int):
            keeps = set(cases[::kept]) if kept else set()
        else:
            keeps = {case for case in cases if case.partition("[")[2].rstrip("]") in kept}
            if cases and len(keeps) != len(kept):
                raise ValueError(f"tests.rotation.KEPT[{test!r}] = {kept}: there are only {cases}")
        out |= set(cases) - keeps
    return out


def may_be_quick(path: str) -> bool:
    """Whether a test file, relative to ``tests``, holds any of ``QUICK``: the others are not even imported."""
    return any(part.partition("::")[0] == path or path.startswith(part) for part in QUICK)


def quick(names: Sequence[str]) -> set[str]:
    """The node ids of the tests that run with ``--quick``."""
    chosen = [name for name in names if any(name.startswith(f"tests/{part}") for part in QUICK)]
    for part, every in QUICK_CASES.items():
        cases = [name for name in chosen if name.startswith(f"tests/{part}")]
        chosen = [name for name in chosen if name not in set(cases) - set(cases[::every])]
    return set(chosen)

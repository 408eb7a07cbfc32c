"""Every fault that the engine must survive has tests that show it, or is said to be open, and why.

A name is FILE::FUNCTION below tests/. What is shown of a row in part has tests and says what is open, too.
"""

import ast
from pathlib import Path
from types import MappingProxyType

import pytest

HERE = Path(__file__).parent

FAULTS = MappingProxyType(
    {
        "SIGKILL mid-step": (
            "train/test_surviving.py::test_killed_and_started_again",
            "train/test_surviving.py::test_a_rank_dies_and_the_run_goes_on_unaided",
            "train/test_chaos.py::test_random_kills_change_nothing",
        ),
        "SIGKILL mid-save": (
            "checkpoint/test_faults.py::test_killed_at_every_operation",
            "checkpoint/test_stores.py::test_killed_at_every_operation",
            "train/test_surviving.py::test_killed_in_a_save",
        ),
        "leftover partial save": (
            "checkpoint/test_retention.py::test_what_is_not_finished_goes_and_the_rest_stays",
            "checkpoint/test_faults.py::test_killed_at_every_operation",
        ),
        "node lost": (
            "launch/test_hosts.py::test_a_host_that_is_cut_off_comes_back",
            "launch/test_hosts.py::test_the_run_goes_on_with_what_is_left_and_grows_again",
            "launch/test_hosts.py::test_a_job_on_fewer_hosts_goes_on_from_the_same_folder",
            "train/test_chaos.py::test_random_kills_of_hosts_change_nothing",
        ),
        "SIGTERM / Slurm / spot": (
            "train/test_stopping.py::test_a_signal_saves_and_the_same_command_goes_on",
            "train/test_stopping.py::test_any_rank_may_hear_of_it",
            "launch/test_hosts.py::test_slurms_grace",
            "train/test_preemption.py::test_no_finished_step_is_lost",
        ),
        "hang in a collective": (
            "train/test_standstill.py::test_found_within_ten_seconds",
            "train/test_standstill.py::test_a_stopped_rank_is_named_ended_and_the_run_goes_on",
            "monitor/test_heartbeat.py::test_the_rank_that_is_behind_is_named",
            "train/test_standstill.py::test_a_rank_that_strays_is_named_and_the_run_goes_on",
            "train/test_stops.py::test_whoever_is_stopped_is_found",
            "open: who left out a message between stages (found and ended, but another rank of the ring may be named)",
        ),
        "slow rank": (
            "train/test_guards.py::test_the_slow_rank_is_named",
            "train/test_guards.py::test_stragglers_are_timed_in_a_run",
            "train/test_standstill.py::test_a_rank_that_is_stopped_by_turns_is_a_straggler",
        ),
        "NaN/Inf": (
            "engine/test_not_finite.py::test_none_reaches_the_weights",
            "train/test_training.py::test_a_run_that_skips_all_says_so",
        ),
        "NaN poisons the guard": (
            "train/test_guards.py::test_what_is_not_finite_does_not_poison_it",
            "train/test_guards.py::test_a_nan_poisons_neither_a_run_nor_the_one_that_goes_on",
        ),
        "loss spike": ("train/test_guards.py::test_back_before_a_spike",),
        "fp16 overflow on one rank": (
            "engine/test_precision.py::test_an_overflow_on_one_rank_skips_the_step_on_all",
            "optim/test_loss_scale.py::test_an_overflow_on_one_rank_skips_the_step_on_all",
            "checkpoint/test_kinds.py::test_the_loss_scale_and_its_count_survive",
        ),
        "bit flip": (
            "train/test_memory.py::test_who_holds_it_is_blamed",
            "train/test_memory.py::test_what_is_frozen_is_compared_too",
            "train/test_memory.py::test_all_that_an_optimizer_remembers_is_compared",
            "train/test_memory.py::test_a_run_ends_before_anything_spoilt_is_saved",
            # what holds where nothing can be compared
            "train/test_memory.py::test_what_one_rank_alone_owns_is_not_seen",
            "train/test_memory.py::test_before_the_sum_it_is_in_all_copies_alike",
            "open: shards of one owner, gradients before the sum and what is made anew each step have no copies",
        ),
        "disk full": (
            "checkpoint/test_faults.py::test_a_full_disk_is_noticed_before",
            "train/test_surviving.py::test_a_full_disk_does_not_stop_a_run",
            "data/test_cache.py::test_full_disk",
        ),
        "truncated, corrupt, missing, mixed-step shard": (
            "checkpoint/test_damage.py::test_every_accident_is_noticed",
            "checkpoint/test_damage.py::test_a_missing_file_is_named",
            "checkpoint/test_damage.py::test_swapped_files_are_noticed",
            "checkpoint/test_damage.py::test_files_of_two_steps_are_not_mixed",
            "train/test_surviving.py::test_a_damaged_checkpoint_is_passed_over",
        ),
        "empty or missing `latest`": (
            "checkpoint/test_damage.py::test_latest_is_but_a_hint",
            "train/test_surviving.py::test_nothing_whole_is_no_new_beginning",
        ),
        "async writer fails": (
            "checkpoint/test_faults.py::test_failing_at_every_operation",
            "checkpoint/test_faults.py::test_a_fault_of_one_rank_is_heard_on_all",
        ),
        "async save races the update": (
            "checkpoint/test_faults.py::test_state_may_change_while_it_is_written",
            "train/test_keeping.py::test_a_save_waits_for_the_one_before",
        ),
        "another layout or world size": (
            "checkpoint/test_pairs.py::test_420_pairs",
            "train/test_resuming.py::test_another_layout_goes_on",
            "train/test_surviving.py::test_one_process_takes_up_what_two_left",
            "train/test_chaos.py::test_random_kills_and_other_numbers_of_ranks",
        ),
        "another config, dtype, vocab padding": (
            "config/test_changes.py::test_every_key_has_a_class",
            "config/test_changes.py::test_changes_are_told_whole_and_in_order",
            "train/test_resuming.py::test_what_cannot_change_is_refused_at_once",
        ),
        "corrupt .idx, truncated .bin": (
            "data/test_indexed.py::test_damaged_index",
            "data/test_indexed.py::test_truncated_everywhere",
        ),
        "data changed under a cached index": (
            "data/test_stream.py::test_changed_data_is_noticed",
            "data/test_stream.py::test_rewritten_data_of_the_same_size",
            "train/test_resuming.py::test_other_data_of_the_same_name_are_refused",
        ),
        "racing or crashed index builder": (
            "data/test_cache.py::test_eight_racing_processes_build_once",
            "data/test_cache.py::test_builder_killed_while_others_wait",
            "data/test_stream.py::test_racing_ranks",
        ),
        "empty documents, tiny dataset": (
            "data/test_stream.py::test_fewer_tokens_than_a_sample",
            "data/test_stream.py::test_no_tokens_at_all",
            "data/test_sample_index.py::test_samples_are_the_stream_cut_and_shuffled",
        ),
        "token id >= vocab": (
            "data/test_stream.py::test_token_beyond_the_vocabulary",
            "data/test_data_command.py::test_tokens_beyond_the_vocabulary_are_found",
        ),
        "wrong tokenizer": (
            "data/test_stream.py::test_facts_beside_the_data",
            "data/test_tokenizers.py::test_the_tokenizer_of_a_run",
            "train/test_other_tokenizer.py::test_a_run_goes_on_with_its_own_alone",
            "train/test_other_tokenizer.py::test_an_export_has_the_tokenizer_of_the_run",
            "train/test_other_tokenizer.py::test_what_has_another_one_beside_it_is_not_exported",
            "open: whoever changes the tokenizer.json of an exported folder later is not noticed",
        ),
        "indivisible heads, layers, batch": (
            "config/test_validate.py::test_a_broken_rule_is_told_with_its_fix",
            "config/test_validate.py::test_rules_of_all_sections_are_told_at_once",
            "config/test_bad_runs.py::test_a_bad_run_gives_exit_code_2_and_names_the_key",
            "config/test_bad_runs.py::test_training_refuses_all_of_them_before_anything_starts",
        ),
        "config differs between ranks": ("mesh/test_process_group.py::test_a_rank_with_another_run_is_named_on_all",),
        "exception on one rank": (
            "launch/test_processes.py::test_a_rank_that_raises_ends_all_with_its_cause",
            "launch/test_processes.py::test_a_rank_that_fails_inside_a_schedule_ends_all_within_ten_seconds",
            "train/test_keeping.py::test_what_rank_0_cannot_do_all_hear_of",
            "train/test_rank_0_alone.py::test_all_blocks_are_listed",
            "train/test_rank_0_alone.py::test_all_ranks_end_with_the_cause",
            "train/test_rank_0_alone.py::test_a_run_that_never_met_ends_too",
        ),
        "port in use, rendezvous timeout": (
            "mesh/test_process_group.py::test_a_port_in_use_is_the_users_to_change",
            "launch/test_meeting.py::test_another_port_is_tried_and_counts_as_no_fault",
            "launch/test_meeting.py::test_all_nodes_try_another_port",
            "launch/test_meeting.py::test_ports_that_are_always_taken_end_it",
            "launch/test_meeting.py::test_a_held_meeting_point_ends_the_command_soon",
            "launch/test_meeting.py::test_nodes_that_do_not_come_are_named",
            "mesh/test_process_group.py::test_who_does_not_come_is_named_once",
            "mesh/test_process_group.py::test_rank_0_does_not_come",
        ),
        "out of memory": ("launch/test_processes.py::test_a_rank_that_runs_out_of_memory_is_told_what_helps",),
        "restart loop": ("launch/test_restarts.py::test_a_fault_that_comes_back_ends_the_run",),
        "hostile checkpoint, config, tokenizer": (
            "checkpoint/test_hostile.py::test_a_manifest_that_lies",
            "checkpoint/test_hostile.py::test_a_pickle_is_not_loaded",
            "checkpoint/test_hostile.py::test_names_that_lead_elsewhere",
            "checkpoint/hf/test_hostile.py::test_pickles_are_never_opened",
            "checkpoint/hf/test_hostile.py::test_remote_code_is_ignored_where_the_model_is_built_in",
            "data/test_tokenizers.py::test_damaged_files_are_told",
        ),
        "launcher killed": (
            "launch/test_processes.py::test_ranks_die_with_a_killed_parent",
            "launch/test_node.py::test_killed_it_leaves_nobody_behind_and_the_same_command_goes_on",
            "train/test_chaos.py::test_random_kills_change_nothing",
            "train/test_chaos.py::test_random_kills_of_hosts_change_nothing",
        ),
    }
)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_shown_or_open(fault: str) -> None:
    assert FAULTS[fault]
    for name in FAULTS[fault]:
        if name.startswith("open: "):
            assert len(name) > len("open: ")
            continue
        file, _, function = name.partition("::")
        assert function in functions(HERE / file), f"{name} is no test"

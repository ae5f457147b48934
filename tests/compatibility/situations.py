"""What an adapted model may meet besides the switches of PEFT and diffusers, and what shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Situation:
    """Say what a mixture does in a situation.

    Attributes:
        what: the situation.
        works: "yes"; "partly", as the note says; "raises" a clear error.
        note: what a user should know.
        test: the test that shows it, as `path below tests/::function`.
    """

    what: str
    works: Literal["yes", "partly", "raises"]
    note: str
    test: str


CALLS = [
    Situation(
        "Several threads call one model",
        "yes",
        "Every pass has its own routing.",
        "stress/test_threads.py::test_threads_with_inputs_of_their_own",
    ),
    Situation(
        "moe_lora.route, teach_experts, ablate_expert in threads",
        "yes",
        "A context applies to the thread that opened it.",
        "stress/test_threads.py::test_threads_with_weights_of_their_own_beside_one_that_gives_none",
    ),
    Situation(
        "moe_lora.router_inputs in threads",
        "yes",
        "Every request has its own mask.",
        "routing/test_control.py::test_router_inputs_reach_the_thread_that_opened_the_context_only",
    ),
    Situation(
        "Asynchronous tasks",
        "yes",
        "A context applies to its task, and to threads started with asyncio.to_thread.",
        "stress/test_contexts.py::test_tasks_that_interleave_inside_a_context_see_their_own",
    ),
    Situation(
        "Several pipelines that share a transformer, in threads or interleaved",
        "yes",
        "Masks that the call carries need no argument. Others need router_inputs.",
        "stress/test_pipelines_at_once.py::test_one_pipeline_per_thread",
    ),
    Situation(
        "A model called inside its own forward pass, or inside that of another adapted model",
        "yes",
        "The inner and the outer pass have separate routings.",
        "stress/test_nested_calls.py::test_a_model_called_inside_its_own_forward",
    ),
    Situation(
        "model.forward(...) or a block called outside of a pass",
        "raises",
        "Call the model itself, or open moe_lora.route.",
        "stress/test_outside.py::test_a_block_of_a_routed_model_raises_outside_of_a_pass",
    ),
    Situation(
        "Blocks called by themselves, in uniform mode or without a router",
        "yes",
        "Every expert has weight 1/E.",
        "stress/test_outside.py::test_a_block_runs_uniformly_without_a_router_or_in_uniform_mode",
    ),
    Situation(
        "A block replaced by its copy (deepcopy, pickle, torch.save)",
        "yes",
        "The model that contains the copy routes it.",
        "stress/test_outside.py::test_a_copied_block_in_the_place_of_the_old_one_is_routed",
    ),
    Situation(
        "An error inside a pass",
        "yes",
        "The next pass is not affected.",
        "stress/test_threads.py::test_a_pass_that_failed_leaves_nothing_behind",
    ),
]

CHECKPOINTING = [
    Situation(
        "torch.utils.checkpoint with use_reentrant=False, around blocks",
        "yes",
        "Also with several forward passes before the backward passes, in any order.",
        "stress/test_checkpointing_orders.py::test_the_usual_orders_are_no_error",
    ),
    Situation(
        "apply_activation_checkpointing, nested checkpoints, a checkpoint around the whole model",
        "yes",
        "A checkpoint around the whole model raises if the context of its forward pass is gone.",
        "stress/test_checkpointing_orders.py::"
        "test_one_pass_at_a_time_has_the_gradients_that_it_has_without",
    ),
    Situation(
        "torch.utils.checkpoint with use_reentrant=True",
        "partly",
        "Works if the routing weights require no gradient. Raises otherwise.",
        "routing/weights/test_checkpointing.py::test_a_reentrant_checkpoint_is_right_where_they_require_none",
    ),
    Situation(
        "Compiled blocks under torch.utils.checkpoint",
        "partly",
        "Losses on the model's output are right. A loss on inner features of an earlier pass, in "
        "the backward pass of a later one, gets wrong gradients without an error. Use "
        "routed_checkpoint for it.",
        "stress/test_checkpointing_orders.py::test_the_usual_orders_are_no_error",
    ),
    Situation(
        "A loss on inner features alone, without the model's output",
        "raises",
        "Use routed_checkpoint.",
        "stress/test_checkpointing_orders.py::"
        "test_losses_on_inner_features_need_a_routed_checkpoint",
    ),
    Situation(
        "Selective checkpointing",
        "yes",
        "Policies that save matrix products see those of the mixture.",
        "tuner/mixture_product/test_fast_path.py::test_selective_checkpointing",
    ),
]

GRAPHS = [
    Situation(
        "torch.compile of blocks, with fullgraph=True",
        "yes",
        "Changed weights and sizes marked as dynamic do not recompile it.",
        "test_compile.py::test_an_adapted_block_is_one_graph_for_all_weights_and_batch_sizes",
    ),
    Situation(
        "torch.compile of the whole model",
        "yes",
        "One graph break per call in routed mode.",
        "tuner/test_model.py::test_a_compiled_model_computes_and_learns_the_same",
    ),
    Situation(
        "torch.compile of the whole model, in uniform mode or under moe_lora.route",
        "yes",
        "One graph.",
        "test_compile.py::test_a_whole_model_is_one_graph_under_given_and_uniform_weights",
    ),
    Situation(
        "torch.export of a routed block",
        "raises",
        "The program would contain fixed weights. Merge, or export in uniform mode.",
        "stress/test_outside.py::test_exporting_a_routed_block_raises_instead_of_baking_weights_in",
    ),
    Situation(
        "torch.export of a uniform mixture",
        "yes",
        "",
        "tuner/mixture_product/test_fast_path.py::test_an_export_of_a_uniform_mixture",
    ),
    Situation(
        "torch.jit.trace",
        "yes",
        "The traced layers compute with the fixed or given weights of the trace.",
        "tuner/mixture_product/test_fast_path.py::test_a_jit_trace_computes_for_other_inputs",
    ),
    Situation(
        "torch.fx.symbolic_trace of a uniform mixture",
        "yes",
        "",
        "tuner/mixture_product/test_fast_path.py::test_a_symbolic_trace_of_a_uniform_mixture",
    ),
]

TRANSFORMS = [
    Situation(
        "torch.func (grad, vjp, jvp, vmap, jacrev, jacfwd, hessian), forward-mode AD, make_fx",
        "yes",
        "Layers use plain operations instead of the fused product.",
        "tuner/mixture_product/test_fast_path.py::test_a_transform_gives_what_it_gives_for_the_plain_formula",
    ),
    Situation(
        "torch.func.functional_call",
        "yes",
        "The router uses the given parameters as well.",
        "stress/test_outside.py::"
        "test_a_functional_call_is_routed_by_the_parameters_that_it_is_given",
    ),
    Situation(
        "Second derivatives",
        "yes",
        "",
        "tuner/mixture_product/test_fused.py::test_second_derivatives",
    ),
    Situation(
        "FakeTensorMode",
        "yes",
        "",
        "tuner/mixture_product/test_fast_path.py::test_fake_tensors_have_the_shapes_of_the_output",
    ),
    Situation(
        "FlopCounterMode",
        "yes",
        "It counts the products of the experts.",
        "tuner/mixture_product/test_fast_path.py::test_all_products_are_counted",
    ),
    Situation(
        "Hooks and patches of the base layers, global module hooks, function modes",
        "yes",
        "",
        "tuner/mixture_product/test_fast_path.py::test_hooks_and_patches_of_the_base_layer_are_called",
    ),
    Situation(
        "torch.inference_mode(), then training",
        "yes",
        "",
        "routing/test_given_masks.py::test_masks_from_inference_mode_are_usable_in_training",
    ),
]

PROCESSES = [
    Situation(
        "DistributedDataParallel, accelerate",
        "yes",
        "find_unused_parameters=True in phases without router calls.",
        "test_distributed.py::test_two_processes_train_like_one_through_phases_that_ask_no_router",
    ),
    Situation(
        "FSDP2",
        "yes",
        "schedules.set_trainable raises.",
        "test_distributed.py::test_what_two_processes_save_is_whole_and_one_loads_it",
    ),
    Situation(
        "DeepSpeed ZeRO stages 2 and 3",
        "partly",
        "See the guide to distributed training.",
        "test_distributed.py::test_deepspeed_trains_like_one_process",
    ),
    Situation(
        "DataParallel",
        "yes",
        "Every replica routes its share of the batch.",
        "stress/test_nested_calls.py::"
        "test_replicas_in_threads_compute_and_learn_what_the_model_does",
    ),
    Situation(
        "moe_lora.route, teach_experts, ablate_expert around DataParallel",
        "raises",
        "They do not reach its threads. Use DistributedDataParallel.",
        "stress/test_nested_calls.py::test_contexts_around_replicas_raise_in_their_threads",
    ),
]

MEMORY = [
    Situation(
        "CPU offloading with accelerate (enable_sequential_cpu_offload)",
        "yes",
        "Saving raises: the weights are on the meta device. Save first.",
        "routing/test_pipelines.py::test_offloaded_and_compiled_transformers_route_alike",
    ),
    Situation(
        "enable_group_offload",
        "partly",
        "Saving works from CPU memory, and raises for offload_to_disk_path.",
        "tuner/state_dict/test_adapter_tensors.py::test_group_offloading_in_memory_is_saved_and_to_disk_refused",
    ),
    Situation(
        "A model built on the meta device, then to_empty and loaded",
        "yes",
        "",
        "compatibility/test_switches.py::test_built_on_meta_made_empty_and_loaded",
    ),
    Situation(
        "channels_last with convolution experts",
        "yes",
        "",
        "compatibility/test_switches.py::test_convolutions_in_channels_last",
    ),
    Situation(
        "Quantized base models (torchao, bitsandbytes)",
        "partly",
        "See the guide to quantized base models.",
        "tuner/test_quantization.py::test_the_output_is_that_of_the_quantized_base_plus_the_mixture",
    ),
]

FILES = [
    Situation(
        "Saving while blocks are compiled, checkpointed or wrapped",
        "yes",
        "Keys are those of the bare model.",
        "tuner/state_dict/test_adapter_tensors.py::"
        "test_a_model_wrapped_after_it_is_adapted_is_saved_as_the_bare_one",
    ),
    Situation(
        "Exporting while other adapters or wrappers are around the layers",
        "yes",
        "",
        "export/test_other_adapters_and_wrappers.py::test_beside_another_adapter",
    ),
    Situation(
        "A mixture beside LoRA and LoHa, added, trained, saved and deleted in any order",
        "yes",
        "",
        "stress/test_life_cycles.py::test_plain_adapters_beside_a_mixture_in_any_order",
    ),
    Situation(
        "Two adapted parts in one module",
        "raises",
        "Call moe_lora's functions with each part.",
        "compatibility/test_switches.py::test_two_adapted_parts_are_refused",
    ),
]

SITUATIONS = {
    "Calls and threads": CALLS,
    "Activation checkpointing": CHECKPOINTING,
    "Compiling, exporting and tracing": GRAPHS,
    "Transforms, modes and hooks": TRANSFORMS,
    "Several devices and processes": PROCESSES,
    "Memory formats and offloading": MEMORY,
    "Saving and exporting": FILES,
}

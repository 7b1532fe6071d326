"""Train the tiny policy on given rollouts, so that any number of processes trains on the same.

`python tests/injected.py FOLDER 2 4` trains each of CASES with one, two and four gloo processes. It
writes what must be the same to FOLDER/N.pt and prints how far two and four are from one. The exit
code is 1 if a distance is 1e-6 or more.

It does the same for a run that passes by checkpoints from one process to two, to four and back to
one. It does so as well for a model that FSDP spreads over two processes. With `--unsloth` it trains
with the trainer that Unsloth generates, and leaves FSDP out.

The processes are forked after all imports.
"""

import os
import socket
import sys
import tempfile
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import gradients  # noqa: E402
import torch  # noqa: E402

GTPO = "gtpo.gtpo_training.UnslothGTPOTrainer"
ROWS = 24  # three groups of eight: two processes share the second, four share all of them
# The most tokens in each quarter of the rows, so that processes have completions of unequal width.
LONGEST = (7, 4, 6, 3)
CASES = {
    "adamw": {"optim": "adamw_torch", "max_grad_norm": 0.1, "weight_decay": 0.1},
    # The initial entropy is just below this threshold.
    "filtered": {"optim": "sgd", "learning_rate": 1.0, "threshold": 1.58},
    "accumulation": {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 3},
    "iterations": {"optim": "sgd", "learning_rate": 1.0, "num_iterations": 2, "max_steps": 4},
}


def drawn(rollout: int, tokenizer, rows: int = ROWS, seed: int = 0) -> list[list[int]]:
    """The token ids of a rollout's completions, the same in every process.

    They consist of two letters, so many stand at the same place. Some are cut off.
    """
    generator = torch.Generator().manual_seed(1000 * seed + rollout)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    completions = []
    for row in range(rows):
        length = longest = LONGEST[row * len(LONGEST) // rows]
        if row % (rows // len(LONGEST)):
            length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        ids = [letters[int(torch.randint(0, 2, (1,), generator=generator))] for _ in range(length)]
        completions.append([*ids[:-1], tokenizer.eos_token_id] if row % 3 and length > 1 else ids)
    return completions


def inject(trainer, rows: int = ROWS, drawn_so_far: int = 0) -> None:
    """Gives `trainer` the completions of `drawn` instead of sampled ones.

    A rollout has `rows` of them over all processes.
    """

    def generate(prompt_ids, *args, **kwargs):
        nonlocal drawn_so_far
        first = trainer.accelerator.process_index * len(prompt_ids)
        completions = drawn(drawn_so_far, trainer.processing_class, rows)[
            first : first + len(prompt_ids)
        ]
        drawn_so_far += 1
        return completions, None

    trainer._generate_single_turn = generate


def train(class_path: str, *, rows: int = ROWS, threshold: float = 0.7, **options) -> dict:
    """What must be the same for any number of processes.

    It holds the prompts and lambda of each rollout, <H>_ini, gradients and LoRA weights.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    micro_batches = options.get(
        "steps_per_generation", options.get("gradient_accumulation_steps", 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = gradients.make_trainer(
            class_path,
            folder,
            **{
                "num_generations": 8,
                "per_device_train_batch_size": rows // processes // micro_batches,
                "gradient_accumulation_steps": 1,
                "max_steps": 3,
                **options,
            },
        )
        from gtpo import gtpo_training
        from gtpo.runs import trainers

        gtpo_training.ENT_THRESHOLD = threshold
        inject(trainer, rows)
        seen = gradients.record_steps(trainer)
        steps = []
        trainer.add_callback(_EachStep(trainer.model, steps))
        trainer.train()
    return {
        "processes": trainer.accelerator.num_processes,
        "widths": _gathered(trainer, [r["completion_ids"].shape[1] for r in seen["rollouts"]]),
        "prompts": [
            _rows(trainer, r["prompt_ids"] * r["prompt_mask"], r["prompt_mask"])
            for r in seen["rollouts"]
        ],
        "token_weights": [
            _rows(trainer, r["token_weights"], r["completion_mask"]) for r in seen["rollouts"]
        ],
        "signs": [_gathered(trainer, r["advantages"].sign().tolist()) for r in seen["rollouts"]],
        "initial_entropy": trainer.initial_entropy,
        "gradients": list(map(_whole, seen["gradients"])),
        "lora": list(map(_whole, steps)),
        "saved": trainers.full_state_dict(trainer),
        "filtered": [line["gtpo/frac_filtered"] for line in seen["logs"][:-1]],
        "lengths": [
            _gathered(trainer, r["completion_mask"].sum(1).tolist()) for r in seen["rollouts"]
        ],
    }


def _whole(tensors: dict) -> dict:
    """The whole tensors of what FSDP spreads over the processes."""
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()
    }


def _EachStep(model, steps: list):
    from transformers import TrainerCallback

    class EachStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(
                {
                    name: p.detach().clone()
                    for name, p in model.named_parameters()
                    if p.requires_grad
                }
            )

    return EachStep()


def _rows(trainer, values, mask) -> list[list[float]]:
    """The real entries of each row of all processes, in the order of the rollout."""
    return _gathered(
        trainer, [row[real.bool()].tolist() for row, real in zip(values, mask, strict=True)]
    )


def _gathered(trainer, values: list) -> list:
    from accelerate.utils import gather_object

    return gather_object(values) if trainer.accelerator.num_processes > 1 else values


def largest_difference(one: dict, other: dict) -> float:
    """The largest difference between two dictionaries of tensors."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def train_on(folder: Path, checkpoint, last: int) -> dict:
    """LoRA weights and <H>_ini of a run that goes on from `checkpoint` and ends with step `last`.

    None as checkpoint starts a new run. The whole run has 5 steps.
    """
    from gtpo.runs.exact_resume import ExactResume

    folder.mkdir(exist_ok=True)
    trainer = gradients.make_trainer(
        GTPO,
        str(folder),
        **{
            "num_generations": 8,
            "per_device_train_batch_size": ROWS // int(os.environ["WORLD_SIZE"]),
            "gradient_accumulation_steps": 1,
            "max_steps": 5,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            "weight_decay": 0.1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    )
    inject(trainer, drawn_so_far=checkpoint.step if checkpoint else 0)
    trainer.add_callback(_StopAfter(last))
    ExactResume(
        trainer,
        folder,
        {"recipe": {}, "processes": trainer.accelerator.num_processes},
        checkpoint=checkpoint,
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
    return {
        "lora": {
            name: p.detach().clone()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        },
        "initial_entropy": trainer.initial_entropy,
    }


def _StopAfter(step: int):
    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return StopAfter()


def pass_on(folder: Path, counts: list[int]) -> None:
    """Trains in one process, and again by passing the run on from its second checkpoint.

    The run is passed on to each of `counts` processes in turn, for one step each.
    """
    from gtpo.runs import checkpoints

    passed = folder / "passed"
    passed.mkdir()
    fork(1, lambda: torch.save(train_on(passed / "straight", None, 5), passed / "straight.pt"))
    before = passed / "straight/checkpoint-2"
    for step, processes in enumerate(counts, 3):

        def leg(step=step, before=before):
            result = train_on(passed / f"by{step}", checkpoints.read(before), step)
            if os.environ["RANK"] == "0":
                torch.save(result, passed / "passed_on.pt")

        fork(processes, leg)
        before = passed / f"by{step}/checkpoint-{step}"


def fork(processes: int, work) -> None:
    """Calls `work` in as many gloo processes; raises RuntimeError if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free.getsockname()[1]),
            WORLD_SIZE=str(processes),
        )
    children = [os.fork() or _child(rank, processes, work) for rank in range(processes)]
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise RuntimeError(f"not all of {processes} processes succeeded")


def _child(rank: int, processes: int, work):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
    try:
        work()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _train_cases(file: Path, names=tuple(CASES)) -> None:
    figures = {name: train(GTPO, **CASES[name]) for name in names}
    if os.environ["RANK"] == "0":
        torch.save(figures, file)


def _train_spread(file: Path) -> None:
    """Trains with FSDP, as recipes/accelerate/fsdp.yaml sets it.

    accelerate 1.15.0 allows FSDP on GPUs alone, so its state is made to look like that of GPUs.
    """
    from accelerate import state
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ.update(launched(os.path.join(ROOT, "recipes/accelerate/fsdp.yaml"))[1])
    state.PartialState._prepare_backend = lambda *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_GPU,
    )
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    _train_cases(file, ("adamw", "filtered"))


def launched(config: str) -> tuple:
    """What `accelerate launch` makes of a file: its arguments, and the environment it sets."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", config, "train_model.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    prefixes = ("ACCELERATE_", "FSDP_")
    return arguments, {k: v for k, v in environment.items() if k.startswith(prefixes)}


def distances(one: dict, several: dict) -> dict[str, float]:
    """The largest difference of each figure between one process and several."""
    return {
        "lambda": float(
            one["token_weights"] != several["token_weights"] or one["prompts"] != several["prompts"]
        ),
        "initial entropy": abs(one["initial_entropy"] - several["initial_entropy"]),
        "gradient": max(map(largest_difference, one["gradients"], several["gradients"])),
        "LoRA": max(map(largest_difference, one["lora"], several["lora"])),
    }


def main(folder: Path, counts: list[int]) -> int:
    """Trains everything, prints the distances, and returns the exit code."""
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # a forked child cannot use more threads
    import gtpo.gtpo_training  # noqa: F401  (before the fork, with all that it imports)

    for count in [1, *counts]:
        fork(count, lambda count=count: _train_cases(folder / f"{count}.pt"))
    pass_on(folder, [*counts, 1])
    spread = "unsloth" not in sys.modules  # Unsloth does not work with FSDP
    if spread:
        fork(2, lambda: _train_spread(folder / "fsdp.pt"))
    one, *others = (torch.load(folder / f"{count}.pt") for count in [1, *counts])
    rows = [
        (case, f"{several[case]['processes']} processes", distances(one[case], several[case]))
        for case in CASES
        for several in others
    ]
    straight, passed_on = (
        torch.load(folder / f"passed/{name}.pt") for name in ("straight", "passed_on")
    )
    rows.append(
        (
            "passed on",
            f"1, {', '.join(map(str, counts))}, 1 processes",
            {
                "initial entropy": abs(straight["initial_entropy"] - passed_on["initial_entropy"]),
                "LoRA": largest_difference(straight["lora"], passed_on["lora"]),
            },
        )
    )
    if spread:
        rows += [
            (case, "FSDP, 2 processes", distances(one[case], errors))
            for case, errors in torch.load(folder / "fsdp.pt").items()
        ]
    for case, processes, errors in rows:
        print(
            f"{case:13} {processes}: "
            + ", ".join(f"{name} {far:.1e}" for name, far in errors.items())
        )
    return int(max(far for *_, errors in rows for far in errors.values()) >= 1e-6)


if __name__ == "__main__":
    if "--unsloth" in sys.argv:
        sys.argv.remove("--unsloth")
        gradients.patch_unsloth()
    sys.exit(main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]]))

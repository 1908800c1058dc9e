"""The one file that knows DeepSpeed: a plain module becomes a module that trains over all ranks at any ZeRO stage.

    rank = init_rank()
    engine = Engine(model, optim=cfg.optim, parallel=cfg.parallel, rank=rank, global_batch=64)
    ema = EMA(engine, cfg.optim.ema_decay)
    for step in range(steps):
        for micro in range(engine.accumulation):          # exactly so many passes a step
            loss = engine(inputs).mean()                  # mean over this rank's micro-batch
            engine.backward(loss)                         # scaled by 1 / accumulation inside
        norm = engine.step(learning_rate(step, cfg.optim, steps))
        ema.update(step)
    with engine.swapped(ema):                             # eval mode, no gradients, averaged weights
        prediction = engine(inputs)
    engine.destroy()

Every rank must call everything here, forward passes included, equally often and in the same order: at stage 3 the
weights are gathered in the forward pass.

The fp32 master weights and Adam's moments lie in flat buffers, split over the ranks in another way at each stage.
`Engine.fragments` gives them one face: pieces of the flattened full parameter. Averaging (`ema`) and checkpoints
(`checkpoint`) are built on it alone.

DeepSpeed's private fields are read in this file only, and were checked against 0.19.8; so that version is pinned.
"""

import contextlib
import functools
import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_lite.config import Offload, OptimConfig, ParallelConfig, Precision
from sora_lite.errors import UserError
from sora_lite.parallel.apply import blocks_of
from sora_lite.parallel.env import Rank
from sora_lite.training import jit_build
from sora_lite.training.fragment import Fragment
from sora_lite.training.optim import parameter_groups

if TYPE_CHECKING:
    from sora_lite.training.ema import EMA

# Largest number of elements that are reduced or gathered in one go. DeepSpeed allocates a buffer of this size.
BUCKET_ELEMENTS = 100_000_000


@functools.cache
def _deepspeed(device_type: str) -> ModuleType:
    """DeepSpeed, imported at first use (seconds) and kept from compiling anything."""
    if device_type == "cpu":
        # Read when DeepSpeed is imported; without it DeepSpeed guesses, and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPU, DeepSpeed would build a shared-memory all-reduce by g++ at start: a minute, under a lock file that a
    # killed process leaves behind and every later start then waits for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's use of torch's older names; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


class Engine:
    """A module under DeepSpeed, with AdamW. Several engines may live in one process, side by side.

    Args:
        module: The plain module, with the same weights on every rank. It is moved to the rank's device and, with bf16,
            its parameters are cast; buffers keep their type. Inputs must come in the type that the forward expects.
        optim: AdamW's betas, eps, weight decay, and clipping. The learning rate is given to each `step`.
        parallel: ZeRO stage, precision, accumulation (passes per step), and where the optimizer's state lies.
        rank: This process, from `init_rank`.
        global_batch: Samples in one optimizer step, over all ranks and passes.

    Raises:
        UserError: the global batch cannot be divided, precision or offload and stage do not go together, or what
            offload needs cannot be compiled.
    """

    def __init__(
        self, module: nn.Module, *, optim: OptimConfig, parallel: ParallelConfig, rank: Rank, global_batch: int
    ) -> None:
        if parallel.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"parallel.zero_stage={parallel.zero_stage} does not exist: use 0, 1, 2 or 3")
        bf16 = parallel.precision is Precision.bf16
        if bf16 and parallel.zero_stage == 0:
            raise UserError(
                "parallel.precision=bf16 needs master weights in fp32: set parallel.zero_stage to 1, 2 or 3"
            )
        if parallel.offload is Offload.cpu and parallel.zero_stage == 0:
            raise UserError("parallel.offload=cpu takes what ZeRO shards: set parallel.zero_stage to 1, 2 or 3")
        share = rank.world_size * parallel.accumulation
        if global_batch < 1 or global_batch % share:
            raise UserError(
                f"a global batch of {global_batch} cannot be divided by {rank.world_size} ranks x "
                f"parallel.accumulation={parallel.accumulation}: choose ranks and accumulation so that it can"
            )
        self.rank = rank
        self.stage = parallel.zero_stage
        self.accumulation = parallel.accumulation
        self.micro_batch = global_batch // share
        """Samples per rank and pass."""
        self.clip = optim.clip
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        """Full shape of each trainable parameter, by name, in the module's order."""
        if not self.shapes:
            raise ValueError(f"{type(module).__name__} has no trainable parameter")
        self._passes = 0
        self._limit = math.inf

        module.to(rank.device)
        exact = {n: p.detach().clone() for n, p in module.named_parameters() if n in self.shapes} if bf16 else {}
        ds = _deepspeed(rank.device.type)
        adamw = _adamw(parameter_groups(module, optim.weight_decay), optim, parallel.offload)
        if parallel.compile and parallel.zero_stage == 3:
            # Weights are gathered for a compiled block as a whole: hooks within it would break its graph.
            for block in blocks_of(module):
                ds.utils.set_z3_leaf_module(block, True)
        numel = sum(math.prod(shape) for shape in self.shapes.values())
        settings = _settings(optim, parallel, rank, self.micro_batch, numel)
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that no setting turns off
            ds.init_distributed(dist_backend=rank.backend, verbose=False)
            self._ds: Any = ds.initialize(model=module, optimizer=adamw, config=settings)[0]
        self._optimizer: Any = self._ds.optimizer
        self._adamw: torch.optim.Optimizer = self._ds.basic_optimizer
        self._adamw.step = self._within_limit(self._adamw.step)
        self._create_moments()
        if bf16:
            # DeepSpeed made the masters from weights that were already rounded to bf16.
            for fragment in self.fragments():
                whole = exact[fragment.name].flatten()
                fragment.master.copy_(whole[fragment.offset : fragment.offset + fragment.master.numel()])

    # ------------------------------------------------------------------------------------------------ a step

    @property
    def module(self) -> nn.Module:
        """The module that was given. At stage 3 its parameters are empty outside its forward pass."""
        return self._ds.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._ds(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`: a scalar, the mean over this rank's micro-batch.

        A loss that is not finite makes the gradients so, whatever it was made of: `step` will leave the update out on
        all ranks. Over ranks and passes the gradients are averaged, so that equal micro-batches give the gradient of
        the mean over the global batch.

        Raises:
            RuntimeError: called more often than `accumulation` times before a `step`.
        """
        if self._passes == self.accumulation:
            raise RuntimeError(f"backward was called more than accumulation={self.accumulation} times before step")
        self._ds.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        self._passes += 1
        if self._passes < self.accumulation:
            self._ds.step()  # does nothing but count the pass

    def step(self, lr: float, limit: float = math.inf) -> float:
        """Clip the gradients, update the weights by AdamW at learning rate `lr`, and clear the gradients.

        Args:
            lr: Learning rate of this update.
            limit: Norm above which the update is left out; the same on every rank.

        Returns:
            The global norm of the gradients before clipping. Above `limit` or not finite means that the update was
            left out, on all ranks alike: weights and moments are as before.

        Raises:
            RuntimeError: not exactly `accumulation` backward passes before it.
        """
        if self._passes != self.accumulation:
            raise RuntimeError(f"step needs {self.accumulation} backward passes before it, not {self._passes}")
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._limit = limit
        if self.stage == 0:
            norm = self._clip_replicated()
            self._ds.step()
        else:
            self._ds.step()
            norm = float(self._ds.get_global_grad_norm())
        self._passes = 0
        return norm

    def _clip_replicated(self) -> float:
        """Clip at stage 0, where DeepSpeed tells no norm and would let a NaN through into the weights."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip if self.clip > 0 else math.inf))
        if not (math.isfinite(norm) and norm <= self._limit):
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over parameters without a gradient
        return norm

    def _within_limit(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """AdamW's `step`, left out above the limit. At stages 1 to 3 DeepSpeed calls it, once it knows the norm."""

        @functools.wraps(update)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.stage == 0 or self._optimizer._global_grad_norm <= self._limit:
                return update(*args, **kwargs)
            return None

        return step

    # ------------------------------------------------------------------------------------------------ its state

    def fragments(self) -> list[Fragment]:
        """The pieces that this rank holds, in the module's order, as views fetched anew (the buffers may have moved).

        At stage 0 every rank holds everything; at stages 1 to 3 the fragments of all ranks tile each parameter exactly.
        """
        found = []
        for name, parameter in self.module.named_parameters():
            if name not in self.shapes:
                continue
            flat, start, count, offset = self._locate(name, parameter)
            if count <= 0:
                continue
            state = self._adamw.state[flat]
            master, exp_avg, exp_avg_sq = (
                whole.detach().view(-1).narrow(0, start, count)
                for whole in (flat, state["exp_avg"], state["exp_avg_sq"])
            )
            found.append(
                Fragment(
                    name=name,
                    shape=self.shapes[name],
                    offset=offset,
                    master=master,
                    exp_avg=exp_avg,
                    exp_avg_sq=exp_avg_sq,
                )
            )
        return found

    def _locate(self, name: str, parameter: Any) -> tuple[Tensor, int, int, int]:
        """Where a parameter's master lies: flat buffer, start in it, count of elements, offset in the parameter."""
        if self.stage == 0:
            return parameter, 0, parameter.numel(), 0
        if self.stage == 3:
            group, start, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            offset = self.rank.rank * padded
            return self._masters()[group], start, min(padded, math.prod(self.shapes[name]) - offset), offset
        mapping = parameter._hp_mapping
        if mapping is None:  # lies wholly on other ranks
            return self._masters()[0], 0, 0, 0
        flat = self._masters()[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return flat, address.start, address.numel, mapping.lp_fragment_address.start

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW updates on this rank."""
        if self.stage == 0:
            return [p for group in self._adamw.param_groups for p in group["params"]]
        if self.stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        if hasattr(self._optimizer, "fp32_groups_flat_partition"):  # bf16 at stage 1 has an optimizer of its own
            return self._optimizer.fp32_groups_flat_partition
        return self._optimizer.single_partition_of_fp32_groups

    def _create_moments(self) -> None:
        """Adam's state at step 0, as AdamW itself would make it in the first step, so that it can be loaded into."""
        in_tensors = isinstance(self._adamw, torch.optim.AdamW)
        for flat in self._masters():
            self._adamw.state[flat] = {
                # CPUAdam counts in plain numbers.
                "step": torch.zeros((), dtype=torch.float32, device=flat.device) if in_tensors else 0,
                "exp_avg": torch.zeros_like(flat, memory_format=torch.preserve_format).detach(),
                "exp_avg_sq": torch.zeros_like(flat, memory_format=torch.preserve_format).detach(),
            }

    @property
    def step_count(self) -> int:
        """Updates made so far, skipped steps left out; AdamW corrects its bias by it. Setting it is part of loading."""
        return int(self._adamw.state[self._masters()[0]]["step"])

    @step_count.setter
    def step_count(self, count: int) -> None:
        for flat in self._masters():
            state = self._adamw.state[flat]
            state["step"] = state["step"] * 0 + count  # a tensor or a number, as it was

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the module's weights those of the masters, on all ranks. A collective."""
        optimizer = self._optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:  # small ones, which stay gathered between steps
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers, by name, as they are: what a state dict holds beside parameters."""
        state = self.module.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Copy `values`, named as in `buffers`, into the module."""
        for name, buffer in self.buffers().items():
            buffer.copy_(values[name])

    def frozen(self) -> dict[str, Tensor]:
        """The module's frozen parameters, by name, as they are: at stage 3 this rank's part of each, flat.

        They are no part of the state that training makes: whoever froze them has them.
        """
        frozen: dict[str, Any] = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        return {name: (p.ds_tensor if self.stage == 3 else p).detach() for name, p in frozen.items()}

    def replicated(self) -> dict[str, Tensor]:
        """Tensors of the module that must be the same on every rank between steps: at stage 0 the trained weights."""
        return {name: p for name, p in self.module.named_parameters() if self.stage == 0 and name in self.shapes}

    def full_state(self, ema: "EMA | None" = None) -> dict[str, Tensor]:
        """The state dict without frozen parameters, on the CPU: masters or the average `ema` in fp32, and buffers.

        Every rank gets it. It needs room for all of it. A collective.
        """
        fragments = self.fragments()
        held = {f.name: (f.offset, piece) for f, piece in zip(fragments, self._pieces(ema, fragments), strict=True)}
        full = {}
        for name, shape in self.shapes.items():
            whole = torch.zeros(math.prod(shape), device=self.rank.device)
            if name in held:
                offset, piece = held[name]
                whole[offset : offset + piece.numel()] = piece
            if self.stage > 0 and self.rank.world_size > 1:
                dist.all_reduce(whole)  # all but one rank add zero: exact
            full[name] = whole.view(shape).cpu()
        full.update({name: tensor.cpu().clone() for name, tensor in self.buffers().items()})
        return full

    @staticmethod
    def _pieces(ema: "EMA | None", fragments: list[Fragment]) -> list[Tensor]:
        return [f.master for f in fragments] if ema is None else ema.pieces(fragments)

    @contextlib.contextmanager
    def swapped(self, ema: "EMA | None") -> Iterator[None]:
        """Within it the module has the averaged weights, is in eval mode, and no gradients are recorded.

        After it, weights and mode are exactly as before. With `ema` None the weights stay the trained ones. A
        collective; not between the backward passes of one step.
        """
        if self._passes:
            raise RuntimeError("swapped cannot stand between backward and step")
        was_training = self.module.training
        self.module.eval()
        trained = [] if ema is None else [f.master.clone() for f in self.fragments()]
        try:
            if ema is not None:
                self._write_masters(ema.pieces(self.fragments()))
            with torch.no_grad():
                yield
        finally:
            if ema is not None:
                self._write_masters(trained)
            self.module.train(was_training)

    @torch.no_grad()
    def _write_masters(self, pieces: list[Tensor]) -> None:
        # By way of the masters, which is one copy of what this rank holds and works alike at every stage.
        for fragment, piece in zip(self.fragments(), pieces, strict=True):
            fragment.master.copy_(piece)
        self.refresh_weights()

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the module. The engine is of no use afterwards."""
        self._ds.destroy()


def release_groups() -> None:
    """Let go of the process groups, after they were destroyed. DeepSpeed keeps them, and their threads, for ever.

    Threads that outlive the interpreter were seen to abort a process that had trained to its end.
    """
    if "deepspeed" in sys.modules:  # else no engine was made
        sys.modules["deepspeed"].utils.groups._release_process_group_references()


def _adamw(groups: list[dict], optim: OptimConfig, offload: Offload) -> torch.optim.Optimizer:
    """AdamW for groups of parameters: torch's own, or DeepSpeed's for state in the host's memory."""
    common: dict[str, Any] = {"lr": optim.lr, "betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps}
    if offload is Offload.none:
        # Fused is several times faster on CPU; and an optimizer that is passed in ready-made is not compiled.
        return torch.optim.AdamW(groups, fused=True, **common)
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        jit_build.build(CPUAdamBuilder.NAME, lambda: CPUAdamBuilder().load(), functools.partial(print, file=sys.stderr))
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"parallel.offload=cpu: DeepSpeed's CPUAdam could not be compiled ({error}): install g++ and ninja, or set "
            "parallel.offload=none"
        ) from error
    return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)


def _settings(optim: OptimConfig, parallel: ParallelConfig, rank: Rank, micro_batch: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration. What is not named here keeps DeepSpeed's default."""
    bucket = min(BUCKET_ELEMENTS, -(-numel // 1024) * 1024)  # must be even, for alignment
    settings: dict[str, Any] = {
        "train_batch_size": micro_batch * parallel.accumulation * rank.world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": parallel.accumulation,
        # Stage 0 is clipped by the engine itself.
        "gradient_clipping": optim.clip if parallel.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": rank.device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if parallel.offload is Offload.cpu:
        offload = {"device": "cpu", "pin_memory": rank.device.type == "cuda"}
        settings["zero_optimization"]["offload_optimizer"] = offload
    if parallel.precision is Precision.bf16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Sums over passes and ranks in fp32, whatever the arithmetic of the model.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings

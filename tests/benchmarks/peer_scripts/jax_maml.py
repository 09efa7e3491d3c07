"""The plain JAX recipe: jit of vmap over tasks of value_and_grad, and Adam by optax.

Convolutional networks go task by task through the same jitted value_and_grad: on a CPU, vmap makes of their
convolutions grouped ones, and lax.map puts them into a loop, and XLA's kernels for both are several times slower. XLA
makes as many threads as there are cores that the process may use: it is kept to `--threads` of them.
"""

import os
import time

BEGAN = time.time()
from harness import arguments, measure, report  # noqa: E402 - imports torch, which JAX does without

NOT_OWN_S = time.time() - BEGAN

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax_networks import apply  # noqa: E402
from workloads import META_LR, Workload, read_weights  # noqa: E402


def main() -> None:
    args = arguments()
    args.started += NOT_OWN_S
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    theta = {name: jnp.asarray(value) for name, value in read_weights(args.tasks).items()}
    optimizer = optax.adam(META_LR)
    state, tasks = optimizer.init(theta), read_tasks(args.tasks)
    meta_step = (batched if args.workload.regression else task_by_task)(args.workload, optimizer)

    def step(first: bool = False) -> tuple[float, float | None]:
        nonlocal theta, state
        theta, state, loss, norm = meta_step(theta, state, tasks)
        return float(loss), float(norm) if first else None

    report(args, measure(args, lambda: step(first=True), step), "jax", "jaxlib", "optax")


def read_tasks(path: str) -> list[jax.Array]:
    """[support_x [T, n, ...], support_y, query_x, query_y], channels of images last."""
    with np.load(path) as arrays:
        parts = [jnp.asarray(arrays[name]) for name in ("support_x", "support_y", "query_x", "query_y")]
    return [jnp.moveaxis(part, 2, -1) if part.ndim == 5 else part for part in parts]


def task_gradient(workload: Workload):
    """(theta, support_x, support_y, query_x, query_y) -> the query loss after adaptation and its gradient."""

    def loss_at(weights, x, y):
        outputs = apply(workload.network, weights, x)
        if workload.regression:
            return ((outputs - y) ** 2).mean()
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    def task_loss(theta, support_x, support_y, query_x, query_y):
        fast = theta
        for _ in range(workload.inner_steps):
            gradient = jax.grad(loss_at)(fast, support_x, support_y)
            if workload.first_order:
                gradient = jax.lax.stop_gradient(gradient)
            fast = jax.tree.map(lambda w, g: w - workload.inner_lr * g, fast, gradient)
        return loss_at(fast, query_x, query_y)

    return jax.value_and_grad(task_loss)


def batched(workload: Workload, optimizer: optax.GradientTransformation):
    """A meta-step as one jitted function."""
    gradients = jax.vmap(task_gradient(workload), in_axes=(None, 0, 0, 0, 0))

    @jax.jit
    def meta_step(theta, state, tasks):
        losses, rows = gradients(theta, *tasks)
        return adam(optimizer, theta, state, losses.sum(), jax.tree.map(lambda row: row.sum(0), rows), len(losses))

    return meta_step


def task_by_task(workload: Workload, optimizer: optax.GradientTransformation):
    """A meta-step of jitted functions: one call a task, and one of Adam."""
    gradient, num_tasks = task_gradient(workload), workload.meta_batch

    @jax.jit
    def add(theta, total, summed, tasks, number):
        loss, row = gradient(theta, *(part[number] for part in tasks))
        return total + loss, jax.tree.map(jnp.add, summed, row)

    @jax.jit
    def finish(theta, state, total, summed):
        return adam(optimizer, theta, state, total, summed, num_tasks)

    def meta_step(theta, state, tasks):
        total, summed = jnp.zeros(()), jax.tree.map(jnp.zeros_like, theta)
        for number in range(num_tasks):
            total, summed = add(theta, total, summed, tasks, number)
        return finish(theta, state, total, summed)

    return meta_step


def adam(optimizer, theta, state, total, summed, num_tasks):
    """Theta and Adam's state after the step, the mean loss, and the norm of the mean gradient."""
    mean = jax.tree.map(lambda g: g / num_tasks, summed)
    updates, state = optimizer.update(mean, state)
    return optax.apply_updates(theta, updates), state, total / num_tasks, optax.global_norm(mean)


if __name__ == "__main__":
    main()

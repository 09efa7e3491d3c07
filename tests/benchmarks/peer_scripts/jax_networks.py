"""The networks of `networks` in JAX, as functions of weights by the same names; images are [n, h, w, channels]."""

import jax
import jax.numpy as jnp

Weights = dict[str, jax.Array]


def apply(network: str, weights: Weights, x: jax.Array) -> jax.Array:
    """Outputs of the network that a workload names."""
    body = {"mlp-40-40": hidden_layers, "resnet12": residual_blocks}.get(network, blocks)
    x = body(weights, x) if network != "conv4-32-pooled" else blocks(weights, x, pool=True)
    return x @ weights["head.weight"].T + weights["head.bias"]


def hidden_layers(weights: Weights, x: jax.Array) -> jax.Array:
    for layer in ("body.0", "body.2"):
        x = jax.nn.relu(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return x


def blocks(weights: Weights, x: jax.Array, pool: bool = False) -> jax.Array:
    for name in (f"body.{block}" for block in range(4)):
        x = conv(weights[f"{name}.conv.weight"], x, stride=1 if pool else 2) + weights[f"{name}.conv.bias"]
        x = jax.nn.relu(batch_norm(weights, f"{name}.norm", x))
        x = max_pool(x) if pool else x
    return flat(x) if pool else x.mean((1, 2))


def residual_blocks(weights: Weights, x: jax.Array) -> jax.Array:
    for name in (f"body.{block}" for block in range(4)):
        kept = batch_norm(weights, f"{name}.norms.3", conv(weights[f"{name}.shortcut.weight"], x, padding=0))
        for place in range(3):
            x = batch_norm(weights, f"{name}.norms.{place}", conv(weights[f"{name}.convs.{place}.weight"], x))
            x = jax.nn.leaky_relu(x, 0.1) if place < 2 else x
        x = max_pool(jax.nn.leaky_relu(x + kept, 0.1))
    return x.mean((1, 2))


def conv(weight: jax.Array, x: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
    """`weight` is torch's, [channels out, channels in, h, w]."""
    around, order = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, weight.transpose(2, 3, 1, 0), (stride, stride), around, dimension_numbers=order
    )


def batch_norm(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def max_pool(x: jax.Array) -> jax.Array:
    """2x2; an odd last row or column is left out."""
    n, h, w, channels = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, channels).max((2, 4))


def flat(x: jax.Array) -> jax.Array:
    """In torch's order, channels first."""
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)

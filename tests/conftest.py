"""Eight CPU devices, and jax's strict modes, before anything imports jax. With JAX_PLATFORMS=cuda,cpu or tpu,cpu, what needs one
device is tested there."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

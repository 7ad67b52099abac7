"""benchmarks/: figures that are read from programs, counted by hand here; the functions that
`formulations` replaces; and the command line."""

import jax
import jax.numpy as jnp
import pytest

import jaxbn
from benchmarks import program_size
from benchmarks.__main__ import SUBCOMMANDS, parser_for
from benchmarks.chips import hlo
from benchmarks.commands import formulations

pytestmark = pytest.mark.optimized

# As for an H100: a sample of every eighth row, beside a whole array; two sums in one kernel; and one that gets p twice.
GPU = """\
%sample (param_0: f32[128], param_1: bf16[64,128]) -> f32[128] {
  %param_1 = bf16[64,128]{1,0} parameter(1)
  %slice.1 = bf16[8,128]{1,0} slice(%param_1), slice={[0:64:8], [0:128:1]}
  %convert.1 = f32[8,128]{1,0} convert(%slice.1)
  %constant.1 = f32[] constant(0)
  %reduce.1 = f32[128]{0} reduce(%convert.1, %constant.1), dimensions={0}, to_apply=%add
  %param_0 = f32[128]{0} parameter(0)
  ROOT %multiply.1 = f32[128]{0} multiply(%reduce.1, %param_0)
}

%sums (param_0.1: f32[128], param_1.1: bf16[64,128]) -> (f32[128], f32[128]) {
  %param_1.1 = bf16[64,128]{1,0} parameter(1)
  %slice.2 = bf16[32,128]{1,0} slice(%param_1.1), slice={[0:32], [0:128]}
  %convert.2 = f32[64,128]{1,0} convert(%param_1.1)
  %param_0.1 = f32[128]{0} parameter(0)
  ROOT %tuple.1 = (f32[128]{0}, f32[128]{0}) tuple(%reduce.2, %reduce.3)
}

ENTRY %main.4 (x.1: bf16[64,128], p.1: f32[128]) -> (bf16[64,128], f32[128]) {
  %p.1 = f32[128]{0} parameter(1), sharding={replicated}, frontend_attributes={xla.sdy.sharding="#sdy<@mesh, [{}]>"}
  %x.1 = bf16[64,128]{1,0} parameter(0), metadata={op_name="x"}
  %sample_fusion = f32[128]{0} fusion(%p.1, %x.1), kind=kInput, calls=%sample, metadata={op_name="jit(f)/mul"}
  %sums_fusion = (f32[128]{0}, f32[128]{0}) fusion(%sample_fusion, /*index=1*/%x.1), kind=kInput, calls=%sums
  %get-tuple-element = f32[128]{0} get-tuple-element(%sums_fusion), index=0
  %get-tuple-element.1 = f32[128]{0} get-tuple-element(%sums_fusion), index=1
  %bitcast.1 = f32[1,128]{1,0} bitcast(%get-tuple-element.1)
  %y = bf16[64,128]{1,0} custom-call(%x.1, %p.1, %bitcast.1, %p.1), custom_call_target="affine"
  ROOT %tuple.2 = (bf16[64,128]{1,0}, f32[128]{0}) tuple(%y, %get-tuple-element)
}
"""
# As for one of four v5e devices: layouts with tiles and memory spaces, collectives of one array and of a tuple, and
# the same as two operations.
TPU = """\
%fused_computation.4 (param_0.21: bf16[8,128]) -> f32[128] {
  %param_0.21 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %reduce.5 = f32[128]{0:T(128)S(1)} reduce(%param_0.21, %constant.2), dimensions={0}, to_apply=%region_0.0
}

ENTRY %main.0_spmd (param: bf16[64,128], param.1: f32[128]) -> (bf16[64,128], f32[128]) {
  %param = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}
  %copy-start = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%param)
  %slice.3 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} slice(%param), slice={[0:57:8], [0:128:1]}
  %sample = f32[128]{0:T(128)S(1)} fusion(%slice.3), calls=%fused_computation.4, \
backend_config={"window_config":{"output_window_bounds":["1","1"],"estimated_cycles":"1828"}}
  %all-reduce = f32[128]{0:T(128)S(1)} all-reduce(%sample), channel_id=1, replica_groups=mesh['d'=4] {'d'}
  %fusion = (f32[128]{0:T(128)S(1)}, f32[128]{0:T(128)S(1)}) fusion(%param, %all-reduce), kind=kLoop, calls=%sums, \
backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"1930","iteration_bounds":["1","1"]}}
  %get-tuple-element.1 = f32[128]{0:T(128)S(1)} get-tuple-element(%fusion), index=1
  %get-tuple-element = f32[128]{0:T(128)S(1)} get-tuple-element(%fusion), index=0
  %all-reduce.3 = (f32[128]{0:T(128)}, f32[128]{0:T(128)}) all-reduce(%get-tuple-element.1, %get-tuple-element)
  %all-gather-start = (f32[128]{0:T(128)}, f32[512]{0:T(512)}) all-gather-start(%all-reduce), dimensions={0}
  %all-gather-done = f32[512]{0:T(512)} all-gather-done(%all-gather-start)
  %copy-done = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %conv = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%copy-done, %sums), backend_config={"estimated_cycles":"1000000"}
  ROOT %tuple.2 = (bf16[64,128]{1,0:T(8,128)(2,1)}, f32[512]{0:T(512)}) tuple(%conv, %all-gather-done)
}
"""
# What JAX hands to the compiler: a branch, a sum, and a function that is called twice.
LOWERED = """\
module @jit_f attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%arg0: tensor<4xf32> loc("x")) -> (tensor<f32> {jax.result_info = "result"}) {
    %c = stablehlo.constant dense<0> : tensor<i32>
    %cst = stablehlo.constant dense<0.000000e+00> : tensor<f32>
    %0 = "stablehlo.case"(%c) ({
      stablehlo.return %arg0 : tensor<4xf32>
    }, {
      %3 = func.call @twice(%arg0) : (tensor<4xf32>) -> tensor<4xf32>
      stablehlo.return %3 : tensor<4xf32>
    }) : (tensor<i32>) -> tensor<4xf32>
    %1 = call @twice(%0) : (tensor<4xf32>) -> tensor<4xf32>
    %2 = stablehlo.reduce(%1 init: %cst) applies stablehlo.add across dimensions = [0]
    return %2 : tensor<f32>
  }
  func.func private @twice(%arg0: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
    return %0 : tensor<4xf32>
  }
}
"""


def test_gpu_program():
    x, row = 64 * 128 * 2, 128 * 4
    # p and the slice of x, and the result.
    sample = row + 8 * 128 * 2 + row
    # x is sliced and used as a whole.
    sums = x + row + 2 * row
    # p twice is one operand.
    y = x + row + row + x
    assert hlo.traffic(GPU) == sample + sums + y
    assert hlo.kernels(GPU) == 3
    assert hlo.collectives(GPU) == {}
    assert hlo.cycles(GPU) == 0


def test_tpu_program():
    assert hlo.collectives(TPU) == {"all-reduce": 2, "all-gather": 1}
    # One sum, two as one, and the array of all devices: what is sent beside it is no result.
    assert hlo.received(TPU) == (128 + 2 * 128 + 512) * 4
    assert hlo.cycles(TPU) == 1828 + 1930 + 1000000
    # Two fusions and the convolution.
    assert hlo.kernels(TPU) == 3


def test_sizes_of_results():
    found = {i.name: i.size for i in hlo.computations(TPU)["ENTRY"]}
    assert found["%slice.3"] == 8 * 128 * 2
    assert found["%fusion"] == 2 * 128 * 4
    assert found["%copy-start"] == 2 * 64 * 128 * 2 + 4


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f64", 48), ("c64", 48), ("f32", 24), ("s16", 12), ("bf16", 12), ("f8e4m3fn", 6), ("pred", 6), ("s4", 3)],
)
def test_sizes_of_dtypes(dtype, size):
    text = f"ENTRY %main {{\n  ROOT %x = ({dtype}[2,3]{{1,0}}, token[]) custom-call()\n}}"
    assert hlo.traffic(text) == size


def test_size_of_a_lowered_program():
    # Two constants, the case and its two returns, the sum twice, and the addition once.
    assert program_size.size(LOWERED) == (8, 1)


def test_checkpoints_are_seen():
    def function(x):
        return jax.checkpoint(jnp.sin)(x) + jax.jit(jax.checkpoint(jnp.cos))(x)

    x = jnp.ones(3)
    assert program_size.checkpoints(jax.jit(function).trace(x)) == 2
    assert program_size.checkpoints(jax.jit(jnp.sin).trace(x)) == 0


def test_compiled_program():
    def function(x, y):
        return x[:2].sum(0), x * y + 1

    x = jnp.ones((64, 128))
    text = jax.jit(function).lower(x, x).compile().as_text()
    assert hlo.traffic(text) == (2 * 128 + 128 + 3 * 64 * 128) * 4
    assert hlo.kernels(text) == 2


def test_compiled_collectives():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def function(x):
        return jax.lax.psum(x, "d"), jax.lax.all_gather(x, "d")

    x = jnp.ones((2, 4))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=jax.P("d"), out_specs=(jax.P(), jax.P("d")))
    text = jax.jit(mapped).lower(x).compile().as_text()
    assert hlo.collectives(text) == {"all-reduce": 1, "all-gather": 1}
    assert hlo.received(text) == (4 + 2 * 4) * 4


def test_formulations_replace_what_the_program_uses():
    arguments = jnp.ones((4, 3)), jnp.ones((4, 3)), jaxbn.affine_init(3)
    programs = []
    for name in formulations.WITHOUT:
        with formulations.without(name):
            programs.append(jax.jit(formulations.step).lower(*arguments).as_text())
    assert len(set(programs)) == len(formulations.WITHOUT)


@pytest.mark.parametrize("name", [None, *SUBCOMMANDS])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--help"] if name is None else [name, "--help"]
    with pytest.raises(SystemExit) as end:
        parser_for(arguments).parse_args(arguments)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for each in SUBCOMMANDS if name is None else [f"python -m benchmarks {name}"]:
        assert each in printed

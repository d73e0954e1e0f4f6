"""Unordered accesses to shared memory are found, ordered ones are not accused; what is not understood is an error.

Kernels of two warps of 32 threads, in the LLVM IR of Triton's NVIDIA back-end; a few of AMD's, in warps of 64.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.proofs.ir import Unreadable
from bench.proofs.races import Proof, prove
from cosa_fast.kernels.launch.runtime import HAS_TRITON

ROOT = Path(__file__).resolve().parents[3]
BARRIER = "call void @llvm.nvvm.barrier.cta.sync.aligned.all(i32 0)"
WARP_BARRIER = "call void @llvm.nvvm.bar.warp.sync(i32 -1)"
# %mine: a cell for each thread; %other: the cell of a thread of the other warp; %neighbour: of one of its own.
CELLS = """
  %tid = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %at = shl nuw nsw i32 %tid, 2
  %mine = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %at
  %across = xor i32 %at, 128
  %other = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %across
  %beside = xor i32 %at, 4
  %neighbour = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %beside
"""
WRITE = 'call void asm sideeffect "st.shared.b32 [ $0 + 0 ], $1;", "r,r"(ptr addrspace(3) %{}, i32 %tid)'
READ = "%{} = load i32, ptr addrspace(3) %{}, align 4"


def kernel(*lines: str) -> str:
    body = "\n".join(line if line.endswith(":") else f"  {line}" for line in lines)
    return f"define ptx_kernel void @_kernel(ptr addrspace(1) %x, i32 %n) {{\nentry:{CELLS}{body}\n}}\n"


def proof(*lines: str, shared: int = 256) -> Proof:
    return prove(kernel(*lines), 64, 32, shared)


# --- ordinary accesses -----------------------------------------------------------------------------------------------
def test_a_barrier_orders_writing_and_reading() -> None:
    ordered = proof(WRITE.format("mine"), BARRIER, READ.format("a", "other"), "ret void")
    assert (ordered.accesses, ordered.barriers, ordered.meeting, ordered.open) == (2, 1, 1, [])


@pytest.mark.parametrize(
    "lines",
    [
        (WRITE.format("mine"), READ.format("a", "other")),
        (READ.format("a", "other"), WRITE.format("mine")),
        (WRITE.format("mine"), WRITE.format("other")),
        (WRITE.format("mine"), WARP_BARRIER, READ.format("a", "other")),
        (BARRIER, WRITE.format("mine"), READ.format("a", "other"), BARRIER),
    ],
)
def test_without_one_the_pair_is_open(lines: tuple[str, ...]) -> None:
    (line,) = proof(*lines, "ret void").open
    assert line.startswith("unordered: ")


def test_a_threads_own_cell_needs_no_barrier() -> None:
    assert proof(WRITE.format("mine"), READ.format("a", "mine"), WRITE.format("mine"), "ret void").open == []


def test_a_barrier_of_the_warp_orders_its_lanes_only() -> None:
    lines = WRITE.format("mine"), READ.format("a", "neighbour"), "ret void"
    assert [line.partition(":")[0] for line in proof(*lines).open] == ["unordered in a warp"]
    assert proof(lines[0], WARP_BARRIER, *lines[1:]).open == []


def test_only_bytes_that_both_touch_count() -> None:
    far = "%far = getelementptr inbounds nuw i8, ptr addrspace(3) %other, i32 {}"
    apart = proof(far.format(256), WRITE.format("mine"), READ.format("a", "far"), "ret void", shared=512)
    assert (apart.meeting, apart.open) == (0, [])
    assert proof(far.format(3), WRITE.format("mine"), READ.format("a", "far"), "ret void", shared=512).open


def test_threads_that_a_predicate_leaves_out_touch_nothing() -> None:
    first = "%first = icmp ult i32 %tid, 32"
    guarded = (
        'call void asm sideeffect "@$2 st.shared.b32 [ $0 + 0 ], $1;", "r,r,b"'
        "(ptr addrspace(3) %{}, i32 %tid, i1 %first)"
    )
    # The first warp writes its cells, and those of the other warp; that one reads nothing.
    assert proof(first, guarded.format("mine"), READ.format("a", "mine"), "ret void").open == []
    assert proof(first, guarded.format("other"), READ.format("a", "mine"), "ret void").open


def test_an_unknown_address_meets_everything() -> None:
    anywhere = "%any = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %n"
    found = proof(anywhere, WRITE.format("any"), READ.format("a", "mine"), "ret void")
    assert found.anywhere == 1
    assert found.open
    atomic = "%b = atomicrmw add ptr addrspace(3) %any, i32 1 monotonic, align 4"
    assert proof(anywhere, atomic, atomic.replace("%b", "%c"), BARRIER, READ.format("a", "mine"), "ret void").open == []


def test_nothing_outside_the_memory_that_was_asked_for() -> None:
    assert proof(WRITE.format("mine"), "ret void").open == []
    (line,) = proof(WRITE.format("mine"), "ret void", shared=252).open
    assert line.startswith("outside the 252 bytes: ")
    packed = "%a = load <32 x i1>, ptr addrspace(3) %mine, align 4", "ret void"
    assert proof(*packed).open == []
    assert proof(*packed, shared=252).open


def test_several_threads_may_write_the_same_value_to_a_byte() -> None:
    one = "%one = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 0"
    write = 'call void asm sideeffect "st.shared.b32 [ $0 + 0 ], $1;", "r,r"(ptr addrspace(3) %one, i32 {})'
    assert proof(one, write.format("%n"), "ret void").open == []
    (line,) = proof(one, write.format("%tid"), "ret void").open
    assert line.startswith("several threads write different values at once")


def test_a_sum_over_lanes_is_the_same_in_all_of_them() -> None:
    """Five exchanges make a value that every lane of the warp holds; four do not. Also where it travels in a vector."""
    one = "%one = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %warp"
    lines = [
        "%wid = lshr i32 %tid, 5", "%warp = shl i32 %wid, 2", one,
        '%v0 = call i32 asm sideeffect "ld.global.b32 { $0 }, [ $1 + 0 ];", "=r,l"(ptr addrspace(1) %p)',
        "%c0 = bitcast i32 %v0 to float",
    ]  # fmt: skip
    lines.insert(0, "%p = getelementptr i32, ptr addrspace(1) %x, i32 %tid")
    for turn, step in enumerate((16, 8, 4, 2, 1)):
        lines += [
            f"%i{turn} = bitcast float %c{turn} to i32",
            f"%s{turn} = call i32 @llvm.nvvm.shfl.sync.bfly.i32(i32 -1, i32 %i{turn}, i32 {step}, i32 31)",
            f"%w{turn} = insertelement <2 x i32> poison, i32 %s{turn}, i64 0",
            f"%f{turn} = bitcast <2 x i32> %w{turn} to <2 x float>",
            f"%a{turn} = insertelement <2 x float> poison, float %c{turn}, i64 0",
            f"%b{turn} = fadd <2 x float> %a{turn}, %f{turn}",
            f"%c{turn + 1} = extractelement <2 x float> %b{turn}, i64 0",
        ]
    write = 'call void asm sideeffect "st.shared.b32 [ $0 + 0 ], $1;", "r,r"(ptr addrspace(3) %one, float %c{})'
    assert proof(*lines, write.format(5), "ret void").open == []
    assert proof(*lines, write.format(4), "ret void").open


# --- ways ------------------------------------------------------------------------------------------------------------
def loop(*inside: str) -> tuple[str, ...]:
    return (
        "br label %turn", "turn:", "%i = phi i32 [ 0, %entry ], [ %next, %turn ]", *inside,
        "%next = add i32 %i, 1", "%more = icmp slt i32 %next, %n", "br i1 %more, label %turn, label %done",
        "done:", "ret void",
    )  # fmt: skip


def test_the_way_back_of_a_loop_counts() -> None:
    assert proof(*loop(WRITE.format("mine"), BARRIER, READ.format("a", "other"), BARRIER)).open == []
    (line,) = proof(*loop(WRITE.format("mine"), BARRIER, READ.format("a", "other"))).open
    assert line.index("load i32") < line.index("st.shared")  # the reading of one turn, the writing of the next


def test_buffers_that_take_turns_are_followed() -> None:
    """Two buffers of 256 bytes: the one is written while the other is read."""
    lines = (
        "%buffer = phi i32 [ 0, %entry ], [ %flipped, %turn ]", "%flipped = xor i32 %buffer, 256",
        "%to = getelementptr inbounds nuw i8, ptr addrspace(3) %mine, i32 %buffer",
        "%from = getelementptr inbounds nuw i8, ptr addrspace(3) %other, i32 %buffer",
        WRITE.format("to"), BARRIER, READ.format("a", "from"),
    )  # fmt: skip
    found = proof(*loop(*lines), shared=512)
    assert found.anywhere == 0  # two alternatives
    assert found.open  # which of them it is in which turn is not followed
    assert proof(*loop(*lines, BARRIER), shared=512).open == []


def test_every_way_needs_its_barrier() -> None:
    def branch(barrier: str) -> tuple[str, ...]:
        return (
            WRITE.format("mine"), "%positive = icmp sgt i32 %n, 0", "br i1 %positive, label %yes, label %no",
            "yes:", BARRIER, "br label %end", "no:", *([barrier] if barrier else []), "br label %end",
            "end:", READ.format("a", "other"), "ret void",
        )  # fmt: skip

    assert proof(*branch(BARRIER)).open == []
    assert proof(*branch("")).open


def test_a_barrier_that_not_all_threads_reach_is_no_proof() -> None:
    def branch(condition: str) -> tuple[str, ...]:
        return condition, "br i1 %some, label %yes, label %end", "yes:", BARRIER, "br label %end", "end:", "ret void"

    assert proof(*branch("%some = icmp sgt i32 %n, 0")).open == []
    (line,) = proof(*branch("%some = icmp ult i32 %tid, 32")).open
    assert line.startswith("not all threads may come to a barrier")


def test_threads_that_part_are_in_both_ways_at_once() -> None:
    def branch(condition: str) -> tuple[str, ...]:
        return (
            condition, "br i1 %some, label %yes, label %no", "yes:", WRITE.format("other"), "br label %end",
            "no:", READ.format("a", "mine"), "br label %end", "end:", "ret void",
        )  # fmt: skip

    assert proof(*branch("%some = icmp sgt i32 %n, 0")).open == []
    assert proof(*branch("%some = icmp ult i32 %tid, 32")).open
    # The cells of those that are left out are not touched: both ways are taken by the same half.
    assert proof(*branch("%some = icmp ult i32 %tid, 64")).open == []


# --- what completes later --------------------------------------------------------------------------------------------
COPY = (
    'call void asm sideeffect "cp.async.ca.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x4, $2;", "r,l,r"'
    "(ptr addrspace(3) %mine, ptr addrspace(1) %x, i32 4)"
)
COMMIT = "call void @llvm.nvvm.cp.async.commit.group()"
WAIT = "call void @llvm.nvvm.cp.async.wait.group(i32 {})"


def test_a_copy_is_there_after_a_wait_and_a_barrier() -> None:
    read = READ.format("a", "other"), "ret void"
    assert proof(COPY, COMMIT, WAIT.format(0), BARRIER, *read).open == []
    assert proof(COPY, COMMIT, BARRIER, WAIT.format(0), *read).open  # waited for too late
    assert proof(COPY, COMMIT, WAIT.format(0), *read).open
    assert proof(COPY, WAIT.format(0), BARRIER, *read).open  # belongs to no group
    assert proof(COPY, COMMIT, WAIT.format(1), BARRIER, *read).open  # one group may pend: this one
    assert proof(COPY, COMMIT, COMMIT, WAIT.format(1), BARRIER, *read).open == []
    own = READ.format("a", "mine"), "ret void"
    (line,) = proof(COPY, COMMIT, *own).open
    assert line.startswith("not waited for")
    assert proof(COPY, COMMIT, WAIT.format(0), *own).open == []


@pytest.mark.parametrize(
    "fence",
    [
        "call void @llvm.nvvm.fence.proxy.async.shared_cta()",
        'call void asm sideeffect "fence.proxy.async.shared::cta;", ""()',  # Triton 3.6
    ],
)
def test_matrix_units_read_until_they_are_waited_for_and_need_a_fence(fence: str) -> None:
    # Start 0, 256 bytes between atoms of 8 rows of 32 bytes.
    descriptor = (3 << 62 | 16 << 32) - (1 << 64)
    multiply = (
        'call float asm sideeffect "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {$0}, {$1}, $2, 0, 1, 1;", '
        f'"=f,r,l"(i32 %n, i64 {descriptor})'
    )
    commit = "call void @llvm.nvvm.wgmma.commit_group.sync.aligned()"
    wait = 'call void asm sideeffect "// wait for regs: $0\\0A\\09wgmma.wait_group.sync.aligned 0;", "=r,0"(i32 %n)'
    whole = [WRITE.format("mine"), BARRIER, fence, f"%r = {multiply}", commit, wait, BARRIER, WRITE.format("mine")]
    assert proof(*whole, "ret void").open == []
    for left_out in (1, 2, 5, 6):
        assert proof(*whole[:left_out], *whole[left_out + 1 :], "ret void").open, whole[left_out]


# --- AMD -------------------------------------------------------------------------------------------------------------
def test_warps_of_64_and_their_exchanges() -> None:
    text = """define amdgpu_kernel void @_kernel(ptr addrspace(1) %x) {
entry:
  %tid = call range(i32 0, 1024) i32 @llvm.amdgcn.workitem.id.x()
  %p = getelementptr float, ptr addrspace(1) %x, i32 %tid
  %v = load i32, ptr addrspace(1) %p, align 4
  %half = call i32 @llvm.amdgcn.update.dpp.i32(i32 %v, i32 %v, i32 280, i32 15, i32 12, i1 false)
  %s = call i32 @llvm.amdgcn.update.dpp.i32(i32 %half, i32 %v, i32 264, i32 15, i32 3, i1 false)
  %sum = add i32 %v, %s
  %rest = and i32 %tid, 119
  %at = shl i32 %rest, 2
  %cell = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %at
  store i32 %sum, ptr addrspace(3) %cell, align 4
  call void @llvm.amdgcn.s.barrier()
  %across = xor i32 %at, 256
  %other = getelementptr inbounds nuw i8, ptr addrspace(3) @global_smem, i32 %across
  %a = load i32, ptr addrspace(3) %other, align 4
  ret void
}
"""
    assert prove(text, 128, 64, 512).open == []  # lanes that differ in the bit of 8 write the same sum
    assert prove(text.replace("add i32 %v, %s", "sub i32 %v, %s"), 128, 64, 512).open
    assert prove(text.replace("  call void @llvm.amdgcn.s.barrier()\n", ""), 128, 64, 512).open


# --- what is not understood ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        'call void asm sideeffect "red.async.shared::cluster.add.u32 [ $0 ], 1;", "r"(ptr addrspace(3) %mine)',
        'call void asm sideeffect "cp.async.bulk.shared::cta.global [ $0 ], 16;", "r"(ptr addrspace(3) %mine)',
        "call void @llvm.nvvm.barrier.cta.arrive.all(i32 1)",
        "call void @some_function(ptr addrspace(3) %mine)",
    ],
)  # fmt: skip
def test_what_might_touch_or_order_shared_memory_unknown_to_us_is_an_error(line: str) -> None:
    with pytest.raises(Unreadable):
        proof(line, "ret void")


# --- a compiled kernel -----------------------------------------------------------------------------------------------
COMPILE = """
import json, sys
import torch
from bench.operators.cases import OPERATORS
from bench.operators.scene import Size
from bench.operators.static import record
from cosa_fast.kernels.launch.offline import compile_launches
found = {}
for architecture in ("sm_90", "gfx942"):
    launches = record(OPERATORS["histogram"].problem(Size(), torch.device("cpu"), filled=False), architecture)
    compiled = compile_launches(launches, architecture)[-1]
    found[architecture] = [compiled.code["llir"], compiled.threads, compiled.warp, compiled.shared]
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_no_barrier_of_a_compiled_kernel_can_be_taken_out() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    for architecture, (text, threads, warp, shared) in json.loads(run.stdout).items():
        whole = prove(text, threads, warp, shared)
        assert whole.open == []
        assert whole.accesses > 2
        barriers = list(re.finditer(r"^.*call void @llvm\.(?:nvvm\.barrier\.cta|amdgcn\.s\.barrier).*\n", text, re.M))
        assert len(barriers) == whole.barriers > 2
        for barrier in barriers:
            less = text[: barrier.start()] + text[barrier.end() :]
            assert prove(less, threads, warp, shared).open, f"{architecture}: {barrier[0]}"

"""What is changed in the code that Triton makes for the CPU; the rest runs in an environment of its own."""

import struct

import pytest

from bench.compiled import check
from bench.compiled.spirv import with_barriers, without_refused
from cosa_fast.errors import UserError

VECTOR = "  store <1 x float> %3, ptr addrspace(3) %4, align 4\n"
OTHERS = (
    "  store float %3, ptr addrspace(3) %4, align 4\n"
    "  store <1 x float> %3, ptr addrspace(1) %4, align 4\n"
    "  %5 = load <1 x float>, ptr addrspace(3) %4, align 4\n"
)


def test_every_vector_store_to_local_memory_gets_a_barrier() -> None:
    body = f"define spir_kernel void @k() {{\n{VECTOR}{OTHERS}{VECTOR}  ret void\n}}\n"
    text, count = with_barriers(body)
    assert count == 2
    barrier = "  call void @_Z7barrierj(i32 1)\n"
    assert text.count(barrier + VECTOR) == text.count(barrier) == 2
    assert text.count("declare void @_Z7barrierj(i32)") == 1
    assert with_barriers(text)[0].count("declare void @_Z7barrierj(i32)") == 1
    assert with_barriers(OTHERS) == (OTHERS, 0)


def test_what_the_runtime_refuses_is_left_out() -> None:
    def instruction(opcode: int, *words: int) -> bytes:
        return struct.pack(f"<{1 + len(words)}I", (1 + len(words)) << 16 | opcode, *words)

    def extension(name: bytes) -> bytes:
        name += b"\0" * (4 - len(name) % 4)
        return instruction(10, *struct.unpack(f"<{len(name) // 4}I", name))

    head = struct.pack("<5I", 0x07230203, 0x10400, 0, 99, 0)
    extensions = [extension(name) for name in (b"SPV_KHR_linkonce_odr", b"SPV_INTEL_kernel_attributes")]
    kept = [instruction(17, 4), extensions[0], instruction(16, 7, 17, 1, 1, 1), instruction(5892, 1)]
    refused = [instruction(17, 5892), extensions[1], instruction(16, 7, 5893, 1)]
    mixed = [kept[0], refused[0], kept[1], refused[1], kept[2], refused[2], kept[3]]
    assert without_refused(head + b"".join(mixed)) == head + b"".join(kept)


def test_every_file_that_runs_kernels_is_named() -> None:
    folder = check.ROOT / "tests" / "kernels"
    running = {
        path.stem.removeprefix("test_")
        for path in folder.glob("test_*.py")
        if "kernel_device" in path.read_text(encoding="utf-8") or 'backend="triton"' in path.read_text(encoding="utf-8")
    }
    assert running - {"arguments", "runtime", "fake", "cpu"} == set(check.FILES)


def test_the_table_says_what_was_left_out_and_what_failed() -> None:
    ran = {"passed": 3, "failed": 1, "skipped": 2, "names": ["test_x[cpu]"], "kernels": 4, "launches": 9, "barriers": 1}
    text = check.table({"perplexity": ran, "histogram": {"left_out": "too new"}, "fuse_cams": {"error": "not done"}})
    assert "perplexity" in text
    assert text.splitlines()[-3:] == ["histogram: too new", "fuse_cams: not done", "perplexity: test_x[cpu]"]


def test_outside_its_environment_it_says_how_to_get_one() -> None:
    with pytest.raises(UserError, match="make test-compiled"):
        check.main(["perplexity"])
    with pytest.raises(UserError, match=r"no file 'perplexty'.*perplexity"):
        check.main(["perplexty"])

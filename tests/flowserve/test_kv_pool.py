"""The KV cache in shared memory: seen by peers, gone with its process."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from flowserve.core.transfer import KvLayout, contiguous_runs
from flowserve.runtime.kv_pool import KvPool
from flowserve.runtime.runner import KvHandle

PEER = """
import sys, torch, msgspec
from flowserve.runtime.kv_pool import KvPool
pool = KvPool(2, 9, 16, 2, 4, torch.float32)
pool.tensor.copy_(torch.arange(pool.tensor.numel()).view(pool.tensor.shape))
print(msgspec.json.encode(pool.handle).decode(), flush=True)
for line in sys.stdin:
    pool.tensor[:, :, int(line)] += 1
    print("done", flush=True)
"""


LAYOUTS: tuple[KvLayout, ...] = ("layer_major", "block_major")


def make_pool(
    blocks: int = 6,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    layout: KvLayout = "layer_major",
    alignment: int = 64,
    staged: bool = False,
) -> KvPool:
    return KvPool(layers, blocks, 16, 2, 4, dtype, layout, alignment=alignment, staged=staged)


@pytest.fixture
def pool() -> Iterator[KvPool]:
    pool = make_pool()
    yield pool
    pool.close()


@pytest.fixture
def peer() -> Iterator[subprocess.Popen[str]]:
    """Another process with a KV cache of 9 blocks that hold 0, 1, 2, ...; a line on stdin adds 1 to a block."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    yield process
    process.kill()
    process.communicate()


def read_handle(process: subprocess.Popen[str]) -> KvHandle:
    assert process.stdout
    return msgspec.json.decode(process.stdout.readline(), type=KvHandle)


def test_blocks_move_between_processes_until_the_peer_is_killed(pool: KvPool, peer: subprocess.Popen[str]) -> None:
    """Reads see what the peer last wrote, without its help; after kill -9 they fail, and nothing stays in /dev/shm."""
    handle = read_handle(peer)
    expected = torch.arange(torch.Size(handle.shape).numel(), dtype=torch.float32).view(handle.shape)
    assert pool.copy_blocks(pool.peer(handle), [7, 8, 3], [0, 1, 2]) == 1
    assert torch.equal(pool.tensor[:, :, :3], expected[:, :, [7, 8, 3]])
    assert not pool.tensor[:, :, 3:].any()

    assert peer.stdin
    assert peer.stdout
    peer.stdin.write("3\n")
    peer.stdin.flush()
    peer.stdout.readline()
    pool.copy_blocks(pool.peer(handle), [3], [5])
    assert torch.equal(pool.tensor[:, :, 5], expected[:, :, 3] + 1)

    assert not [name for name in os.listdir("/dev/shm") if "deepflow" in name]
    peer.send_signal(signal.SIGKILL)
    peer.wait()
    with pytest.raises(OSError, match=handle.path):
        pool.peer(handle)
    with pytest.raises(OSError, match=handle.path):
        make_pool().peer(handle)


@pytest.mark.parametrize("staged", [False, True], ids=["shared", "staged"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_equal_indexing_for_any_blocks(layout: KvLayout, staged: bool) -> None:
    """Whatever the runs, each destination block holds its source block and the others are untouched."""
    pool, source = (make_pool(blocks, layout=layout, alignment=4096, staged=staged) for blocks in (6, 12))
    source.tensor.copy_(torch.randn(source.tensor.shape, generator=torch.Generator().manual_seed(0)))
    random.seed(1)
    for _ in range(50):
        count = random.randint(0, 6)
        source_blocks, blocks = random.sample(range(12), count), random.sample(range(6), count)
        expected = pool.tensor.clone()
        expected[:, :, blocks] = source.tensor[:, :, source_blocks]
        source.stage(source_blocks)
        copies = pool.copy_blocks(pool.peer(source.handle), source_blocks, blocks)
        assert torch.equal(pool.tensor, expected)
        assert copies == len(contiguous_runs(blocks, blocks)) <= len(contiguous_runs(source_blocks, blocks))
    source.close()
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peers_read_what_was_staged(layout: KvLayout) -> None:
    """Of a device's memory peers see the blocks as they were when staged, and nothing of the others."""
    source, pool = make_pool(9, layout=layout, staged=True), make_pool(9, layout=layout)
    source.tensor.fill_(3)
    source.stage([2, 3, 7])
    source.tensor.fill_(4)
    pool.copy_blocks(pool.peer(source.handle), list(range(9)), list(range(9)))
    staged = torch.zeros(9)
    staged[[2, 3, 7]] = 3
    assert torch.equal(pool.tensor[1, 1, :, 5, 0, 2], staged)
    source.close()
    pool.close()


def test_the_layouts_are_the_orders_in_memory() -> None:
    """layer_major keeps each layer's keys together, at aligned addresses; block_major all layers of a block."""
    layer, block = (make_pool(layout=layout, alignment=1 << 12, staged=True) for layout in LAYOUTS)
    keys = [plane for pair in layer.tensor for plane in pair]
    assert all(plane.is_contiguous() and plane.data_ptr() % (1 << 12) == 0 for plane in keys)
    assert block.tensor.shape == layer.tensor.shape
    assert block.tensor.permute(2, 0, 1, 3, 4, 5).is_contiguous()
    assert block.tensor.data_ptr() % (1 << 12) == 0
    layer.close()
    block.close()


def test_another_order_in_memory_is_refused(pool: KvPool) -> None:
    """Engines that keep their KV cache in different orders do not exchange blocks."""
    peer = make_pool(layout="block_major")
    with pytest.raises(ValueError, match=r"float32 block_major, ours .* float32 layer_major.*and kv_layout"):
        pool.peer(peer.handle)
    peer.close()


def test_a_peer_is_mapped_once_and_anew_when_its_path_is_another_file(pool: KvPool) -> None:
    """Mappings are cached by path, but a path that was reused for another KV cache is not mistaken for the old one."""
    first = make_pool()
    handle = first.handle
    mapped = pool.peer(handle)
    assert pool.peer(handle) is mapped
    first.close()
    with pytest.raises(OSError, match=handle.path):
        pool.peer(handle)
    second = make_pool()
    assert second.handle.path == handle.path  # the lowest free number
    second.tensor.fill_(5)
    assert pool.peer(second.handle).eq(5).all()
    second.close()


def test_memory_of_peers_that_are_gone_is_let_go(pool: KvPool) -> None:
    """Mapping a new peer unmaps those that have ended since, so that their memory is freed."""
    old, new = make_pool(), make_pool()
    pool.peer(old.handle)
    old.close()
    mapped = Path("/proc/self/maps").read_text().count("deepflow-kv")
    pool.peer(new.handle)
    assert Path("/proc/self/maps").read_text().count("deepflow-kv") == mapped
    new.close()


def test_a_path_that_is_no_kv_cache_is_a_lost_peer(pool: KvPool, tmp_path: Path) -> None:
    """A process number in use again, with another file behind the path, reads as a KV cache that is gone."""
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    with file.open() as stream, pytest.raises(OSError, match="no KV cache"):
        pool.peer(msgspec.structs.replace(pool.handle, path=f"/proc/{os.getpid()}/fd/{stream.fileno()}"))


@pytest.mark.parametrize(
    "other", [{"layers": 3}, {"dtype": torch.bfloat16}], ids=["another number of layers", "another dtype"]
)
def test_another_layout_is_refused(pool: KvPool, other: dict[str, object]) -> None:
    """Blocks of another shape or dtype are not copied; the message shows both layouts."""
    peer = make_pool(**other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the peer's KV cache is \[.*ours \[2, 2, 6, 16, 2, 4\] float32"):
        pool.peer(peer.handle)
    peer.close()


def test_a_handle_that_overstates_the_size_is_refused(pool: KvPool) -> None:
    """A layout that needs more bytes than the file has is not mapped."""
    peer = make_pool()
    with pytest.raises(ValueError, match="bytes, its layout needs"):
        pool.peer(msgspec.structs.replace(peer.handle, shape=(2, 2, 7, 16, 2, 4)))
    peer.close()


def test_the_file_cannot_shrink_under_a_reader(pool: KvPool) -> None:
    """Truncating a sealed pool fails, so no reader can be killed by reading beyond its end."""
    with open(pool.handle.path, "r+b") as file, pytest.raises(PermissionError):
        file.truncate(0)


def test_a_closed_pool_holds_no_memory() -> None:
    """Once the pool is closed and its tensors are gone, its mapping is gone from the process."""
    pool = make_pool(blocks=600)
    assert "deepflow-kv" in Path("/proc/self/maps").read_text()
    before = Path("/proc/self/maps").read_text().count("deepflow-kv")
    pool.close()
    pool.close()
    assert Path("/proc/self/maps").read_text().count("deepflow-kv") == before - 1

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem.core.units import GIB, MIB
from lowmem.doctor import Facts, Status
from lowmem.doctor import checks_run as checks
from tests.unit.doctor.scripted import GTX1060, NO_CARD, RTX3060, TORCH_2_7, healthy, said, with_card

CONF = "PYTORCH_CUDA_ALLOC_CONF"


def with_conf(text: str, name: str = CONF, **changes: object) -> Facts:
    return with_card(GTX1060, arch_list=TORCH_2_7, environment={name: text}, **changes)


def test_parsing_of_allocator_settings() -> None:
    text = "expandable_segments:True, roundup_power2_divisions:[256:1,>:4],max_split_size_mb"
    assert checks.parse_allocator(text) == {
        "expandable_segments": "True",
        "roundup_power2_divisions": "[256:1,>:4]",
        "max_split_size_mb": "",
    }
    assert checks.parse_allocator("") == {}


def test_default_allocator_settings() -> None:
    found = said(checks.allocator, with_card(GTX1060))
    assert (found.status, found.mend) == (Status.NOTE, "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    for facts in (with_card(GTX1060, system="Windows"), with_card(replace(RTX3060, total_bytes=24 * GIB))):
        found = said(checks.allocator, facts)
        assert (found.status, found.mend) == (Status.OK, None)


def test_good_allocator_settings() -> None:
    for text in ("expandable_segments:True", "max_split_size_mb:128,backend:native"):
        found = said(checks.allocator, with_conf(text))
        assert (found.status, text in found.finding) == (Status.OK, True)


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("expandable_segments:true", f"export {CONF}=expandable_segments:True"),
        ("expandable_segment:True", f"export {CONF}=expandable_segments:True"),
        ("max_split_size:128,nonsense:1", f"export {CONF}=max_split_size_mb:128"),
        ("nonsense:1", f"unset {CONF}"),
        ("max_split_size_mb:5", f"unset {CONF}"),
    ],
)
def test_allocator_settings_that_torch_refuses(text: str, mend: str) -> None:
    found = said(checks.allocator, with_conf(text, allocator_trouble="ValueError: Unrecognized key"))
    assert (found.status, found.mend) == (Status.FAIL, mend)
    assert "ValueError: Unrecognized key" in found.finding


def test_a_key_without_a_value_and_an_unknown_key_without_torch_to_ask() -> None:
    found = said(checks.allocator, with_conf("max_split_size_mb"))
    assert found.status == Status.FAIL
    found = said(checks.allocator, with_conf("expandable_segment:True", torch_works=None))
    assert found.status == Status.WARNING
    # torch took it: it may know a key that this lowmem does not
    found = said(checks.allocator, with_conf("brand_new_key:1"))
    assert found.status == Status.OK


def test_the_new_name_is_not_read_by_old_releases() -> None:
    name = "PYTORCH_ALLOC_CONF"
    found = said(checks.allocator, with_conf("expandable_segments:True", name, torch_version="2.7.1"))
    assert (found.status, found.mend) == (Status.WARNING, f"export {CONF}=expandable_segments:True")
    found = said(checks.allocator, with_conf("expandable_segments:True", name))
    assert found.status == Status.OK


def test_other_allocators_and_windows() -> None:
    found = said(checks.allocator, with_conf("backend:cudaMallocAsync"))
    assert (found.status, found.mend) == (Status.WARNING, f"unset {CONF}")
    found = said(checks.allocator, with_conf("expandable_segments:True", system="Windows"))
    assert (found.status, found.mend) == (Status.NOTE, f"set {CONF}=")


def test_without_a_card_allocator_and_cuda_variables_do_not_matter() -> None:
    facts = replace(NO_CARD, environment={CONF: "nonsense", "CUDA_LAUNCH_BLOCKING": "1"})
    assert checks.allocator(facts) is None
    assert checks.variables(facts) is None
    assert checks.variables(healthy()) is None


@pytest.mark.parametrize(
    ("name", "value", "status", "mend"),
    [
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", Status.WARNING, "unset PYTORCH_NO_CUDA_MEMORY_CACHING"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "", Status.WARNING, "unset PYTORCH_NO_CUDA_MEMORY_CACHING"),
        ("CUDA_LAUNCH_BLOCKING", "1", Status.WARNING, "unset CUDA_LAUNCH_BLOCKING"),
        ("CUDA_LAUNCH_BLOCKING", "0", None, None),
        ("CUDNN_CONV_WSCAP_DBG", "128", Status.NOTE, "unset CUDNN_CONV_WSCAP_DBG"),
        ("CUDNN_CONV_WSCAP_DBG", "128M", Status.WARNING, "unset CUDNN_CONV_WSCAP_DBG"),
        ("CUDA_MODULE_LOADING", "EAGER", Status.WARNING, "export CUDA_MODULE_LOADING=LAZY"),
        ("CUDA_MODULE_LOADING", "LAZY", None, None),
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "10000", Status.NOTE, "export TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT=1000"),
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "0", Status.NOTE, "export TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT=1000"),
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "-1", Status.WARNING, "export TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT=1000"),
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "100", None, None),
        ("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "many", None, None),
    ],
)
def test_variables(name: str, value: str, status: Status | None, mend: str | None) -> None:
    found = checks.variables(healthy(environment={name: value}))
    assert (found is None) == (status is None)
    if found is not None:
        assert (found.status, found.mend, name in found.finding) == (status, mend, True)


def test_the_gravest_variable_is_told_and_the_others_named() -> None:
    found = said(checks.variables, healthy(environment={"CUDNN_CONV_WSCAP_DBG": "64", "CUDA_LAUNCH_BLOCKING": "1"}))
    assert (found.status, found.mend) == (Status.WARNING, "unset CUDA_LAUNCH_BLOCKING")
    assert found.finding.endswith("(also: CUDNN_CONV_WSCAP_DBG=64)")


@pytest.mark.parametrize(
    ("cores", "share", "threads", "status", "mend"),
    [
        (8, None, 8, Status.OK, None),
        (8, None, 16, Status.WARNING, "export OMP_NUM_THREADS=8"),
        (8, 2.0, 8, Status.WARNING, "export OMP_NUM_THREADS=2"),
        (8, 0.5, 2, Status.WARNING, "export OMP_NUM_THREADS=1"),
        (8, 2.5, 2, Status.OK, None),
        (4, 16.0, 4, Status.OK, None),
        (1, None, 1, Status.OK, None),
        (4, None, None, Status.OK, None),
    ],
)
def test_threads_and_cores(
    cores: int, share: float | None, threads: int | None, status: Status, mend: str | None
) -> None:
    found = said(checks.processor, healthy(cores=cores, cpu_share=share, threads=threads))
    assert (found.status, found.mend) == (status, mend)


def test_a_busy_processor() -> None:
    one = {"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}}
    found = said(checks.processor, replace(NO_CARD, cores=2, busy_cores=0.2, **one))
    assert (found.status, found.mend) == (Status.NOTE, "export OMP_NUM_THREADS=2")
    found = said(checks.processor, replace(NO_CARD, cores=2, busy_cores=1.0, **one))
    assert (found.status, found.mend) == (Status.OK, None)
    assert "other programs keep 1.0 cores busy" in found.finding
    found = said(checks.processor, replace(NO_CARD, cores=2, busy_cores=1.0, threads=2))
    assert (found.status, found.mend) == (Status.NOTE, None)
    assert "steps take longer" in found.finding
    found = said(checks.processor, healthy(cores=8, busy_cores=4.0, threads=16))
    assert (found.status, found.mend) == (Status.WARNING, "export OMP_NUM_THREADS=4")


def test_a_containers_limit_is_told() -> None:
    found = said(checks.processor, healthy(cpu_share=2.5, threads=2))
    assert found.finding == "8 cores, limited to 2.5 by the container, torch uses 2 threads"


def test_one_thread_asked_for_on_the_cpu() -> None:
    found = said(checks.processor, replace(NO_CARD, threads=1, environment={"OMP_NUM_THREADS": "1"}))
    assert (found.status, found.mend) == (Status.NOTE, "export OMP_NUM_THREADS=8")
    found = checks.processor(healthy(threads=1, environment={"OMP_NUM_THREADS": "1"}))  # on a card it hardly matters
    assert found is not None
    assert found.status == Status.OK


def test_room_on_disk() -> None:
    found = said(checks.disk, healthy())
    assert (found.status, "takes 400 MiB" in found.finding) == (Status.OK, True)
    found = said(checks.disk, healthy(disk_free_bytes=400 * MIB - 1))
    assert (found.status, "--out" in (found.mend or "")) == (Status.FAIL, True)
    found = said(checks.disk, healthy(disk_free_bytes=400 * MIB))
    assert found.status == Status.OK


def test_a_folder_that_cannot_be_written_or_is_taken() -> None:
    found = said(checks.disk, healthy(disk_trouble="Read-only file system"))
    assert (found.status, "Read-only file system" in found.finding) == (Status.FAIL, True)
    found = said(checks.disk, healthy(out_taken=True))
    assert (found.status, "another --out or `lowmem resume`" in found.finding) == (Status.NOTE, True)


def test_data() -> None:
    found = said(checks.data, healthy())
    assert found.status == Status.OK
    words = "CIFAR-10 is not in data: 163 MiB would be downloaded from www.cs.toronto.edu"
    for answers, status in ((True, Status.NOTE), (None, Status.NOTE), (False, Status.FAIL)):
        found = said(checks.data, healthy(data_there=False, data_words=words, data_host_answers=answers))
        assert (found.status, "163 MiB" in found.finding) == (status, True)
        assert ("--data shapes" in (found.mend or "")) == (answers is False)


def test_data_that_is_missing_or_damaged() -> None:
    trouble = "x/test/cat has no pictures: fill it or take the class out of both parts"
    found = said(checks.data, healthy(data_there=None, data_words=None, troubles={"data": trouble}))
    assert (found.status, found.mend) == (Status.FAIL, "fill it or take the class out of both parts")
    trouble = "KeyError: nothing of ours: at all"
    found = said(checks.data, healthy(data_there=None, data_words=None, troubles={"data": trouble}))
    assert (found.status, found.finding, found.mend) == (Status.FAIL, trouble, None)
    found = said(checks.data, healthy(torchvision_works=False, data_words=None, troubles={"data": trouble}))
    assert found.status == Status.NOTE


def test_what_train_refuses() -> None:
    assert checks.refusal(healthy()) is None
    trouble = "channels-last in fp32 at width 4 corrupts memory on the CPU: use --memory-format contiguous"
    found = said(checks.refusal, replace(NO_CARD, execution={}, troubles={"execution": trouble}))
    assert (found.status, found.mend) == (Status.FAIL, "use --memory-format contiguous")
    # The driver's check says it better.
    trouble = "device cuda was asked for: use --device cpu"
    assert checks.refusal(replace(NO_CARD, device_asked="cuda", troubles={"execution": trouble})) is None

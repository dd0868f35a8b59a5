"""Traffic between devices is read from compiled programs: kinds, bytes, and loops that turn."""

from __future__ import annotations

import pytest

from fmjax.planning.hlo import collective, collectives, item_size


@pytest.mark.parametrize(
    ("instruction", "kind", "sent"),
    [
        ("f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 3 / 4 * 128),
        ("bf16[16]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add", "all-reduce", 32),
        ("(f32[3]{0}, f32[5]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add", "all-reduce", 32),
        ("f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add", "reduce-scatter", 24),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}", "all-gather", 24),
        ("f32[2]{0:T(128)} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%a", "all-reduce", 12),
        ("f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 14),
        (
            "(f32[6,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true",
            "between slices",
            192,
        ),
        ("u8[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 10),
    ],
)
def test_a_collective_is_its_bytes(instruction, kind, sent):
    assert list(collective(instruction, 8)) == [(kind, sent)]


def test_what_is_no_collective_sends_nothing():
    assert not list(collective("f32[8]{0} all-gather-done(%x)", 8))
    assert not list(collective("f32[8]{0} add(%x, %all-reduce.3)", 8))
    assert not list(collective("(f32[8]{0}, u32[], token[]) send(%x, %after), channel_id=2", 8))
    assert [item_size(dtype) for dtype in ("f32", "bf16", "s8", "pred", "f8e4m3fn", "u4")] == [4, 2, 1, 1, 1, 0.5]


PROGRAM = """HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = f32[8]{0} all-gather(%part), replica_groups=[1,4]<=[4], dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%shorter (p: (s32[], f32[8])) -> pred[] {
  %n.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[]{:T(512)} compare(%i, %n.1), direction=LT
}

%last (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %moved = f32[8]{0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %other = (s32[], f32[8]{0}) while(%start), condition=%shorter, body=%last
  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_a_loop_sends_as_often_as_it_turns():
    found = collectives(PROGRAM, 4)
    assert found == {"all-gather": (5, 5 * 3 / 4 * 32), "all-reduce": (1, 32), "collective-permute": (3, 96)}

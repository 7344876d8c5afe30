"""Cases of grouped attention that are larger than a GPU tile, in half precision."""

from tests.pallas_kernels.grouped_attention.kernel_cases import Case

GPU_CASES = {
  "plain": Case(documents=((1000,),), length=1000, head_dim=128, dtype="bfloat16"),
  "long": Case(
    documents=((4100,),),
    length=4100,
    head_dim=128,
    query_heads=4,
    kv_heads=1,
    group_size=16,
    focal_rate=0.1,
    dtype="bfloat16",
  ),
  "ragged": Case(
    documents=((777,), (5,), (640,)), length=777, query_heads=4, kv_heads=1, dtype="float16"
  ),
  "packed": Case(
    documents=((400, 333, 1, 150), (901,)),
    length=1003,
    query_heads=8,
    kv_heads=1,
    group_size=16,
    head_dim=128,
    dtype="bfloat16",
  ),
  "one_head_each": Case(
    documents=((640,),), length=640, query_heads=2, kv_heads=2, head_dim=128, dtype="bfloat16"
  ),
  "fully_masked_row": Case(documents=((), (600,)), length=600, dtype="bfloat16"),
  "all_focal": Case(documents=((600,),), length=600, focal_rate=1.0, dtype="bfloat16"),
  "no_focal": Case(documents=((600,),), length=600, focal_rate=0.0, dtype="bfloat16"),
  "bias": Case(documents=((600,),), length=600, group_bias=1.4, dtype="bfloat16"),
  "streaming": Case(
    documents=((1000,), (615,)),
    length=1000,
    streaming=True,
    query_heads=4,
    group_size=16,
    head_dim=128,
    dtype="bfloat16",
  ),
  "streaming_packed": Case(
    documents=((511, 470),),
    length=990,
    streaming=True,
    shared_bounds=True,
    query_heads=4,
    kv_heads=2,
    group_size=16,
    dtype="bfloat16",
  ),
  "without_groups": Case(
    documents=((1300,), (615,)),
    length=1300,
    streaming=True,
    shared_bounds=True,
    query_heads=6,
    kv_heads=2,
    group_size=16,
    head_dim=128,
    dtype="bfloat16",
    without_groups=True,
  ),
  "blind_heads": Case(
    documents=((4000,), (3970,)),
    length=4100,
    kv_heads=6,
    query_heads=12,
    blind_heads=3,
    group_size=16,
    head_dim=128,
    dtype="bfloat16",
  ),
  "full_heads": Case(
    documents=((1400, 300), (1690,)),
    length=1800,
    streaming=True,
    query_heads=10,
    kv_heads=5,
    full_heads=2,
    group_size=16,
    head_dim=128,
    dtype="bfloat16",
  ),
  "bidirectional": Case(
    documents=((700, 211), (990,)),
    length=1000,
    bidirectional=True,
    query_heads=4,
    kv_heads=2,
    group_size=16,
    dtype="bfloat16",
  ),
  "wide_window": Case(
    documents=((1500,),), length=1500, streaming=True, group_size=399, dtype="bfloat16"
  ),
  "widest_head": Case(
    documents=((700,),), length=700, head_dim=256, query_heads=4, kv_heads=1, dtype="bfloat16"
  ),
}

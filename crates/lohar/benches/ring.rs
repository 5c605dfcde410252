//! The scrollback ring.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lohar::ring::{RING_BYTES, Ring};
use std::hint::black_box;

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    for (name, bytes) in [("write 64 B", 64), ("write 4 KiB", 4096), ("write 32 KiB", 32 * 1024)] {
        let mut ring = Ring::default();
        let data = vec![7; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bencher| bencher.iter(|| ring.write(black_box(&data))));
    }
    let mut ring = Ring::default();
    ring.write(&vec![7; RING_BYTES + 100]);
    group.throughput(Throughput::Bytes(RING_BYTES as u64));
    group.bench_function("read out, full", |bencher| bencher.iter(|| black_box(&ring).to_vec()));
    group.finish();
}

criterion_group!(benches, ring);
criterion_main!(benches);
